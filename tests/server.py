"""Real servers for tests: real processes, real ranks, real sockets, and a check that nothing stays behind."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

READY_S = 120.0
BIN = Path(sys.executable).parent


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def torchrun(*args: str, ranks: int = 1, port: int, options: Sequence[str] = ()) -> list[str]:
    """One bare torchrun agent on this machine."""
    agent = [str(BIN / "torchrun"), "--nproc-per-node", str(ranks), *(options or ("--master-port", str(free_port())))]
    return [*agent, "-m", "tpserve", *args, "--port", str(port)]


def serve(*args: str, port: int) -> list[str]:
    """The same through the supervisor."""
    return [str(BIN / "tpserve"), "serve", *args, "--port", str(port)]


class Server:
    """One or more commands that together serve at `url`. `log` collects what all of them print."""

    def __init__(self, commands: Sequence[Sequence[str]], port: int, log: Path, env: dict[str, str] | None = None) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.port = port
        self.log_path = log
        self._out = log.open("wb")
        self._agents: set[int] = set()
        self.processes = [
            subprocess.Popen(c, stdout=self._out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True,
                             env={**os.environ, **(env or {})})
            for c in commands
        ]  # fmt: skip

    @property
    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def get(self, path: str, timeout_s: float = 10.0) -> tuple[int, Any]:
        """GET, as (status, parsed JSON or text)."""
        try:
            with urllib.request.urlopen(self.url + path, timeout=timeout_s) as response:
                status, body = response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            status, body = error.code, error.read().decode()
        try:
            return status, json.loads(body)
        except ValueError:
            return status, body

    def post(self, path: str, body: Any, timeout_s: float = 120.0) -> tuple[int, Any]:
        """POST JSON (or raw bytes), as (status, parsed JSON)."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=timeout_s) as response:
                return response.status, json.loads(response.read())
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())

    def stream(self, path: str, body: Any, timeout_s: float = 120.0) -> Iterator[Any]:
        """POST JSON; the events of the answer as they come, parsed."""
        request = urllib.request.Request(self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=timeout_s) as response:
            for line in response:
                if line.startswith(b"data: ") and line != b"data: [DONE]\n":
                    yield json.loads(line[6:])

    def complete(self, prompt: Any, **fields: Any) -> dict[str, Any]:
        """The one choice of a completion that must succeed."""
        status, body = self.post("/v1/completions", {"prompt": prompt, **fields})
        assert status == 200, body
        choice: dict[str, Any] = body["choices"][0]
        return choice

    def wait_ready(self, timeout_s: float = READY_S) -> None:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            try:
                if self.get("/readyz", 2.0)[0] == 200:
                    self.pids()
                    return
            except OSError:
                pass
            exited = [p.returncode for p in self.processes if p.poll() is not None]
            assert not exited, f"exited with {exited} before it was ready:\n{self.log}"
            time.sleep(0.1)
        raise AssertionError(f"not ready after {timeout_s} s:\n{self.log}")

    def stop(self, sig: signal.Signals = signal.SIGTERM, timeout_s: float = 40.0) -> list[int]:
        """Signal every command still alive and wait; the exit codes."""
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(sig)
        return self.wait(timeout_s)

    def wait(self, timeout_s: float = 40.0) -> list[int]:
        deadline = time.monotonic() + timeout_s
        try:
            return [p.wait(max(0.1, deadline - time.monotonic())) for p in self.processes]
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {timeout_s} s:\n{self.log}") from None

    def kill(self) -> None:
        """End whatever is left, so that one failed test does not hang the next."""
        for process in self.processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        for pid in self.pids():
            os.kill(pid, signal.SIGKILL)
        self._out.close()

    def port_open(self) -> bool:
        with socket.socket() as probe:
            probe.settimeout(1.0)
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def pids(self) -> list[int]:
        """Every process of this server: those started with its port, and frontends that watch one of its agents."""
        started = pids_with(f"--port\0{self.port}")
        for process in self.processes:
            self._agents.update((process.pid, *children(process.pid)))
        return started + [pid for agent in self._agents for pid in pids_with(f"\0{agent}\0", "tpserve.frontend")]

    def rank_pids(self) -> list[int]:
        """Process ids of the ranks in their order, agents and supervisors excluded."""
        ranks = {rank: pid for pid in pids_with(f"--port\0{self.port}") if (rank := rank_of(pid)) is not None}
        return [ranks[rank] for rank in sorted(ranks)]

    def assert_nothing_left(self, timeout_s: float = 10.0) -> None:
        """No process of this server, no open port, no file in /dev/shm."""
        deadline = time.monotonic() + timeout_s
        while (left := self.pids()) or self.port_open():
            assert time.monotonic() < deadline, f"left behind: processes {left}, port open: {self.port_open()}\n{self.log}"
            time.sleep(0.1)
        assert not list(Path("/dev/shm").glob("*tpserve*"))


class ReadyWatch(threading.Thread):
    """Asks /readyz again and again until `end`: what operators see while a server fails. Silence is not recorded."""

    def __init__(self, server: Server) -> None:
        super().__init__(daemon=True)
        self._server = server
        self._over = threading.Event()
        self._seen: list[tuple[int, Any]] = []
        self.start()

    def run(self) -> None:
        while not self._over.wait(0.03):
            with suppress(OSError, http.client.HTTPException):
                self._seen.append(self._server.get("/readyz", 1.0))

    def end(self) -> list[tuple[int, Any]]:
        """The answers, status and body, in order."""
        self._over.set()
        self.join()
        return self._seen


def pids_with(*needles: str) -> list[int]:
    """Processes, zombies excluded, whose command line (arguments joined by NUL) holds all `needles`."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_text()
                if (
                    all(needle in command for needle in needles)
                    and (entry / "stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
                ):
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


def children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def descendants(pid: int) -> list[int]:
    """The children of a process, of all its threads, and theirs."""
    lists = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    found = [int(child) for text in lists for child in text.split()]
    return [*found, *(below for child in found for below in descendants(child))]


def comm(pid: int) -> str:
    """A process's name, which tpserve sets for what a forkserver forks; empty when it has ended."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return ""


def arguments(pid: int) -> list[str]:
    """A process's command line."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    return []


def rank_of(pid: int) -> int | None:
    """The rank of a process: by its name when a forkserver has forked it, by its environment under bare torchrun."""
    with suppress(OSError):
        program, _, rank = comm(pid).rpartition(" rank ")
        return int(rank) if program else int(environment(pid)["RANK"]) if "RANK" in environment(pid) else None
    return None


def environment(pid: int) -> dict[str, str]:
    try:
        pairs = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return {}
    return dict(pair.split("=", 1) for pair in pairs if "=" in pair)


@contextmanager
def running(commands: Sequence[Sequence[str]], port: int, log: Path, ready: bool = True, **options: Any) -> Iterator[Server]:
    """A server for the block; killed at its end if the test has not stopped it."""
    server = Server(commands, port, log, **options)
    try:
        if ready:
            server.wait_ready()
        yield server
    finally:
        server.kill()
