"""The runtime directory: whose it is, who lives in it, and how ranks of other nodes are told of it."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tpserve.cluster import discovery
from tpserve.cluster.discovery import FrontendAddress, FrontendRecord
from tpserve.config.env import RankEnv
from tpserve.errors import EngineFailure, PeerLost, UserError
from tpserve.wire.curve import FRONTEND, Keyring

ENV = RankEnv(
    rank=2, world_size=4, local_rank=0, local_world_size=2, node_rank=1, nnodes=2, master_addr="127.0.0.1", master_port=1,
    run_id="job/7 of mine", use_agent_store=True, agent_pid=4242, runtime_dir=None, error_file=None,
)  # fmt: skip
HOLD = """
import sys, time, pathlib
from tpserve.cluster.discovery import acquire_lock
acquire_lock(pathlib.Path(sys.argv[1]))
print(flush=True)
time.sleep(60)
"""


class Dictionary:
    """A store in this process."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}
        self.timeout_s = 0.15

    def set(self, key: str, value: str, /) -> None:
        self.values[key] = value.encode()

    def get(self, key: str, /) -> bytes:
        if key not in self.values:
            time.sleep(self.timeout_s)
            raise RuntimeError("wait timeout")
        return self.values[key]


@pytest.fixture
def resident(tmp_path: Path) -> "Iterator[subprocess.Popen[bytes]]":
    """A process that lives in tmp_path as a frontend does."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_the_directory_is_named_after_the_run_and_its_agent() -> None:
    where = discovery.runtime_dir(ENV)
    assert "job_7_of_mine" in where.name and "-4242-" in where.name and str(os.getuid()) in where.name
    assert where != discovery.runtime_dir(replace(ENV, agent_pid=4243)) != discovery.runtime_dir(replace(ENV, run_id="other"))
    assert discovery.runtime_dir(replace(ENV, runtime_dir="/run/x")) == Path("/run/x")


def test_the_directory_is_ours_alone(tmp_path: Path) -> None:
    where = tmp_path / "r"
    discovery.make_runtime_dir(where)
    assert where.stat().st_mode & 0o777 == 0o700
    discovery.make_runtime_dir(where)
    where.chmod(0o755)
    with pytest.raises(UserError, match="0700"):
        discovery.make_runtime_dir(where)
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(UserError, match="in the way"):
        discovery.make_runtime_dir(tmp_path / "link")
    with pytest.raises(UserError, match="TMPDIR"):
        discovery.make_runtime_dir(tmp_path / ("x" * 100))


def test_a_frontend_lives_as_long_as_its_process(tmp_path: Path, resident: "subprocess.Popen[bytes]") -> None:
    assert discovery.is_frontend_alive(tmp_path)
    with pytest.raises(BlockingIOError):
        discovery.acquire_lock(tmp_path)
    resident.kill()
    resident.wait()
    assert not discovery.is_frontend_alive(tmp_path)
    assert not discovery.is_frontend_alive(tmp_path / "nowhere")


def test_a_record_counts_only_while_its_frontend_lives(tmp_path: Path, resident: "subprocess.Popen[bytes]") -> None:
    record = FrontendRecord(resident.pid, "ipc://c", None, "ipc://e", "http://h")
    discovery.write_frontend(tmp_path, record)
    assert discovery.wait_ready(tmp_path, None, 1.0) == record
    resident.kill()
    resident.wait()
    with pytest.raises(EngineFailure, match="not ready within 0.2 s"):
        discovery.wait_ready(tmp_path, None, 0.2)


def test_what_kept_a_child_from_starting_is_told(tmp_path: Path) -> None:
    for code, kind in ((2, UserError), (1, EngineFailure)):
        where = tmp_path / "r"
        discovery.make_runtime_dir(where)
        discovery.write_frontend(where, FrontendRecord(1, error="port 80 is taken", code=code))
        with pytest.raises(kind, match="port 80 is taken"):
            discovery.wait_ready(where, subprocess.Popen([sys.executable, "-c", ""]), 5.0)
        assert not where.exists()


def test_a_child_that_dies_without_a_word(tmp_path: Path) -> None:
    with pytest.raises(EngineFailure, match="ended with exit code 7"):
        discovery.wait_ready(tmp_path / "r", subprocess.Popen([sys.executable, "-c", "raise SystemExit(7)"]), 5.0)


def test_ranks_of_other_nodes_wait_for_an_address_that_answers() -> None:
    store = Dictionary()
    with pytest.raises(EngineFailure, match="rank 2 waited 0.1 s .* rank 0 has not published its address"):
        discovery.find_remote_frontend(ENV, store, "127.0.0.1", 0.1)
    with pytest.raises(PeerLost, match="the agents' store at 127.0.0.1:1 is gone"):
        discovery.find_remote_frontend(ENV, store, "127.0.0.1", 60.0)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        told = f"tcp://127.0.0.1:{listener.getsockname()[1]}"
        connect_info = Keyring.open(None).connect_info(told, with_secret=True)
        discovery.publish_frontend(ENV, FrontendAddress("ipc://x", "127.0.0.1", connect_info=connect_info), store)
        with pytest.raises(EngineFailure, match=f"nobody answers at {told}"):
            discovery.find_remote_frontend(ENV, store, "127.0.0.1", 0.1)
        listener.listen()
        frontend_address = discovery.find_remote_frontend(ENV, store, "127.0.0.1", 5.0)
    assert (frontend_address.control, frontend_address.address, frontend_address.frontend_pid) == (told, "127.0.0.1", None)
    assert frontend_address.curve_client(2, FRONTEND) == connect_info.keyring(None).curve_client(2, FRONTEND)


def test_endpoints_stay_inside_a_node(tmp_path: Path) -> None:
    frontend_address = FrontendAddress("ipc://x", "127.0.0.1", Keyring.open(None), runtime_dir=tmp_path)
    first = frontend_address.endpoint("plan")
    assert first.startswith(f"ipc://{tmp_path}/plan-") and first != frontend_address.endpoint("plan")
    assert frontend_address.curve_client(1, FRONTEND) is None
