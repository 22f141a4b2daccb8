"""What does not come back: a limit for each step that may hang, and who does not answer then.

The main thread may be inside gloo, NCCL or shared memory, which nobody can call back; so a thread of each rank watches it, over a
connection of its own to the store. Owns the limit and the questions; never ends a process itself.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import msgspec
from msgspec import Struct
from torch._C._distributed_c10d import Store  # torch.distributed has it without its types

from tpserve.doctor import links
from tpserve.doctor.links import ProbeResult
from tpserve.doctor.verdict import Verdict

POLL_S = 0.1
DIALLED_S = 10.0
"""How long the ranks that answer may take to dial each other."""
_REMEDY = "look there at the last lines of the log and with `ps`: it hangs, was stopped or killed, or its node is cut off"


class HangWatchdog:
    """Watches the main thread: `late` is called once, on a thread, when a step takes longer than it may."""

    def __init__(self, late: Callable[[str], None]) -> None:
        self._late = late
        self._due: tuple[str, float] | None = None
        threading.Thread(target=self._watch, name="limit", daemon=True).start()

    @contextlib.contextmanager
    def of(self, what: str, limit_s: float) -> Iterator[None]:
        """The block may take so long."""
        self._due = what, time.monotonic() + limit_s
        try:
            yield
        finally:
            self._due = None

    def _watch(self) -> None:
        while True:
            time.sleep(POLL_S)
            due = self._due
            if due is not None and time.monotonic() > due[1]:
                self._late(due[0])
                return


class _HangReport(Struct, frozen=True):
    """A rank that answers, and where it can be dialled."""

    where: tuple[str, int]


def unresponsive_ranks(
    store: Store, rank: int, hosts: Sequence[str], place: tuple[str, tuple[int, int]], what: str, patience_s: float
) -> list[Verdict]:
    """All ranks that still can call this when `what` did not come back; the verdicts are the same on all of them.

    `hosts`: of all ranks; `place`: this rank's address, and the ports it may listen on. `patience_s`: how much later than here
    another rank may notice. Raises RuntimeError when the store does not answer, which is rank 0's.
    """
    ranks = range(len(hosts))
    ping_server = links.PingServer(*place)
    try:
        answers = _told(store, "stuck", rank, msgspec.json.encode(_HangReport((place[0], ping_server.port))), ranks, patience_s)
        there = sorted(answers)
        places = [msgspec.json.decode(answers[other], type=_HangReport).where for other in there]
        heard = [msgspec.structs.replace(each, rank=there[each.rank]) for each in links.probe_all(there.index(rank), places)]
        dialled = _told(store, "dialled", rank, msgspec.json.encode(heard), there, DIALLED_S)
    finally:
        ping_server.close()
    silent = [other for other in ranks if other not in answers]
    found = [Verdict("broken", what, f"rank {other} on {hosts[other]} does not answer", _REMEDY) for other in silent]
    lost = [
        (other, each)
        for other, said in dialled.items()
        for each in msgspec.json.decode(said, type=list[ProbeResult])
        if each.error
    ]
    found += [
        Verdict(
            "broken", what, f"rank {i} on {hosts[i]} -> rank {each.rank} on {hosts[each.rank]}: {each.error}", "see the network"
        )
        for i, each in lost
    ]
    if not found:
        remedy = "gloo's or NCCL's own connections are cut: allow the kernel's ports (net.ipv4.ip_local_port_range) between nodes"
        found = [Verdict("broken", what, "all ranks answer and reach each other, and it does not come back", remedy)]
    return found


def _told(store: Store, name: str, rank: int, mine: bytes, ranks: Sequence[int], patience_s: float) -> dict[int, bytes]:
    """Tell `mine`; what those of `rank_monitor` have told by the time all have, or patience has ended."""
    store.set(f"{name}{rank}", mine.decode())
    deadline_s = time.monotonic() + patience_s
    while True:
        there = [other for other in ranks if store.check([f"{name}{other}"])]
        if len(there) == len(ranks) or time.monotonic() > deadline_s:
            return {other: store.get(f"{name}{other}") for other in there}
        time.sleep(POLL_S)
