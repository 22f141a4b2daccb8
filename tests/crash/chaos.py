"""Kill ranks of the skeleton at random and watch it form again.

Owns the agents, the frontend and the dice; asserts that every epoch follows the one before, that the service comes back after
every kill, that it drains to exit code 0 in the end, and that nothing is left: no process, no file in /dev/shm, no directory.
"""

import json
import os
import random
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tpserve.cluster import discovery
from tpserve.host.network import LOOPBACK

ROOT = Path(__file__).resolve().parents[2]
SKELETON = str(Path(__file__).with_name("skeleton.py"))
BACK_S = 90.0
"""A machine with two cores that seven processes import torch on is slow; what is measured is reported, this only bounds it."""


@dataclass(frozen=True)
class Report:
    """What a run came to. `outages_s`: from a kill in a running epoch to the next epoch that runs, sorted."""

    kills: int
    kills_while_forming: int
    epochs: int
    outages_s: tuple[float, ...]

    def __str__(self) -> str:
        median, worst = statistics.median(self.outages_s), self.outages_s[-1]
        return (
            f"{self.kills} kills, {self.kills_while_forming} of them while forming, {self.epochs} epochs; "
            f"back after {self.outages_s[0]:.2f} s at best, {median:.2f} s in the middle, {worst:.2f} s at worst"
        )


class Chaos:
    """`nnodes` torchrun agents on this machine with `nproc` ranks each."""

    def __init__(self, nnodes: int, nproc: int, seed: int) -> None:
        self.random = random.Random(seed)
        self.top = Path(tempfile.mkdtemp(prefix="tps-"))
        self.where = self.top / "run"
        self.shm = _shm()
        discovery.make_runtime_dir(self.where)
        self.env = {
            **os.environ,
            "TPSERVE_RUNTIME_DIR": str(self.where),
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "TORCH_CPP_LOG_LEVEL": "FATAL",
        }
        self.log = (self.top / "log").open("wb")
        address = LOOPBACK if nnodes > 1 else ""
        self.frontend = self._spawn(SKELETON, "frontend", str(self.where), str(os.getpid()), str(nnodes * nproc), address)
        discovery.wait_ready(self.where, self.frontend, 30.0)
        port = str(_free_port())
        nodes = ["--nnodes", str(nnodes), "--nproc-per-node", str(nproc), "--master-addr", LOOPBACK, "--master-port", port]
        agent = ["-m", "torch.distributed.run", *nodes, "--max-restarts", "100000", "--monitor-interval", "0.1"]
        self.agents = [self._spawn(*agent, "--node-rank", str(node), SKELETON, "rank") for node in range(nnodes)]

    def _spawn(self, *arguments: str) -> "subprocess.Popen[bytes]":
        return subprocess.Popen([sys.executable, *arguments], env=self.env, stdout=self.log, stderr=self.log)

    def run(self, kills: int) -> Report:
        """Kill ranks until `kills` have died, then drain."""
        outages_s: list[float] = []
        forming = 0
        event = self._running_after(0)
        while len(outages_s) + forming < kills:
            time.sleep(self.random.uniform(0.1, 0.8))
            killed_s = time.monotonic()
            self._kill(event["pids"])
            if self.random.random() < 0.25 and len(outages_s) + forming + 1 < kills:  # again, before it is back
                time.sleep(self.random.uniform(0.0, 3.0))
                forming += self._kill(self._rank_pids())
            event = self._running_after(event["epoch"])
            outages_s.append(event["s"] - killed_s)
        self._drain()
        return Report(len(outages_s) + forming, forming, event["epoch"], tuple(sorted(outages_s)))

    def _kill(self, pids: list[int]) -> bool:
        if not pids:
            return False
        try:
            os.kill(self.random.choice(pids), signal.SIGKILL)
        except ProcessLookupError:
            return False
        return True

    def _events(self) -> list[dict[str, Any]]:
        path = Path(f"{self.where}.events")
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def _running_after(self, epoch: int) -> dict[str, Any]:
        """The event of a later epoch that runs with all its processes alive."""
        deadline_s = time.monotonic() + BACK_S
        while time.monotonic() < deadline_s:
            last = (self._events() or [{}])[-1]
            if last.get("state") == "run" and last["epoch"] > epoch and all(_lives(pid) for pid in last["pids"]):
                return last
            time.sleep(0.02)
        raise AssertionError(f"epoch {epoch} was the last one to run\n{self.tail()}")

    def _rank_pids(self) -> list[int]:
        """All ranks there are, also those that have said nothing yet."""
        commands = {pid: _command(pid) for pid in self._ours()}
        return [pid for pid, command in commands.items() if command[-2:] == [SKELETON, "rank"] and "-m" not in command]

    def _ours(self) -> list[int]:
        """Every process that was started for this run, whatever has become of its parents."""
        marker = f"TPSERVE_RUNTIME_DIR={self.where}".encode()
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    if marker in (entry / "environ").read_bytes().split(b"\0"):
                        found.append(int(entry.name))
                except OSError:
                    continue
        return found

    def _drain(self) -> None:
        self.frontend.terminate()
        codes = [process.wait(timeout=60) for process in (self.frontend, *self.agents)]
        assert codes == [0] * len(codes), (codes, self.tail())
        assert not self._ours() and not self.where.exists()
        deadline_s = time.monotonic() + 5.0  # others on this machine have files of their own there, for a moment
        while not _shm() <= self.shm and time.monotonic() < deadline_s:
            time.sleep(0.1)
        assert _shm() <= self.shm

    def tail(self) -> str:
        """What was said last."""
        events = "\n".join(str(event) for event in self._events()[-8:])
        return events + "\n" + (self.top / "log").read_text(errors="replace")[-4000:]

    def close(self) -> None:
        """End whatever still lives."""
        for pid in self._ours():
            os.kill(pid, signal.SIGKILL)
        for process in (self.frontend, *self.agents):
            process.wait()
        self.log.close()
        shutil.rmtree(self.top)


def chaos(nnodes: int, nproc: int, kills: int, seed: int) -> Report:
    """One run, cleaned up whatever comes of it."""
    it = Chaos(nnodes, nproc, seed)
    try:
        return it.run(kills)
    finally:
        it.close()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        port: int = probe.getsockname()[1]
        return port


def _shm() -> set[Path]:
    return set(Path("/dev/shm").iterdir())


def _lives(pid: int) -> bool:
    return bool(_command(pid))


def _command(pid: int) -> list[str]:
    """The command line; empty for a process that has ended, also when nobody has waited for it yet."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().split("\0")[:-1]
    except OSError:
        return []
