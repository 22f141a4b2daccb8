"""A server across the hosts of a lab, for tests: started by the lab's own commands, asked over HTTP from outside."""

import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from launch.lab.hosts import Host
from launch.lab.jobs import Jobs, commands
from tests.server import Server

PORT = 8000
READY_S = 120.0


class Cluster(Server):
    """`Server`'s ways of asking, over the hosts' commands."""

    def __init__(self, hosts: Sequence[Host], lines: Sequence[Sequence[str]], log: Path, env: dict[str, str], head: str) -> None:
        self.url = f"http://[{head}]:{PORT}" if ":" in head else f"http://{head}:{PORT}"
        self.port = PORT
        self.log_path = log
        self.hosts = list(hosts)
        self._lines = list(lines)
        self._out = log.open("w", errors="replace")  # type: ignore[assignment]
        self.jobs = Jobs(self._out, {"OMP_NUM_THREADS": "1", **env})  # type: ignore[arg-type]

    @property
    def processes(self) -> list[Any]:  # type: ignore[override]
        return self.jobs.processes

    def start(self, *nodes: int) -> None:
        """Start these nodes' commands."""
        for node in nodes:
            self.jobs.start(self.hosts[node], self._lines[node])

    def wait(self, timeout_s: float = 40.0) -> list[int]:
        return self.jobs.wait(timeout_s)

    def kill_all(self) -> None:
        """End whatever runs on the hosts."""
        self.jobs.signal(signal.SIGKILL)
        for pid in self.pids():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def kill(self) -> None:
        self.kill_all()
        self.jobs.wait(10.0)
        self._out.close()

    def pids(self) -> list[int]:
        return [pid for host in self.hosts for pid in host.processes()]

    def wait_said(self, text: str, timeout_s: float = 60.0) -> None:
        """Until the log says `text`."""
        deadline_s = time.monotonic() + timeout_s
        while text not in self.log:
            assert time.monotonic() < deadline_s, f"{text!r} was not said in {timeout_s:g} s:\n{self.log}"
            time.sleep(0.05)


@contextmanager
def cluster(
    hosts: Sequence[Host],
    flags: Sequence[str],
    place: Path,
    ranks: Sequence[int] = (1,),
    *,
    start: Sequence[int] | None = None,
    torchrun: bool = False,
    ipv6: bool = False,
    env: dict[str, str] | None = None,
    lines: Sequence[Sequence[str]] | None = None,
) -> Iterator[Cluster]:
    """A server for the block. `start`: which nodes are started at once (default: all); it is killed at the end."""
    made = lines or commands(hosts, flags, ranks, torchrun=torchrun, ipv6=ipv6)
    head = hosts[0].address6 if ipv6 else hosts[0].address
    server = Cluster(hosts, made, place / "server.log", {"TMPDIR": str(place), **(env or {})}, head)
    try:
        server.start(*(range(len(hosts)) if start is None else start))
        yield server
    finally:
        server.kill()
