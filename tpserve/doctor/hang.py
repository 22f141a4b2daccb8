"""Detects steps that hang: a time limit for each step, and a report of the ranks that do not respond.

The main thread may be inside gloo, NCCL or shared memory, where it cannot be interrupted. So a thread of each rank watches it and
uses its own connection to the store. Owns the limit and the report; never ends a process.
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
DIAL_S = 10.0
"""Time for the responding ranks to dial each other."""
_REMEDY = "see the last lines of the log there, and `ps`: it hangs, was stopped or killed, or its node is cut off"


class HangWatchdog:
    """Watches the main thread. Calls `on_timeout` once, on the watching thread, when a step exceeds its limit."""

    def __init__(self, on_timeout: Callable[[str], None]) -> None:
        self._on_timeout = on_timeout
        self._due: tuple[str, float] | None = None
        threading.Thread(target=self._watch, name="hang watchdog", daemon=True).start()

    @contextlib.contextmanager
    def limit(self, step: str, limit_s: float) -> Iterator[None]:
        """Limit the block, which is called `step` in reports, to `limit_s` seconds."""
        self._due = step, time.monotonic() + limit_s
        try:
            yield
        finally:
            self._due = None

    def _watch(self) -> None:
        while True:
            time.sleep(POLL_S)
            due = self._due
            if due is not None and time.monotonic() > due[1]:
                self._on_timeout(due[0])
                return


class _HangReport(Struct, frozen=True):
    """The address and port at which a responding rank can be dialled."""

    address: tuple[str, int]


def unresponsive_ranks(
    store: Store, rank: int, hosts: Sequence[str], listen: tuple[str, tuple[int, int]], step: str, timeout_s: float
) -> list[Verdict]:
    """Find out why `step` hangs. Every rank calls this that still can; the verdicts are the same on all of them.

    `hosts`: those of all ranks. `listen`: this rank's address and the range of ports to listen on. `timeout_s`: the longest delay
    after which another rank may notice the hang. Raises RuntimeError when the store on rank 0 does not respond.
    """
    ranks = range(len(hosts))
    ping_server = links.PingServer(*listen)
    try:
        report = msgspec.json.encode(_HangReport((listen[0], ping_server.port)))
        reports = _exchange(store, "stuck", rank, report, ranks, timeout_s)
        responding = sorted(reports)
        addresses = [msgspec.json.decode(reports[other], type=_HangReport).address for other in responding]
        probes = links.probe_all(responding.index(rank), addresses)
        probes = [msgspec.structs.replace(probe, rank=responding[probe.rank]) for probe in probes]
        all_probes = _exchange(store, "dialled", rank, msgspec.json.encode(probes), responding, DIAL_S)
    finally:
        ping_server.close()
    silent = [other for other in ranks if other not in reports]
    verdicts = [Verdict("broken", step, f"rank {other} on {hosts[other]} does not answer", _REMEDY) for other in silent]
    for source, encoded in all_probes.items():
        for probe in msgspec.json.decode(encoded, type=list[ProbeResult]):
            if probe.error:
                verdicts.append(Verdict("broken", step, links.failed_probe(source, probe, hosts), "see the network"))
    if not verdicts:
        remedy = "gloo's or NCCL's own connections are cut: allow the kernel's ports (net.ipv4.ip_local_port_range) between nodes"
        verdicts = [Verdict("broken", step, "all ranks answer and reach each other, but it does not return", remedy)]
    return verdicts


def _exchange(store: Store, name: str, rank: int, value: bytes, ranks: Sequence[int], timeout_s: float) -> dict[int, bytes]:
    """Publish `value` under `name`, and return the values by rank of those `ranks` that publish theirs within `timeout_s`."""
    store.set(f"{name}{rank}", value.decode())
    deadline_s = time.monotonic() + timeout_s
    while True:
        published = [other for other in ranks if store.check([f"{name}{other}"])]
        if len(published) == len(ranks) or time.monotonic() > deadline_s:
            return {other: store.get(f"{name}{other}") for other in published}
        time.sleep(POLL_S)
