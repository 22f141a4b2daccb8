"""Which open requests may have killed the engine, and in which order they are sent to the next one. Pure.

A sequence is *proven* in an epoch once the engine has sent something about it; one that was a suspect, after `PROOF` messages:
what it had drawn when it ended a rank may not have arrived, so it may draw that again before it does the same. When an epoch
ends, its *suspects* are the sequences that it was sent and that are not proven; without any of these, all that it was sent. The
cause decides what happens:

    outside   a process was killed (SIGKILL, SIGTERM), stopped, or cut off: everything is sent again at once
    unclear   a signal that crashes raise (SIGSEGV, SIGABRT ...), or a step that never ended: all but the suspects are sent first;
              once they are proven the suspects follow, 1, 2, 4, ... at a time, each batch after the one before is proven
    error     a rank reported an error or exited by itself, so one of the suspects did it: the same, one at a time

A suspect gets a strike for every error, and for an unclear end when it is the only suspect. It is condemned when it is the only
suspect and has `STRIKES`. So a request that makes a rank fail is found at the second failure, whatever runs beside it, and one
that is hit by a stray signal while it happens to be the only suspect goes on. Proven sequences lose their strikes. A request for
which the kernel kills a rank, for lack of memory, looks like an end from outside: after `STALLS` such ends in a row without being
proven a sequence is a suspect all the same, with `OUTSIDE_SHARE` of a strike each time.
"""

from collections import deque
from collections.abc import Iterable, Sequence

from tpserve.coordinator.actions import Cause

STRIKES = 2.0
STALLS = 3
OUTSIDE_SHARE = 0.25
PROOF = 3
"""More than the plans in flight. More would take longer, and so would a stray signal find a suspect alone more often."""


class Quarantine:
    """The open sequences of a request table, by ids that grow. Methods that return ids return those to send to the engine now."""

    def __init__(self) -> None:
        self.unproven: dict[int, int] = {}
        """Those of which the engine has said nothing, and how many messages are missing."""
        self._proven: dict[int, None] = {}
        self._batches: deque[list[int]] = deque()
        """What is not sent yet. The next batch is sent once all before it are proven."""
        self._suspended = False
        self._suspected: set[int] = set()
        self._strikes: dict[int, float] = {}
        self._stalls: dict[int, int] = {}

    def admit(self, ids: Sequence[int]) -> list[int]:
        """New sequences."""
        if not self._batches and not self._suspended:
            self.unproven.update(dict.fromkeys(ids, 1))
            return list(ids)
        self._batches.append(list(ids))
        return []

    def prove(self, id: int) -> list[int]:
        """The engine has sent something about a sequence."""
        if id not in self.unproven:
            return []
        self.unproven[id] -= 1
        if self.unproven[id]:
            return []
        self._proven[id] = None
        del self.unproven[id]
        self._forget(id)
        return self._release()

    def end(self, id: int) -> list[int]:
        """A sequence is not open any more."""
        self.unproven.pop(id, None)
        self._proven.pop(id, None)
        self._forget(id)
        for batch in self._batches:
            if id in batch:
                batch.remove(id)
        return self._release()

    def suspend(self) -> None:
        """There is no engine: nothing is sent until `resend`."""
        self._suspended = True

    def judge(self, cause: Cause) -> list[int]:
        """The next epoch runs after a fault: returns the condemned, which the caller ends. `resend` follows."""
        self._suspended = True
        suspects, alone = self._suspects(cause)
        for id in suspects:
            if alone or cause == "error":
                self._strikes[id] = self._strikes.get(id, 0.0) + (OUTSIDE_SHARE if cause == "outside" else 1.0)
        self._suspected.update(suspects)
        suspects.sort(key=lambda id: (self._strikes.get(id, 0.0), id))
        sent = sorted(id for id in (*self._proven, *self.unproven) if id not in set(suspects))
        never_sent = sorted(id for batch in self._batches for id in batch)
        self.unproven, self._proven = {}, {}
        if suspects:
            self._batches = deque(filter(None, [sent, *_batches(suspects, doubling=cause != "error"), never_sent]))
        else:
            self._batches = deque([sorted([*sent, *never_sent])])
        return [id for id in suspects if alone and self._strikes[id] >= STRIKES]

    def resend(self) -> list[int]:
        """The sequences to send first."""
        self._suspended = False
        return self._release()

    def _suspects(self, cause: Cause) -> tuple[list[int], bool]:
        """The suspects, and whether there was only one candidate."""
        for id in self.unproven:
            self._stalls[id] = self._stalls.get(id, 0) + 1
        candidates = list(self.unproven) or list(self._proven)
        if cause == "outside":
            return [id for id in self.unproven if self._stalls[id] > STALLS], len(self.unproven) == 1
        return candidates, len(candidates) == 1

    def _release(self) -> list[int]:
        if self.unproven or self._suspended:
            return []
        while self._batches and not self._batches[0]:
            self._batches.popleft()
        if not self._batches:
            return []
        ids = self._batches.popleft()
        self.unproven.update((id, PROOF if id in self._suspected else 1) for id in ids)
        return ids

    def _forget(self, id: int) -> None:
        self._suspected.discard(id)
        self._strikes.pop(id, None)
        self._stalls.pop(id, None)


def _batches(ids: Sequence[int], *, doubling: bool) -> Iterable[list[int]]:
    """One at a time, or 1, 2, 4, ... at a time."""
    at, size = 0, 1
    while at < len(ids):
        yield list(ids[at : at + size])
        at, size = at + size, size * (2 if doubling else 1)
