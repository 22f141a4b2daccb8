"""A server of two nodes on whose every port strangers knock: it serves on, says so once, and unpickles nothing."""

import contextlib
import os
import re
import resource
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from tests.cluster import tiny_model
from tests.cluster.conftest import of_place
from tests.server import Server, free_port, running, serve
from tpserve.wire.curve import write_secret

BYTES = 100_000
HOOK = """
import atexit, os, pickle, sys
def watch(event, arguments):
    if event == "pickle.find_class" and os.path.exists(os.environ["TMPDIR"] + "/armed"):
        with open(os.environ["TMPDIR"] + "/unpickled", "a") as file:
            file.write(f"{os.getpid()} {arguments}\\n")
sys.addaudithook(watch)
def told(function):
    def call(*arguments, **named):
        watch("pickle.find_class", function.__name__)
        return function(*arguments, **named)
    return call
pickle.loads, pickle.load = told(pickle.loads), told(pickle.load)
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_model.save(tmp_path_factory.mktemp("tiny")))


@contextlib.contextmanager
def two_nodes(model: str, place: Path, *options: str) -> Iterator[Server]:
    """PP 2 on two nodes of this host."""
    hook = place / "hook"
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(HOOK)
    port = free_port()
    layout = ("--load-format", "dummy", "--served-model-name", "tiny", "-pp", "2")
    flags = (*layout, "--nnodes", "2", "--master-addr", "127.0.0.1", "--interface", "lo", *options)
    nodes = [serve(model, *flags, "--master-port", "{}", "--node-rank", str(node), port=port) for node in (0, 1)]
    meet = str(free_port())
    few = ("prlimit", "--nofile=1024:")  # the usual limit of open files, of which a higher one is allowed
    commands = [[*few, *(meet if word == "{}" else word for word in command)] for command in nodes]
    path = os.pathsep.join(filter(None, (str(hook), os.environ.get("PYTHONPATH", ""))))
    environ = {"TMPDIR": str(place), "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    with running(commands, port, place / "server.log", env=environ) as server:
        try:
            yield server
        finally:
            for pid in of_place(place):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def listening(pids: list[int]) -> dict[int, str]:
    """TCP ports of these processes, with the addresses they listen on (in the kernel's notation)."""
    inodes = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            for descriptor in Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(OSError):
                    inodes.add(descriptor.readlink().name.removeprefix("socket:[").rstrip("]"))
    found = {}
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                address, port = fields[1].split(":")
                found[int(port, 16)] = address
    return found


def most_files(pids: list[int]) -> set[int]:
    """How many each of these processes may open."""
    return {resource.prlimit(pid, resource.RLIMIT_NOFILE)[0] for pid in pids}


def knock(port: int, random: Random) -> None:
    """Random bytes, bytes after ZeroMQ's greeting, and nothing at all."""
    greeting = b"\xff" + bytes(8) + b"\x7f\x03\x00NULL" + bytes(16) + bytes(32)
    for beginning, rest in ((b"", random.randbytes(BYTES)), (greeting, random.randbytes(1000)), (b"", b"")):
        with socket.create_connection(("127.0.0.1", port), 5.0) as raw, contextlib.suppress(OSError):
            raw.settimeout(5.0)
            raw.sendall(beginning + rest)


def test_strangers_change_nothing(model: str, place: Path) -> None:
    write_secret(str(place / "secret"))
    with two_nodes(model, place, "--cluster-secret-file", str(place / "secret"), "--require-secret") as server:
        asked = {"max_tokens": 6, "temperature": 0, "return_token_ids": True}
        before = server.complete("The cat", **asked)
        (place / "armed").touch()
        ports = listening(of_place(place))
        ours = [port for port, address in ports.items() if address.startswith(("0100007F", "00000000"))]
        assert len(ours) >= 5, f"HTTP, control, plan, result and a store: {ports}"
        assert most_files(of_place(place)) == {resource.getrlimit(resource.RLIMIT_NOFILE)[1]}, "gloo ends when it has no more"
        random = Random(11)
        for port in ours:
            knock(port, random)
        assert server.complete("The cat", **asked)["text"] == before["text"]
        assert server.get("/readyz")[0] == 200
        assert not (place / "unpickled").exists(), (place / "unpickled").read_text()
        assert server.stop() == [0, 0]
    refusals = re.findall(r"refused a connection.*", server.log)
    assert 1 <= len(refusals) <= 4, refusals
    assert "keys of this run travel" not in server.log and "Traceback" not in server.log


def test_without_a_secret_it_warns_once_and_serves(model: str, place: Path) -> None:
    with two_nodes(model, place) as server:
        assert server.complete("The cat", max_tokens=4, ignore_eos=True)["finish_reason"] == "length"
    assert server.log.count("the nodes share no --cluster-secret-file") == 1
