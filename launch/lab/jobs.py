"""The processes of a lab: starts one `tpserve serve` or one torchrun a host, names processes and sends them signals.

Owns the command lines, the processes that it starts and their output. Knows nothing of links.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

from launch.lab.hosts import Host, LabError

ROOT = Path(__file__).resolve().parents[2]
MASTER_PORT = 29501
_BIN = Path(sys.executable).parent


def commands(
    hosts: Sequence[Host], flags: Sequence[str], ranks: Sequence[int], *, torchrun: bool = False, ipv6: bool = False
) -> list[list[str]]:
    """One command a host: `flags` and the launch flags of the node. `ranks`: the number of each host, or one number for all."""
    counts = list(ranks) * (len(hosts) if len(ranks) == 1 else 1)
    if len(counts) != len(hosts):
        raise LabError(f"--ranks {','.join(map(str, ranks))} for {len(hosts)} hosts: give one number, or one for each host")
    head = hosts[0].address6 if ipv6 else hosts[0].address
    listen = [] if "--host" in flags else ["--host", head]
    lines = []
    for node, count in enumerate(counts):
        if torchrun:
            launch = ["--nnodes", str(len(hosts)), "--node-rank", str(node), "--nproc-per-node", str(count)]
            launch += ["--master-addr", head, "--master-port", str(MASTER_PORT)]
            lines.append([str(_BIN / "torchrun"), *launch, "-m", "tpserve", *flags, *listen])
        else:
            launch = ["--nnodes", str(len(hosts)), "--node-rank", str(node), "--master-addr", head]
            lines.append([sys.executable, "-m", "tpserve", "serve", *flags, *launch, "--nproc-per-node", str(count)])
            lines[-1] += listen if node == 0 else ["--headless"]
    return lines


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment, with this checkout first in PYTHONPATH."""
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), **(extra or {})}


class Jobs:
    """The commands of a run, one a host, and their output, with the host's name before every line."""

    def __init__(self, out: IO[str], env: Mapping[str, str] | None = None) -> None:
        self._out = out
        self._env = environment(env)
        self._lock = threading.Lock()
        self._readers: list[threading.Thread] = []
        self.processes: list[subprocess.Popen[str]] = []

    def start(self, host: Host, command: Sequence[str]) -> None:
        """Start a command in the background, in a session of its own, so that Ctrl-C does not reach it directly."""
        child: subprocess.Popen[str] = host.start(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
            env=self._env, start_new_session=True,
        )  # fmt: skip
        self.processes.append(child)
        self._readers.append(threading.Thread(target=self._print, args=(host.name, child), daemon=True))
        self._readers[-1].start()

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to every process that has not ended."""
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(number)

    def wait(self, timeout_s: float | None = None) -> list[int]:
        """Wait until all have ended and their output is printed. Returns the exit codes."""
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        codes = [p.wait(None if deadline_s is None else max(0.0, deadline_s - time.monotonic())) for p in self.processes]
        for reader in self._readers:
            reader.join(1.0)  # an orphan of a killed run may still hold the pipe
        return codes

    def _print(self, name: str, child: "subprocess.Popen[str]") -> None:
        assert child.stdout is not None
        for line in child.stdout:
            with self._lock:
                self._out.write(f"{name} | {line}")
                self._out.flush()


def rank_of(pid: int) -> int | None:
    """The rank of a process; None when it is no rank or has ended."""
    with suppress(OSError):
        program, _, rank = name_of(pid).rpartition(" rank ")
        if program:  # a forkserver has forked it
            return int(rank)
        for pair in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
            if pair.startswith(b"RANK="):
                own = b"tpserve.frontend" not in command_of(pid)  # rank 0's child under bare torchrun
                return int(pair.removeprefix(b"RANK=")) if own else None
    return None


def name_of(pid: int) -> str:
    """A process's name, which tpserve sets for what a forkserver forks; empty when it has ended."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return ""


def command_of(pid: int) -> bytes:
    """A process's command line; empty when it has ended."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def what(pid: int) -> str:
    """The part of a server that a process is: rank N, frontend, agent, forkserver, torchrun, serve, or else its program."""
    rank, command = rank_of(pid), command_of(pid)
    if rank is not None:
        return f"rank {rank}"
    if (forked := {"tpserve agent": "agent", "tpserve forks": "forkserver"}.get(name_of(pid))) is not None:
        return forked
    parts = {b"tpserve.frontend": "frontend", b"tpserve.agent": "agent", b"torchrun": "torchrun", b"\0serve\0": "serve"}
    return next((name for mark, name in parts.items() if mark in command), command.partition(b"\0")[0].decode(errors="replace"))


def stopped_or_dead(pid: int) -> str:
    """The state of a process that does not run: stopped, zombie or gone; empty when it runs."""
    with suppress(OSError):
        letter = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        return {"T": "stopped", "Z": "zombie"}.get(letter, "")
    return "gone"


def kill(hosts: Iterable[Host], number: signal.Signals, *, rank: int | None = None, part: str | None = None) -> list[str]:
    """Signal processes: those of one rank, those of one part (frontend, agent, serve, torchrun), or all.

    Returns a line for each signalled process.
    """
    wanted = part if rank is None else f"rank {rank}"
    lines = []
    for host in hosts:
        for pid, name in [(pid, what(pid)) for pid in host.processes()]:
            if wanted in (None, name):
                with suppress(ProcessLookupError):
                    os.kill(pid, number)
                    lines.append(f"{host.name}: {name} (pid {pid})")
    return lines
