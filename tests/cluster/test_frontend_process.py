"""The frontend as a real process with ranks that have no model: how it starts, how it ends, and what stays behind (nothing)."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from tests.http.tiny_tokenizer import byte_level, save
from tests.server import pids_with
from tpserve.cluster import discovery
from tpserve.config.engine_config import EngineConfig
from tpserve.types.layout import ParallelLayout
from tpserve.types.sampling import SamplingDefaults

FAKE_RANK = Path(__file__).with_name("fake_rank.py")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def config(model: Path, port: int) -> EngineConfig:
    return EngineConfig(
        model=str(model), tokenizer=str(model), chat_template=None, snapshot=None, served_model_name=("fake",), dtype="float32",
        quantization=None, vocab_size=259, eos_ids=(), tool_call_parser=None, reasoning_parser=None, tool_strict_level="auto",
        sampling_defaults=SamplingDefaults(), cluster_secret_file=None, binding=True, enforce_eager=False,
        load_format="dummy", seed=0, layout=ParallelLayout(2, 1, (1,)), device="cpu", all_reduce="auto", max_model_len=256,
        fit_max_model_len=False, kv_cache_dtype="float32", kv_cache_memory=None, admin_api_key=None, metrics_key=None,
        metrics_compat=None, api_key_file=None, ssl_certfile=None, ssl_keyfile=None,
        request_timeout=None, access_log=None, otlp_traces_endpoint=None, root_path="", enable_force_include_usage=False,
        enable_per_request_metrics=False, return_tokens_as_token_ids=False,
        log_requests=False, log_stats=True, resume_window=300.0, state_dir=None,
        allowed_origins=(), allowed_methods=("*",), allowed_headers=("*",), allow_credentials=False,
        max_num_seqs=8, max_num_batched_tokens=64, block_size=16, enable_prefix_caching=True, gpu_memory_utilization=0.9,
        num_gpu_blocks_override=None, max_queued_requests=8, host="127.0.0.1", port=port, api_key=None, log_level="info",
        start_timeout=20.0, drain_timeout=5.0, recovery_timeout=20.0, interface=None, port_range=(0, 0), step_trace=None,
        verify_weights=False,
    )  # fmt: skip


class Job:
    """Two fake ranks, started by this process in the place of the agent, and the frontend that rank 0 starts."""

    def __init__(self, how: str, model: Path, port: int) -> None:
        self.where = Path(tempfile.mkdtemp(prefix="tps-"))
        self.port = port
        (self.where / "run").mkdir(mode=0o700)
        (self.where / "config.json").write_bytes(msgspec.json.encode(config(model, port)))
        self.log = self.where / "log"
        self.ranks = self.start(how)

    def start(self, how: str) -> "list[subprocess.Popen[bytes]]":
        """All ranks at once, as an agent starts them."""
        with self.log.open("ab") as out:
            return [self._spawn(rank, how, out.fileno()) for rank in range(2)]

    def _spawn(self, rank: int, how: str, out: int) -> "subprocess.Popen[bytes]":
        env = {
            **os.environ, "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2",
            "TPSERVE_RUNTIME_DIR": str(self.where / "run"), "PYTHONPATH": str(FAKE_RANK.parents[2]),
        }  # fmt: skip
        command = [sys.executable, str(FAKE_RANK), str(self.where / "config.json"), how]
        return subprocess.Popen(command, env=env, stdout=out, stderr=out)

    @property
    def frontend_pid(self) -> int:
        deadline_s = time.monotonic() + 10
        while time.monotonic() < deadline_s:
            record = discovery.read_frontend(self.where / "run")
            if record is not None and not record.error:
                return record.pid
            time.sleep(0.02)
        raise AssertionError(f"no frontend: {self.log.read_text()}")

    def ready(self) -> None:
        deadline_s = time.monotonic() + 15
        while time.monotonic() < deadline_s:
            if self.get("/readyz")[0] == 200:
                return
            time.sleep(0.05)
        raise AssertionError(self.log.read_text())

    def get(self, path: str, body: dict[str, object] | None = None) -> tuple[int, str]:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        except OSError as error:
            return 0, str(error)

    def codes(self) -> list[int]:
        return [rank.wait(timeout=10) for rank in self.ranks]

    def gone(self, pid: int) -> bool:
        """The frontend is our grandchild; it has ended when its pidfd says so, and its directory is gone with it."""
        deadline_s = time.monotonic() + 8
        while time.monotonic() < deadline_s:
            if not Path(f"/proc/{pid}").exists() or ") Z " in Path(f"/proc/{pid}/stat").read_text():
                return not (self.where / "run").exists()
            time.sleep(0.02)
        return False

    def clean(self) -> None:
        for rank in self.ranks:
            rank.kill()
            rank.wait()
        shutil.rmtree(self.where)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(byte_level(), tmp_path_factory.mktemp("model"))


@pytest.fixture
def job(request: pytest.FixtureRequest, model: Path) -> Iterator[Job]:
    job = Job(getattr(request, "param", "serve"), model, free_port())
    yield job
    job.clean()


def test_serves_then_drains_on_a_ranks_signal(job: Job) -> None:
    job.ready()
    assert "tpserve ready: fake on http://127.0.0.1:" in job.log.read_text()
    assert "2 CPU ranks on 1 node, TP 2 x PP 1" in job.log.read_text()
    status, body = job.get(
        "/v1/completions", {"model": "fake", "prompt": [5, 6, 7, 8], "max_tokens": 3, "return_token_ids": True}
    )
    assert status == 200 and json.loads(body)["usage"]["completion_tokens"] == 3, body
    pid = job.frontend_pid
    os.kill(job.ranks[1].pid, signal.SIGTERM)
    assert job.codes() == [0, 0] and job.gone(pid)


def test_server_info_of_ranks_that_are_up(job: Job) -> None:
    assert job.frontend_pid
    early = json.loads(job.get("/server_info")[1])
    assert early["state"] in ("starting", "running") and [rank["rank"] for rank in early["ranks"]] == [0, 1]
    job.ready()
    time.sleep(0.6)  # a heartbeat later
    status, text = job.get("/server_info")
    info = json.loads(text)
    assert (status, info["state"], info["epoch"], info["max_model_len"]) == (200, "running", 1, 256)
    assert info["layout"] == {"tp": 2, "pp": 1, "layers": [1], "expert_parallel": False}
    assert info["config"]["block_size"] == 16 and info["config"]["api_key"] is None
    for rank, told in enumerate(info["ranks"]):
        shard = {"tp_rank": rank, "layers": [0, 1], "heads": [2 * rank, 2 * rank + 2], "kv_heads": [rank, rank + 1]}
        about = (told["rank"], told["host"], told["pid"], told["stage"], told["shard"], told["state"])
        assert about == (rank, "here", job.ranks[rank].pid, 0, shard, "running")
        assert told["memory"]["total"] == 9 and told["memory"]["num_blocks"] == 8
        assert 0 <= told["silent_s"] < 4 and told["last_step"] is None
    os.kill(job.ranks[1].pid, signal.SIGSTOP)
    time.sleep(1.5)
    assert json.loads(job.get("/server_info")[1])["ranks"][1]["silent_s"] > 1
    os.kill(job.ranks[1].pid, signal.SIGCONT)


def test_drains_on_the_frontends_own_signal(job: Job) -> None:
    job.ready()
    pid = job.frontend_pid
    os.kill(pid, signal.SIGTERM)
    assert job.codes() == [0, 0] and job.gone(pid)


def test_a_killed_rank_ends_all_and_is_named(job: Job) -> None:
    job.ready()
    pid = job.frontend_pid
    started_s = time.monotonic()
    job.ranks[1].kill()
    assert job.codes() == [1, -signal.SIGKILL] and job.gone(pid)
    assert time.monotonic() - started_s < 5
    assert f"rank 1 on here (pid {job.ranks[1].pid}) ended without a word" in job.log.read_text()


def test_ranks_that_are_started_again_find_a_new_frontend(job: Job) -> None:
    """What an agent with --max-restarts does: the old frontend is still ending when the new ranks look for one."""
    job.ready()
    old = job.frontend_pid
    job.ranks[0].kill()
    job.codes()
    job.ranks = job.start("serve")
    job.ready()
    assert job.frontend_pid != old
    os.kill(job.ranks[0].pid, signal.SIGTERM)
    assert job.codes() == [0, 0]


def test_a_stopped_rank_is_killed_in_the_end(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    job.ready()
    pid = job.frontend_pid
    os.kill(job.ranks[1].pid, signal.SIGSTOP)
    assert job.codes() == [1, -signal.SIGKILL] and job.gone(pid)
    assert "has been silent for 4 s" in job.log.read_text()


def test_a_killed_frontend_takes_the_ranks_along(job: Job) -> None:
    job.ready()
    os.kill(job.frontend_pid, signal.SIGKILL)
    assert job.codes() == [1, 1]
    assert "the frontend is gone" in job.log.read_text()


@pytest.mark.parametrize("job", ["user-error"], indirect=True)
def test_a_user_error_is_one_line_and_code_2(job: Job) -> None:
    assert job.codes() == [2, 2]
    deadline_s = time.monotonic() + 5
    while left := pids_with("tpserve.frontend", str(job.where)):  # by its directory: its record may come and go unseen
        assert time.monotonic() < deadline_s, left
        time.sleep(0.05)
    assert not (job.where / "run").exists()
    assert [line for line in job.log.read_text().splitlines() if "error" in line.lower()] == ["tpserve: error: no such model"]


@pytest.mark.parametrize("job", ["crash-after-up"], indirect=True)
def test_a_crash_ends_open_requests_with_the_reason(job: Job) -> None:
    answers: list[tuple[int, str]] = []
    job.ready()
    os.kill(job.ranks[0].pid, signal.SIGSTOP)  # keeps the request open
    body: dict[str, object] = {"model": "fake", "prompt": [5, 6], "max_tokens": 2}
    asker = threading.Thread(target=lambda: answers.append(job.get("/v1/completions", body)))
    asker.start()
    asker.join(10)
    assert answers and answers[0][0] == 500 and "ended without a word" in answers[0][1], answers


def test_port_in_use_is_one_line(model: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        job = Job("serve", model, port)
        assert job.ranks[0].wait(timeout=15) == 2
        assert f"port {port} on 127.0.0.1 is in use: choose another with --port" in job.log.read_text()
        job.clean()


def test_no_torch_in_the_frontend() -> None:
    code = "import sys, tpserve.frontend.process, tpserve.cluster.discovery; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
