"""Starts where a DNS server is configured and never answers, as on an air-gapped node: nothing waits for it."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests import silent_dns
from tests.server import free_port, running, serve


@pytest.fixture(scope="module", autouse=True)
def _allowed() -> None:
    if (why := silent_dns.refusal()) is not None:
        pytest.skip(why)


def questions(where: Path, code: str, *arguments: str) -> bytes:
    """Run `code` on such a host; what it asked DNS."""
    noted = where / "questions"
    command = silent_dns.command(noted, sys.executable, "-c", code, *arguments)
    done = subprocess.run(command, cwd=silent_dns.ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return noted.read_bytes()


def serve_once(log: str) -> None:
    """`tpserve serve` with two ranks, up to an answer and a drain."""
    port = free_port()
    with running([serve("-tp", "2", "--device", "cpu", port=port)], port, Path(log), env={"OMP_NUM_THREADS": "1"}) as server:
        assert server.complete("Once", max_tokens=2, ignore_eos=True)["finish_reason"] == "length"
        assert server.stop() == [0]


def test_a_node_serves(tmp_path: Path) -> None:
    code = "import sys; from tests.cluster.test_no_dns import *; serve_once(sys.argv[1])"
    assert questions(tmp_path, code, str(tmp_path / "log")) == b""


STORES = """
from tpserve.parallel.store import host_store, join_store
store, address = host_store("127.8.8.8")
join_store(address).set("key", "value")
assert store.get("key") == b"value"
"""


def test_a_store_is_hosted_and_joined_at_an_address_without_a_name(tmp_path: Path) -> None:
    assert questions(tmp_path, STORES) == b""


def test_dns_is_asked_again_afterwards(tmp_path: Path) -> None:
    code = """
import contextlib, socket
from tpserve.host.network import without_dns
with without_dns(), contextlib.suppress(OSError):
    socket.getaddrinfo("first.example.org", 80)
with contextlib.suppress(OSError):
    socket.getaddrinfo("second.example.org", 80)
"""
    asked = questions(tmp_path, code)
    assert b"second" in asked and b"first" not in asked
