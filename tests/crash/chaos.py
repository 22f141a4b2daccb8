"""A server under load whose processes are killed, stopped and crashed again and again.

The answers of all requests are those of a run without faults, and no client sees an error. In the end nothing has grown, and a
drain leaves nothing behind.
"""

import asyncio
import os
import random
import re
import signal
import statistics
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import aiohttp

from tests.crash.mixed import Body, Call, answer, calls
from tests.server import Server, children, rank_of

TIMEOUT_S = 900.0
Target = Callable[[Server, random.Random], int | None]
Act = Callable[[Server, random.Random], Awaitable[bool]]


class Trouble(NamedTuple):
    """A kind of fault. `weight`: how often of all. `act` does it; False: there is nothing to do it to."""

    name: str
    weight: int
    act: Act


def signalled(number: signal.Signals, target: Target, weight: int) -> Trouble:
    """A signal to the process that `target` names."""

    async def act(server: Server, rng: random.Random) -> bool:
        if (pid := target(server, rng)) is None:
            return False
        with suppress(ProcessLookupError):
            os.kill(pid, number)
            return True
        return False

    return Trouble(f"{number.name} {target.__name__}", weight, act)


def supervisor(server: Server) -> int:
    return server.processes[0].pid


def named(pid: int, name: str) -> list[int]:
    """The children of a process that call themselves so."""
    found = []
    for child in children(pid):
        with suppress(OSError):
            if Path(f"/proc/{child}/comm").read_text().startswith(name):
                found.append(child)
    return found


def agent(server: Server, _: random.Random) -> int | None:
    return next(iter(named(supervisor(server), "tpserve agent")), None)


def rank(server: Server, rng: random.Random) -> int | None:
    of_agent = agent(server, rng)
    ranks = [child for child in children(of_agent or 0) if rank_of(child) is not None]
    return rng.choice(ranks) if ranks else None


def forkserver(server: Server, rng: random.Random) -> int | None:
    parents = [supervisor(server), agent(server, rng) or 0]
    found = [pid for parent in parents for pid in named(parent, "tpserve forks")]
    return rng.choice(found) if found else None


def frontend(server: Server, _: random.Random) -> int | None:
    return next((pid for pid in children(supervisor(server)) if "tpserve.frontend" in _command(pid)), None)


FAULTS = (
    signalled(signal.SIGKILL, rank, 6),
    signalled(signal.SIGSEGV, rank, 2),
    signalled(signal.SIGSTOP, rank, 1),
    signalled(signal.SIGKILL, agent, 3),
    signalled(signal.SIGSTOP, agent, 1),
    signalled(signal.SIGKILL, forkserver, 2),
)
OF_THE_FRONTEND = signalled(signal.SIGKILL, frontend, 3)
"""With --state-dir, for clients that come back."""


@dataclass
class Report:
    """What a run came to. `gaps_s`: the longest time without anything new, of each answer that was streamed during a fault."""

    answers: int = 0
    faults: dict[str, int] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    outages_s: list[float] = field(default_factory=list)

    def __str__(self) -> str:
        done = ", ".join(f"{count} {name}" for name, count in sorted(self.faults.items()))
        outages = sorted(self.outages_s) or [0.0]
        return (
            f"{self.answers} answers exact, {sum(self.faults.values())} faults ({done}); recovered after "
            f"{statistics.median(outages):.2f} s in the middle, {outages[-1]:.2f} s at worst"
        )


async def baseline(url: str, todo: list[Call]) -> list[Body]:
    """The answers of an undisturbed run."""
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(TIMEOUT_S)) as session:
        return await asyncio.gather(*(answer(session, url, call) for call in todo))


async def chaos(
    server: Server,
    todo: list[Call],
    expected: list[Body],
    seconds: float,
    seed: int,
    faults: Sequence[Trouble] = FAULTS,
    pause_s: tuple[float, float] = (1.0, 4.0),
    *,
    come_back: bool = False,
) -> Report:
    """Ask all of `todo` at once, each again when it is answered, while faults come every `pause_s` seconds.

    `come_back`: clients of streams that break off go on from where they were.
    """
    report, end_s = Report(), time.monotonic() + seconds
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(TIMEOUT_S)) as session:

        async def client(call: Call, wanted: Body) -> None:
            while time.monotonic() < end_s:
                try:
                    got = await answer(session, server.url, call, again=come_back)
                except Exception as error:
                    report.errors.append(f"{type(error).__name__}: {error} for {call}")
                    continue
                report.answers += 1
                if difference := differs(call, got, wanted):
                    report.errors.append(difference)

        clients = [asyncio.create_task(client(*pair)) for pair in zip(todo, expected, strict=True)]
        await trouble(server, report, random.Random(seed), end_s - 3.0, faults, pause_s)
        await asyncio.gather(*clients)
    report.outages_s = [float(took) for took in re.findall(r"recovered in ([\d.]+) s", server.log)]
    return report


async def trouble(
    server: Server,
    report: Report,
    rng: random.Random,
    end_s: float,
    faults: Sequence[Trouble],
    pause_s: tuple[float, float],
) -> None:
    """One fault after the other; one time in four the next one follows before the ranks are back."""
    while time.monotonic() < end_s:
        await asyncio.sleep(rng.uniform(0.0, 0.5) if rng.random() < 0.25 else rng.uniform(*pause_s))
        (fault,) = rng.choices(faults, [fault.weight for fault in faults])
        if await fault.act(server, rng):
            report.faults[fault.name] = report.faults.get(fault.name, 0) + 1


def differs(call: Call, got: Body, wanted: Body) -> str:
    """How an answer differs from the undisturbed one; empty when it does not."""
    if call.exact:
        return "" if got == wanted else f"another answer for {call}:\n got {got}\nwant {wanted}"
    shape = {name: got["usage"][name] == wanted["usage"][name] for name in ("prompt_tokens", "completion_tokens")}
    return "" if all(shape.values()) else f"another usage for {call}: {got['usage']}"


def state(server: Server) -> Mapping[str, int]:
    """What must not grow: descriptors of the processes that stay, zombies, open requests, blocks."""
    pids = [supervisor(server), *children(supervisor(server))]
    metrics = server.get("/metrics")[1]
    values = dict(
        re.findall(r"^tpserve:(num_requests_running|num_requests_waiting|kv_cache_usage_perc)\{[^}]*\} (\S+)$", metrics, re.M)
    )
    return {
        "descriptors": sum(len(list(Path(f"/proc/{pid}/fd").iterdir())) for pid in pids),
        "zombies": sum(_state_letter(pid) == "Z" for pid in pids),
        **{name: int(float(value) * 1000) for name, value in values.items()},
        "/dev/shm": len(list(Path("/dev/shm").iterdir())),
    }


def memory_mib(server: Server) -> float:
    """Resident memory of the supervisor and the frontend, which live through everything."""
    pids = [supervisor(server), *(pid for pid in children(supervisor(server)) if "frontend" in _command(pid))]
    return sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids) * os.sysconf("SC_PAGE_SIZE") / (1 << 20)


def _command(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text()
    return ""


def _state_letter(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return ""


__all__ = ["Report", "Trouble", "baseline", "calls", "chaos", "memory_mib", "signalled", "state"]
