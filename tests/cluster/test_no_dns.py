"""Starts where a DNS server is configured and never answers, as on an air-gapped node: in about the usual time."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import silent_dns
from tests.server import free_port, running, serve

ROOT = Path(__file__).resolve().parents[2]
LOOKUP_S = 10.0
"""What one question to such a server costs."""


@pytest.fixture(scope="module", autouse=True)
def _allowed() -> None:
    if (why := silent_dns.refusal()) is not None:
        pytest.skip(why)


def on_such_a_host(code: str, *arguments: str) -> None:
    command = silent_dns.command(sys.executable, "-c", code, *arguments)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def serve_once(log: str) -> None:
    """A node's `tpserve serve`, up to an answer and a drain; no question was waited for."""
    port, began_s = free_port(), time.monotonic()
    with running([serve("-tp", "2", "--device", "cpu", port=port)], port, Path(log), env={"OMP_NUM_THREADS": "1"}) as server:
        assert server.complete("Once", max_tokens=2)["finish_reason"] == "length"
        sys.stdout.write(f"{time.monotonic() - began_s:.1f} s\n")
        assert server.stop() == [0]
        laps = next(line for line in server.log.splitlines() if " start: agent " in line)
        meeting_s = float(laps.partition("all ranks ")[2].partition(",")[0])
        assert meeting_s < LOOKUP_S / 2, server.log
        assert "hostname of the client socket" not in server.log


def test_a_node_serves(tmp_path: Path) -> None:
    on_such_a_host("import sys; from tests.cluster.test_no_dns import *; serve_once(sys.argv[1])", str(tmp_path / "log"))


STORES = """
import socket, time
from tpserve.config.network import without_dns
from tpserve.parallel.store import host_store, join_store
began_s = time.monotonic()
with without_dns():
    socket.getfqdn("airgapped")
store, address = host_store("127.8.8.8")
join_store(address).set("key", "value")
assert store.get("key") == b"value" and time.monotonic() - began_s < 5, time.monotonic() - began_s
"""


def test_a_store_is_hosted_and_joined_at_an_address_without_a_name() -> None:
    on_such_a_host(STORES)


def test_dns_is_asked_again_afterwards() -> None:
    on_such_a_host("""
import socket, time
from tpserve.config.network import without_dns
for asked in (False, True, False):
    began_s = time.monotonic()
    try:
        if asked:
            socket.getaddrinfo("example.org", 80)
        else:
            with without_dns():
                socket.getaddrinfo("example.org", 80)
    except socket.gaierror:
        pass
    assert (time.monotonic() - began_s > 5) == asked
""")
