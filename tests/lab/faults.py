"""One fault done to a real cluster, and what it looks like from outside.

    survive    the service goes on: how long it took until the part was back and answered, and what clients got meanwhile
    happen     the service ends: how long everything took to end, what clients, /readyz and the log said, what is left

`test_failures` judges it and prints the times that docs/reliability.md shows.
"""

import http.client
import json
import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launch.lab import links
from launch.lab.hosts import Host
from launch.lab.jobs import commands, stopped_or_dead, what
from tests.cluster import tiny_model
from tests.lab.cluster import PORT, Cluster, cluster
from tests.server import ReadyWatch

FLAGS = ("--load-format", "dummy", "-tp", "2", "-pp", "2", "--max-model-len", "8192")
KILL, STOP, CUT, SILENCE = "kill", "stop", "cut", "silence"
LINK = "link"
CUTS = {"cut for 2 s": 2.0, "cut for 10 s": 10.0}
"""The link is silent for so long, and then as before."""
PARTS = ("rank 0", "rank 1", "rank 2", "rank 3", "frontend", "agent 0", "agent 1", "serve 0", "serve 1")
"""What runs; a number behind `agent` and `serve` is the node's. Two ranks a node. Under bare torchrun that is the agent."""
GIVE_UP_S = 40.0
QUESTION = {"prompt": "The cat", "max_tokens": 60, "ignore_eos": True, "temperature": 0.9, "seed": 5, "return_token_ids": True}


@dataclass
class Outcome:
    """Of one fault."""

    ended_s: float
    """From the fault until every process had ended, but for one that was stopped itself"""
    left: list[str]
    """What still ran when all patience had ended, and the stopped process if it still is"""
    codes: list[int]
    log: str
    ready: list[tuple[int, Any]]
    """Answers of /readyz from the fault on"""
    streams: list[list[str]] = field(default_factory=list)
    """The last stream of each client, as data lines; an exception's name at the end of one that broke"""
    ports: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)

    def last(self, node: int) -> str:
        """The last line of a node's log."""
        return [line for line in self.log.splitlines() if line.startswith(f"node{node} | ")][-1].partition(" | ")[2]


class Client(threading.Thread):
    """One stream after the other, until one does not end well; `events` are those of the last one."""

    def __init__(self, server: Cluster) -> None:
        super().__init__(daemon=True)
        self._host = server.hosts[0].address
        self.events: list[str] = []
        self.begun = threading.Event()
        self.start()

    def run(self) -> None:
        body = json.dumps({"prompt": "The cat", "max_tokens": 4000, "ignore_eos": True, "stream": True})
        while not any('"error"' in event or not event.startswith(("{", "[")) for event in self.events):
            connection = http.client.HTTPConnection(self._host, PORT, timeout=GIVE_UP_S)
            self.events = []
            try:
                connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
                for line in connection.getresponse():
                    if line.startswith(b"data: "):
                        self.events.append(line.decode().removeprefix("data: ").strip())
                        self.begun.set()
                if self.events[-1:] != ["[DONE]"]:
                    self.events.append("it broke off")
            except (OSError, http.client.HTTPException) as error:
                self.events.append(type(error).__name__)
            finally:
                connection.close()


@dataclass
class Survival:
    """Of one fault."""

    took_s: float
    """From the fault until the part was back, another process than before, and a new request was answered"""
    errors: list[str]
    """What differed from the undisturbed answer"""
    answers: int
    codes: list[int]
    log: str


class Reader(threading.Thread):
    """One stream after the other until `enough`; each has the tokens `calm`."""

    def __init__(self, server: Cluster, calm: list[int]) -> None:
        super().__init__(daemon=True)
        self._server, self._calm = server, calm
        self.enough = False
        self.answers = 0
        self.errors: list[str] = []
        self.begun = threading.Event()
        self.start()

    def run(self) -> None:
        while not self.enough:
            tokens: list[int] = []
            try:
                for event in self._server.stream("/v1/completions", QUESTION | {"stream": True}):
                    tokens += event["choices"][0]["token_ids"]
                    self.begun.set()
            except Exception as error:
                self.errors.append(f"{type(error).__name__}: {error}")
                return
            self.answers += 1
            if tokens != self._calm:
                self.errors.append(f"{tokens} instead of {self._calm}")
                return


def find(server: Cluster, part: str) -> int | None:
    """The process id of a part, when it lives."""
    name, _, number = part.partition(" ")
    hosts = server.hosts if name in ("rank", "frontend") else [server.hosts[int(number)]]
    wanted = {part} if name == "rank" else {"agent", "torchrun"} if name == "agent" else {name}
    return next((pid for host in hosts for pid in host.processes() if what(pid) in wanted and not stopped_or_dead(pid)), None)


def wait(condition: Callable[[], Any], timeout_s: float = 60.0) -> Any:
    deadline_s = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline_s, "it never came to the moment"
        time.sleep(0.002)
    return found


def phase(server: Cluster) -> str:
    with suppress(OSError, http.client.HTTPException):
        return str(server.get("/readyz", 1.0)[1].get("phase"))
    return ""


def alone(server: Cluster) -> None:
    """Node 0 waits for node 1, which nobody has started."""
    server.start(0)
    wait(lambda: phase(server).startswith("waiting for ranks"))


def forming(server: Cluster) -> None:
    """All ranks exist as processes; they load torch and have said nothing."""
    server.start(0, 1)
    wait(lambda: all(find(server, f"rank {rank}") for rank in range(4)))


def loading(server: Cluster) -> None:
    """The epoch has begun: ranks form the mesh and load."""
    server.start(0, 1)
    wait(lambda: phase(server) and not phase(server).startswith("waiting for rank"))


def idle(server: Cluster) -> None:
    """Ready, and nobody asks."""
    server.start(0, 1)
    server.wait_ready()
    time.sleep(0.3)


def running(server: Cluster) -> None:
    """Streams are open (`happen` opens them)."""
    idle(server)


def draining(server: Cluster) -> None:
    """Node 0 was told to end; streams are open."""
    idle(server)


MOMENTS = {moment.__name__: moment for moment in (alone, forming, loading, idle, running, draining)}


def save(directory: Path) -> str:
    """A tiny model with room for long streams."""
    path = tiny_model.save(directory) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"max_position_embeddings": 8192}))
    return str(directory)


def survive(hosts: list[Host], model: str, place: Path, part: str, how: str, moment: str, calm: list[int]) -> Survival:
    """Bring a cluster to the moment, do it to the part, and see it come back. `calm`: the undisturbed answer's tokens.

    Streams are open while `running` and `draining`, but for a fault of the frontend, which owns them. Somebody starts
    `tpserve serve` of node 1 again.
    """
    with cluster(hosts, [], place, start=[], lines=commands(hosts, [model, *FLAGS], [2])) as server:
        MOMENTS[moment](server)
        readers = [Reader(server, calm) for _ in range(3 * (moment in ("running", "draining") and part != "frontend"))]
        assert all(reader.begun.wait(20.0) for reader in readers)
        if moment == "draining":
            for reader in readers:
                reader.enough = True
            server.processes[0].terminate()
            wait(lambda: phase(server) == "draining")
        before = None if part == LINK else wait(lambda: find(server, part))
        began_s = time.monotonic()
        _do(server, part, how)
        if part == "serve 1":
            server.processes[1].wait(20.0)
            server.start(1)
        errors: list[str] = []
        if moment != "draining":
            wait(lambda: part == LINK or find(server, part) not in (None, before))
            wait(lambda: phase(server) == "ready")
            if server.post("/v1/completions", QUESTION)[1]["choices"][0]["token_ids"] != calm:
                errors.append("another answer after the fault")
        took_s = time.monotonic() - began_s
        for reader in readers:
            reader.enough = True
            reader.join(60.0)
            errors += reader.errors + ["it never ended"] * reader.is_alive()
        if moment != "draining":
            server.processes[0].terminate()
        codes = server.wait()
        return Survival(took_s, errors, sum(reader.answers for reader in readers), codes, server.log)


def happen(
    hosts: list[Host],
    model: str,
    place: Path,
    part: str,
    how: str,
    moment: str,
    *flags: str,
    torchrun: bool = False,
) -> Outcome:
    """Bring a cluster to the moment, do it to the part, and see it end. CUT and SILENCE are done to the LINK."""
    lines = commands(hosts, [model, *FLAGS, *flags], [2], torchrun=torchrun)
    with cluster(hosts, [], place, start=[], lines=lines) as server:
        MOMENTS[moment](server)
        clients = [Client(server) for _ in range(3)] if moment in ("running", "draining") else []
        for client in clients:
            assert client.begun.wait(20.0)
        if moment == "draining":
            server.processes[0].terminate()
            wait(lambda: phase(server) == "draining")
        watch = ReadyWatch(server)
        spared = _do(server, part, how)
        began_s = time.monotonic()
        while (left := _alive(server, spared)) and time.monotonic() - began_s < GIVE_UP_S:
            time.sleep(0.02)
        ended_s = time.monotonic() - began_s
        seen = watch.end()
        for client in clients:
            client.join(5.0)
        listening = [line.split()[3] for host in hosts for line in host.run("ss", "-Hltn").splitlines()]
        left += [f"{what(spared)} stopped"] if spared and stopped_or_dead(spared) == "stopped" else []
        shm = [str(path) for host in hosts for path in Path(f"/proc/{host.pid}/root/dev/shm").iterdir()]
        server.kill_all()
        codes = server.wait(5.0)
        files = [path.name for path in place.iterdir() if path.suffix != ".log"] + shm
        return Outcome(ended_s, left, codes, server.log, seen, [c.events for c in clients], listening, files)


def _do(server: Cluster, part: str, how: str) -> int | None:
    """Do it; the process that may stay stopped, if it does."""
    if how in CUTS:
        links.cut(server.hosts[1], server.hosts[0], silent=True)
        time.sleep(CUTS[how])
        links.heal(server.hosts[1], [server.hosts[0]])
        return None
    if how in (CUT, SILENCE):
        links.cut(server.hosts[1], server.hosts[0], silent=how == SILENCE)
        return None
    pid = wait(lambda: find(server, part))
    assert pid is not None
    os.kill(pid, signal.SIGKILL if how == KILL else signal.SIGSTOP)
    return int(pid) if how == STOP else None


def _alive(server: Cluster, spared: int | None) -> list[str]:
    """What still runs, zombies and the stopped process excluded."""
    found = [(what(pid), stopped_or_dead(pid), pid) for host in server.hosts for pid in host.processes()]
    return [f"{name} {state}".strip() for name, state, pid in found if name and state not in ("zombie", "gone") and pid != spared]
