"""The coordinator's hands: who is watched, who is told first, and that a name cannot be taken by who came before."""

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import zmq

from tpserve.coordinator.actions import Action, EpochFailed
from tpserve.coordinator.coordinator import Coordinator
from tpserve.coordinator.epoch_state import EpochState
from tpserve.coordinator.rank_monitor import RankMonitor
from tpserve.types.messages import CoordinatorMessage, Fault, Hello, MemoryLedger, RankMessage, Ready, Start, Stop
from tpserve.wire import codec
from tpserve.wire.channels import TcpEndpoint, connect, open_socket, tcp
from tpserve.wire.curve import FRONTEND, CurveClient, Keyring, ZapAuthenticator


class Rank:
    """A rank's socket in this process; `pid` is what its Hello says."""

    def __init__(
        self, endpoint: str, curve_client: CurveClient | None, rank: int, incarnation: int = 1, pid: int | None = None
    ) -> None:
        self.rank, self.incarnation, self.pid = rank, incarnation, pid or os.getpid()
        self.socket = open_socket(zmq.DEALER, codec.COORDINATOR.max_bytes)
        self.socket.set(zmq.ROUTING_ID, f"{rank}.{incarnation}".encode())
        connect(self.socket, endpoint, curve_client)

    def say(self, *messages: RankMessage) -> None:
        self.socket.send(codec.RANK.encode(messages))

    def hello(self) -> None:
        self.say(Hello(self.rank, self.incarnation, self.pid, "h", {"store": "a:1"} if self.rank == 0 else {}, {}))

    def up(self) -> None:
        self.say(Ready(self.rank, 1, MemoryLedger(0, 0, 0, 0, 0, 0, 0, 1, 16, 256), {}))

    def heard(self) -> list[CoordinatorMessage]:
        messages: list[CoordinatorMessage] = []
        while self.socket.poll(0):
            messages += codec.COORDINATOR.decode(self.socket.recv())
        return messages


class Stage:
    def __init__(self, rank_monitor: RankMonitor, keyring: Keyring, actions: list[Action]) -> None:
        self.keyring = keyring
        self.rank_monitor, self.actions, self.coordinator = rank_monitor, actions, rank_monitor.coordinator
        self.cast: list[Rank] = []
        self.agents_end = ""

    def look_at_agent(self) -> None:
        if self.agents_end:
            self.rank_monitor.perform(self.coordinator.fail(1, self.agents_end, asyncio.get_running_loop().time()))

    def rank(self, rank: int, incarnation: int = 1, pid: int | None = None, *, remote: bool = False) -> Rank:
        endpoint = self.rank_monitor.remote_endpoint if remote else self.rank_monitor.local_endpoint
        curve_client = self.keyring.curve_client(rank, FRONTEND) if remote else None
        self.cast.append(Rank(endpoint, curve_client, rank, incarnation, pid))
        return self.cast[-1]

    async def until(self, condition: Callable[[], bool]) -> None:
        for _ in range(500):
            if condition():
                return
            await asyncio.sleep(0.01)
        raise AssertionError((self.coordinator.state, self.coordinator.reason, self.actions))

    async def run(self, *ranks: Rank) -> None:
        for rank in ranks:
            rank.hello()
        await self.until(lambda: self.coordinator.state is EpochState.STARTING)
        for rank in ranks:
            rank.up()
        await self.until(lambda: self.coordinator.state is EpochState.RUN)


@asynccontextmanager
async def stage(where: Path, size: int, *, restarts: bool = False) -> AsyncIterator[Stage]:
    actions: list[Action] = []
    coordinator = Coordinator(size, asyncio.get_running_loop().time(), restarts=restarts)
    keyring = Keyring.open(None)
    curve_server = keyring.curve_server(FRONTEND, size)
    zap_authenticator = ZapAuthenticator(curve_server.allowed)
    tcp_endpoint = TcpEndpoint(tcp("127.0.0.1"), curve_server)
    rank_monitor = RankMonitor(coordinator, f"ipc://{where}/control", tcp_endpoint, actions.append, lambda: it.look_at_agent())
    it = Stage(rank_monitor, keyring, actions)
    task = asyncio.create_task(rank_monitor.run())
    try:
        yield it
    finally:
        task.cancel()
        for rank in it.cast:
            rank.socket.close(linger=0)
        zap_authenticator.close()
        rank_monitor.close()


def play(main: Callable[[Path], Coroutine[None, None, None]], where: Path) -> None:
    asyncio.run(asyncio.wait_for(main(where), 20.0))


def test_local_and_remote_ranks_of_one_epoch(tmp_path: Path) -> None:
    async def main(where: Path) -> None:
        async with stage(where, 2) as it:
            near, far = it.rank(0), it.rank(1, remote=True)
            await it.run(near, far)
            assert Start(1, {"store": "a:1"}) in near.heard() and Start(1, {"store": "a:1"}) in far.heard()

    play(main, tmp_path)


def test_a_death_is_reported_before_the_complaint_about_it(tmp_path: Path) -> None:
    async def main(where: Path) -> None:
        async with stage(where, 2) as it:
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
            near, other = it.rank(0), it.rank(1, pid=child.pid)
            await it.run(near, other)
            child.kill()
            near.say(Fault(0, 1, "engine", "connection closed by peer"))
            child.wait()
            await it.until(lambda: bool(it.actions[2:]))
            assert [type(action) for action in it.actions[2:]] == [EpochFailed]
            assert it.coordinator.reason.startswith(f"rank 1 on h (pid {child.pid}) ended without a word")
            assert await it.rank_monitor.wait_exited(0.05) is False  # this process stands for rank 0

    play(main, tmp_path)


def test_the_agents_end_is_told_before_that_of_its_ranks(tmp_path: Path) -> None:
    async def main(where: Path) -> None:
        async with stage(where, 2) as it:
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
            await it.run(it.rank(0), it.rank(1, pid=child.pid))
            it.agents_end = "the agent was stopped"
            child.kill()
            child.wait()
            await it.until(lambda: it.coordinator.state is EpochState.STOPPED)
            assert it.coordinator.reason == "the agent was stopped"

    play(main, tmp_path)


@pytest.mark.parametrize("known", [True, False])
def test_who_only_follows_another_rank_is_heard_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, known: bool) -> None:
    """Rank 0 has died before its Hello: rank 1 knows only that a sibling has, the agent soon which one."""
    monkeypatch.setattr("tpserve.coordinator.rank_monitor.SIBLING_S", 0.8)

    async def main(where: Path) -> None:
        async with stage(where, 2) as it:
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
            near = it.rank(1, pid=child.pid)
            near.hello()
            near.say(Fault(1, 0, "sibling", "another rank of this node has ended"))
            await asyncio.sleep(0.3)
            child.kill()
            child.wait()
            await asyncio.sleep(0.3)
            assert it.coordinator.state is EpochState.FORMING
            it.agents_end = "rank 0 was killed" if known else ""
            await it.until(lambda: it.coordinator.state is EpochState.STOPPED)
            alone = f"rank 1 on h (pid {child.pid}): another rank of this node has ended"
            assert it.coordinator.reason == (it.agents_end or alone)

    play(main, tmp_path)


def test_who_comes_back_does_not_hide_who_died(tmp_path: Path) -> None:
    """Where the service goes on, ranks whose sum broke come back at once; and one whose sibling has died will soon have ended."""

    async def main(where: Path) -> None:
        async with stage(where, 2, restarts=True) as it:
            first, second = (subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) for _ in range(2))
            await it.run(it.rank(0, pid=first.pid), it.rank(1, pid=second.pid))
            first.kill()
            back = it.rank(1, incarnation=2, pid=second.pid)
            first.wait()
            back.hello()
            await it.until(lambda: it.coordinator.state is EpochState.FORMING)
            assert it.coordinator.reason.startswith(f"rank 0 on h (pid {first.pid}) ended without a word")
            await it.until(lambda: [hello.pid for hello in it.coordinator.hellos] == [second.pid])
            back.say(Fault(1, 1, "sibling", "another rank of this node has ended"))
            second.kill()
            second.wait()
            await it.until(lambda: it.coordinator.hellos == [])

    play(main, tmp_path)


def test_a_remote_rank_that_closes_is_lost_soon(tmp_path: Path) -> None:
    async def main(where: Path) -> None:
        async with stage(where, 2) as it:
            near, far = it.rank(0), it.rank(1, remote=True)
            await it.run(near, far)
            far.socket.close(linger=0)
            began_s = asyncio.get_running_loop().time()
            await it.until(lambda: it.coordinator.state is EpochState.STOPPED)
            assert asyncio.get_running_loop().time() - began_s < 2
            assert "rank 1 on h" in it.coordinator.reason and "closed its connection" in it.coordinator.reason
            await it.until(lambda: any(isinstance(message, Stop) for message in near.heard()))

    play(main, tmp_path)


def test_a_rank_that_died_before_its_hello_was_read(tmp_path: Path) -> None:
    async def main(where: Path) -> None:
        async with stage(where, 2) as it:
            child = subprocess.Popen([sys.executable, "-c", ""])
            child.wait()
            it.rank(1, pid=child.pid).hello()
            await it.until(lambda: it.coordinator.state is EpochState.STOPPED)

    play(main, tmp_path)


def test_who_came_before_is_sent_away_and_not_watched(tmp_path: Path) -> None:
    async def main(where: Path) -> None:
        async with stage(where, 2, restarts=True) as it:
            old, new = it.rank(1, incarnation=5), it.rank(1, incarnation=4)
            old.hello()
            await it.until(lambda: bool(it.coordinator.hellos))
            new.hello()
            await it.until(lambda: it.coordinator.hellos != [] and it.coordinator.hellos[0].identity == 4)
            old.hello()
            await it.until(lambda: any(isinstance(message, Stop) for message in old.heard()))
            assert it.coordinator.hellos[0].identity == 4
            assert [peer.identity for peer in it.rank_monitor._pidfds] == [4]


def test_a_rank_that_says_why_and_dies_at_once_is_believed(tmp_path: Path) -> None:
    """A complaint is kept for a moment, since another rank's death may explain it; the rank's own death does not."""

    async def main(where: Path) -> None:
        async with stage(where, 2) as it:
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
            near, other = it.rank(0), it.rank(1, pid=child.pid)
            await it.run(near, other)
            other.say(Fault(1, 1, "engine", "its control thread failed with TypeError: x"))
            child.kill()
            child.wait()
            await it.until(lambda: it.coordinator.state is EpochState.STOPPED)
            assert it.coordinator.reason == f"rank 1 on h (pid {child.pid}): its control thread failed with TypeError: x"

    play(main, tmp_path)

    play(main, tmp_path)


def test_noise_is_dropped(tmp_path: Path) -> None:
    async def main(where: Path) -> None:
        async with stage(where, 1) as it:
            for name, frame in (
                (b"who", b""),
                (b"0.1", b"\xff"),
                (b"1.2.3", codec.RANK.encode([])),
                (b"-1.1", codec.RANK.encode([])),
            ):
                socket = open_socket(zmq.DEALER, 1000)
                socket.set(zmq.ROUTING_ID, name)
                connect(socket, it.rank_monitor.remote_endpoint, it.keyring.curve_client(0, FRONTEND))
                socket.send(frame)
                await asyncio.sleep(0.05)
                socket.close(linger=0)
            await it.run(it.rank(0))

    play(main, tmp_path)
