"""Who the ranks are: the incarnations of each in the order in which they came, and what the newest has said. Decides nothing.

    identity   a random number in the address of everything that an incarnation says; orders nothing
    number     1, 2, ...: given here when an identity is first heard of; the highest of a rank is the one that counts

No clock orders incarnations: clocks may be set back between two of them.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from tpserve.observe.table import of_ranks
from tpserve.types.messages import Heartbeat, Hello, Ready

ERROR_S = 10.0
"""An error that a rank logged so long before its end, or longer, does not explain the end."""
EXCUSED_S = 60.0
"""A step may still take so long after a rank has compiled for it."""
SILENT = Heartbeat(-1, 0, "", 0, -1)


class Peer(NamedTuple):
    """One incarnation of one rank: the address of everything said to and by it."""

    rank: int
    identity: int


class RankInfo(NamedTuple):
    """What a rank said last, and when it was heard; None before."""

    hello: Hello | None
    ready: Ready | None
    heartbeat: Heartbeat
    heard_s: float | None


@dataclass
class Member:
    """A rank's newest incarnation. `over`: its epoch has ended, and it cannot come back."""

    number: int = 0
    identity: int = -1
    over: bool = False
    hello: Hello | None = None
    ready: Ready | None = None
    heartbeat: Heartbeat = SILENT
    heard_s: float = 0.0
    last_error: str = ""
    last_error_s: float = 0.0
    busy_since_s: float | None = None
    busy_s: float | None = None
    """When it was last heard to be busy."""
    numbers: dict[int, int] = field(default_factory=dict)
    """Of every incarnation of this rank so far, by identity."""


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

    def knows(self, peer: Peer) -> bool:
        """Whether there is such a rank."""
        return 0 <= peer.rank < len(self._members)

    def is_current(self, peer: Peer) -> bool:
        """Whether it is the newest incarnation of its rank."""
        return self.knows(peer) and self._members[peer.rank].identity == peer.identity

    def is_new(self, peer: Peer) -> bool:
        """Whether it was never heard of."""
        return peer.identity not in self._members[peer.rank].numbers

    def admit(self, peer: Peer) -> Member:
        """Number a new incarnation, which takes the place of the one before."""
        numbers = self._members[peer.rank].numbers
        numbers[peer.identity] = number = len(numbers) + 1
        self._members[peer.rank] = Member(number, peer.identity, numbers=numbers)
        return self._members[peer.rank]

    def peer(self, rank: int) -> Peer:
        """The newest incarnation of a rank."""
        return Peer(rank, self._members[rank].identity)

    @property
    def peers(self) -> list[Peer]:
        """Of all ranks that were heard of."""
        return [self.peer(rank) for rank, member in enumerate(self._members) if member.number]

    def forgive(self, now: float) -> None:
        """Count everybody's silence from now on."""
        for member in self._members:
            member.heard_s = now

    # What was said

    def note_beat(self, rank: int, heartbeat: Heartbeat, now: float) -> bool:
        """Note a heartbeat; whether it tells of progress."""
        member = self._members[rank]
        before, member.heartbeat = member.heartbeat, heartbeat
        if heartbeat.busy:
            member.busy_since_s = now if member.busy_since_s is None else member.busy_since_s
            member.busy_s = now
        else:
            member.busy_since_s = None
        return (before.phase, before.percent) != (heartbeat.phase, heartbeat.percent)

    def note_error(self, rank: int, last_error: str, now: float) -> None:
        """Note the last error among the lines that a rank has told, if there is one."""
        if last_error:
            self._members[rank].last_error, self._members[rank].last_error_s = last_error, now

    def is_busy(self, now: float, limit_s: float) -> bool:
        """Whether a rank compiles, or did a moment ago, and not for longer than `limit_s`."""
        for member in self._members:
            recently = member.busy_s is not None and now - member.busy_s < EXCUSED_S
            if recently and (member.busy_since_s is None or now - member.busy_since_s < limit_s):
                return True
        return False

    def cause(self, rank: int, now: float) -> str:
        """What a rank logged as an error just now; empty for nothing."""
        member = self._members[rank]
        return member.last_error if now - member.last_error_s < ERROR_S else ""

    @property
    def seen(self) -> list[RankInfo]:
        """Every rank as it is known now."""
        return [RankInfo(m.hello, m.ready, m.heartbeat, None if m.heartbeat is SILENT else m.heard_s) for m in self._members]

    @property
    def hellos(self) -> list[Hello]:
        """Of those who take part."""
        return [member.hello for member in self._members if member.hello]

    @property
    def missing(self) -> list[int]:
        """Ranks that do not take part yet."""
        return [rank for rank, member in enumerate(self._members) if member.hello is None]

    def slowest(self, *, forming: bool) -> Heartbeat:
        """The beat of the slowest rank that is waited for: before Hello a rank may tell what it does, as when downloading."""
        waited = [m.heartbeat for m in self._members if (m.hello is None and m.heartbeat.phase if forming else m.ready is None)]
        return min(waited, key=lambda heartbeat: heartbeat.percent, default=SILENT)

    def waiting(self) -> str:
        """For whom a start waits, and what the slowest of them does."""
        said = self.slowest(forming=True).phase
        return f"waiting for {of_ranks(self.missing)}" + (f": {said}" if said else "")

    def describe(self, rank: int) -> str:
        """A rank, and where it runs if that is known."""
        hello = self._members[rank].hello
        return f"rank {rank} on {hello.host} (pid {hello.pid})" if hello else f"rank {rank}"
