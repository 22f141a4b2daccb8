"""The ranks as the coordinator knows them: the incarnations of each rank, and the last messages of the newest. Decides nothing.

    identity   a random number, part of the address of every message of an incarnation; it has no order
    number     1, 2, ...: the roster assigns it at the first message of an identity; only the highest number of a rank counts

No clock orders incarnations, since a clock may be set back between two of them.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from tpserve.observe.table import of_ranks
from tpserve.types.messages import Heartbeat, Hello, Ready

ERROR_EXPLAINS_S = 10.0
"""An error explains the end of a rank if the rank logged it at most this long before."""
BUSY_GRACE_S = 60.0
"""An overdue step is excused for this long after a rank has compiled a kernel for it."""
NO_HEARTBEAT = Heartbeat(-1, 0, "", 0, -1)


class Peer(NamedTuple):
    """One incarnation of one rank: the address of its messages in both directions."""

    rank: int
    identity: int


class RankInfo(NamedTuple):
    """The last messages of a rank, and the time of the last one in seconds of the coordinator's clock; None before the first."""

    hello: Hello | None
    ready: Ready | None
    heartbeat: Heartbeat
    last_message_s: float | None


@dataclass
class Member:
    """The newest incarnation of a rank. `over`: its epoch has ended, and it cannot join another one."""

    number: int = 0
    identity: int = -1
    over: bool = False
    configuration: int | None = None
    """Of its Hello; None before."""
    lost: bool = False
    """It was silent for too long, and that is reported."""
    hello: Hello | None = None
    ready: Ready | None = None
    heartbeat: Heartbeat = NO_HEARTBEAT
    last_message_s: float = 0.0
    last_error: str = ""
    last_error_s: float = 0.0
    busy_since_s: float | None = None
    last_busy_s: float | None = None
    """The time of the last heartbeat that said busy."""
    numbers: dict[int, int] = field(default_factory=dict)
    """The number of every incarnation of this rank so far, by identity."""


class Roster:
    """All ranks of a world, in rank order."""

    def __init__(self, world_size: int) -> None:
        self._members = [Member() for _ in range(world_size)]

    def __len__(self) -> int:
        return len(self._members)

    def __iter__(self) -> Iterator[Member]:
        return iter(self._members)

    def __getitem__(self, rank: int) -> Member:
        return self._members[rank]

    # Incarnations

    def in_world(self, peer: Peer) -> bool:
        """Whether the rank is within the world size."""
        return 0 <= peer.rank < len(self._members)

    def is_current(self, peer: Peer) -> bool:
        """Whether it is the newest incarnation of its rank."""
        return self.in_world(peer) and self._members[peer.rank].identity == peer.identity

    def is_new(self, peer: Peer) -> bool:
        """Whether this is the first message of an incarnation."""
        return peer.identity not in self._members[peer.rank].numbers

    def register(self, peer: Peer) -> None:
        """Number a new incarnation, which replaces the one before."""
        numbers = self._members[peer.rank].numbers
        numbers[peer.identity] = number = len(numbers) + 1
        self._members[peer.rank] = Member(number, peer.identity, numbers=numbers)

    def peer(self, rank: int) -> Peer:
        """The newest incarnation of a rank."""
        return Peer(rank, self._members[rank].identity)

    @property
    def peers(self) -> list[Peer]:
        """The newest incarnation of every rank that has sent a message."""
        return [self.peer(rank) for rank, member in enumerate(self._members) if member.number]

    def reset_timers(self, now: float) -> None:
        """Count the silence of every rank from `now` on."""
        for member in self._members:
            member.last_message_s = now

    # Messages

    def record_heartbeat(self, rank: int, heartbeat: Heartbeat, now: float) -> bool:
        """Record a heartbeat; returns whether it shows progress."""
        member = self._members[rank]
        before, member.heartbeat = member.heartbeat, heartbeat
        if heartbeat.busy:
            member.busy_since_s = now if member.busy_since_s is None else member.busy_since_s
            member.last_busy_s = now
        else:
            member.busy_since_s = None
        return (before.phase, before.percent) != (heartbeat.phase, heartbeat.percent)

    def record_error(self, rank: int, last_error: str, now: float) -> None:
        """Record the last error among the log lines of a rank; an empty text is none."""
        if last_error:
            self._members[rank].last_error, self._members[rank].last_error_s = last_error, now

    def is_compiling(self, now: float, limit_s: float) -> bool:
        """Whether a rank compiles or has just compiled, but not for longer than `limit_s` seconds."""
        for member in self._members:
            recently = member.last_busy_s is not None and now - member.last_busy_s < BUSY_GRACE_S
            if recently and (member.busy_since_s is None or now - member.busy_since_s < limit_s):
                return True
        return False

    def recent_error(self, rank: int, now: float) -> str:
        """The error that a rank has just logged; empty if there is none."""
        member = self._members[rank]
        return member.last_error if now - member.last_error_s < ERROR_EXPLAINS_S else ""

    @property
    def ranks(self) -> list[RankInfo]:
        """Every rank as it is known now, in rank order."""
        return [
            RankInfo(m.hello, m.ready, m.heartbeat, None if m.heartbeat is NO_HEARTBEAT else m.last_message_s)
            for m in self._members
        ]

    @property
    def hellos(self) -> list[Hello]:
        """The Hello of every rank that takes part, in rank order."""
        return list(self.taking_part())

    def taking_part(self) -> Iterator[Hello]:
        """The same, one by one: a caller that stops early looks at few of a thousand."""
        return (member.hello for member in self._members if member.hello)

    @property
    def complete(self) -> bool:
        """Whether all ranks take part."""
        return all(member.hello is not None for member in self._members)

    @property
    def missing(self) -> list[int]:
        """Ranks that do not take part yet."""
        return [rank for rank, member in enumerate(self._members) if member.hello is None]

    @property
    def loading(self) -> list[int]:
        """Ranks that are not ready yet."""
        return [rank for rank, member in enumerate(self._members) if member.ready is None]

    def slowest(self, *, forming: bool) -> Heartbeat:
        """The heartbeat of the slowest rank of a start.

        With `forming`, only ranks without a Hello that report a phase count (a download of weights); else all without a Ready.
        """
        pending = [m.heartbeat for m in self._members if (m.hello is None and m.heartbeat.phase if forming else m.ready is None)]
        return min(pending, key=lambda heartbeat: heartbeat.percent, default=NO_HEARTBEAT)

    def forming_phase(self) -> str:
        """The phase of FORMING: the missing ranks, and what the slowest of them does."""
        phase = self.slowest(forming=True).phase
        return f"waiting for {of_ranks(self.missing)}" + (f": {phase}" if phase else "")

    def describe(self, rank: int) -> str:
        """The name of a rank in log lines, with its host and process id where they are known."""
        hello = self._members[rank].hello
        return f"rank {rank} on {hello.host} (pid {hello.pid})" if hello else f"rank {rank}"
