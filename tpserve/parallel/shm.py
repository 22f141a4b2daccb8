"""All-reduce and all-gather of CPU tensors between ranks of one host, through a page of memory that all of them map.

Owns the page, the meeting that makes it, and waiting in it; knows no model and no process group. The page is anonymous (memfd):
it has no name in any file system, and is gone with the last process that maps it, however that ends.

Layout: a token, then a counter for each rank on a cache line of its own, then two halves of one slot a rank. In round n a
rank writes its part into its slot of half n % 2, sets its counter to n, waits until every counter is at least n, and reads all
slots. No second wait is needed: whoever writes half n % 2 again, in round n + 2, has seen all counters at n + 1, and a rank
counts n + 1 only after it has read round n. Tensors larger than a slot go in pieces, each a round of its own.

This leans on the order of memory on x86: stores are seen in the order in which they were made, loads are made in order, and an
aligned counter is written and read whole. Other processors promise less, so there is no page on them.

A peer's death is seen through its pidfd and raises EngineFailure in whoever waits for it.
"""

import mmap
import os
import platform
import secrets
import select
import time
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
from torch._C._distributed_c10d import Store  # torch.distributed has it without its types

from tpserve.errors import EngineFailure
from tpserve.parallel.store import gather

SLOT_BYTES = 1 << 20
"""Largest part of a tensor in one round; both of a pair's parts stay in a core's cache."""
_LINE = 64
_SPIN_NS = 10_000
"""Short: a peer that needs this core cannot come while this rank spins, and yielding costs an idle core next to nothing."""
_SLEEP_AFTER_NS = 1_000_000
_WATCH_AFTER_NS = 5_000_000
_SLEEP_S = 50e-6
_WATCH_MS = 1
_GIVE_UP_NS = 600 * 10**9
"""As long as the backend's collectives wait: the others may compile or read slowly."""


class RankLocation(NamedTuple):
    """Where a rank runs. Equal `host` means that the processes see each other's numbers: one kernel, one pid namespace."""

    host: str
    pid: int


class _Half(NamedTuple):
    """One half of the page, cut to the tensors at hand: this rank's slot, every rank's in order, and all as one tensor."""

    mine_N: torch.Tensor
    parts: tuple[torch.Tensor, ...]
    all_PN: torch.Tensor


def exchange_locations(store: Store, rank: int, world_size: int, timeout_s: float) -> list[RankLocation]:
    """Where every rank of the world runs. All call this."""
    told = gather(store, "place", rank, range(world_size), f"{_host()} {os.getpid()}".encode(), timeout_s)
    return [RankLocation(host, int(pid)) for host, pid in (each.decode().split() for each in told)]


def create_shm_group(
    store: Store, places: Sequence[RankLocation], ranks: Sequence[int], rank: int, cores: int, timeout_s: float
) -> "ShmAllReduce | str":
    """Meet the other `rank_monitor` of the group in one page; `rank` is this one. All of them get a page, or all get a reason
    why not.

    `store` has not been used for these ranks before. `cores`: that the ranks of this host share; with fewer cores than ranks
    nobody spins.
    """
    if len({places[i].host for i in ranks}) > 1:
        return "the ranks do not share a host"
    if platform.machine() not in ("x86_64", "AMD64"):
        return f"not on {platform.machine()}, which may reorder memory accesses"
    name = f"page{ranks[0]}"
    size = _header_bytes(len(ranks)) + 2 * len(ranks) * SLOT_BYTES
    memory, pidfds, reason, told = None, [], "", False
    with ExitStack() as created, ExitStack() as watched:
        try:
            if rank == ranks[0]:
                fd, memory = _create(size)
                created.callback(os.close, fd)  # once everybody has mapped it, or has given up
                store.set(name, f"{fd} {memory[:_LINE].decode()}")
                told = True
            else:
                memory = _open(places[ranks[0]].pid, *_read(store, name, timeout_s).split())
            for i in ranks:
                pidfds.append(os.pidfd_open(places[i].pid) if i != rank else -1)
                watched.callback(_close, pidfds[-1:])
        except OSError as error:
            reason = f"rank {rank}: {error}"
            if rank == ranks[0] and not told:
                store.set(name, "-1 -")  # nobody can open that
        reasons = gather(store, f"{name}.", rank, ranks, reason.encode(), timeout_s)
        if any(reasons):
            return next(filter(None, reasons)).decode()
        watched.pop_all()
    assert memory is not None
    local_ranks = sum(location.host == places[rank].host for location in places)
    return ShmAllReduce(memory, ranks, ranks.index(rank), pidfds, spins=cores >= local_ranks)


def _host() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{Path('/proc/self/ns/pid').stat().st_ino}"
    except OSError:
        return secrets.token_hex(8)  # a kernel that does not say: nobody else's host


def _read(store: Store, key: str, timeout_s: float) -> str:
    store.wait([key], timedelta(seconds=timeout_s))
    return store.get(key).decode()


def _create(size: int) -> tuple[int, mmap.mmap]:
    """A page of zeros with a token at its head. The memory is taken now: later there is no way to refuse."""
    fd = os.memfd_create("tpserve")
    try:
        os.posix_fallocate(fd, 0, size)
        memory = mmap.mmap(fd, size)
    except OSError:
        os.close(fd)
        raise
    memory[:_LINE] = secrets.token_hex(_LINE // 2).encode()
    return fd, memory


def _open(pid: int, fd: str, token: str) -> mmap.mmap:
    """Map what another process holds open. OSError when it cannot be reached, or is something else (a cloned machine's)."""
    mine = os.open(f"/proc/{pid}/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
    try:
        if os.pread(mine, _LINE, 0) != token.encode():
            raise OSError(f"process {pid} is not the rank it should be")
        return mmap.mmap(mine, 0)
    finally:
        os.close(mine)


def _header_bytes(size: int) -> int:
    return -(-(1 + size) * _LINE // mmap.PAGESIZE) * mmap.PAGESIZE


def _close(pidfds: Sequence[int]) -> None:
    for pidfd in pidfds:
        if pidfd >= 0:
            os.close(pidfd)


class ShmAllReduce:
    """One rank's view of the page. `rank_monitor` are the group's global ranks (for names in errors), `location` this one's
    index in them.

    All ranks make the same calls with equal shapes and types, in the same order.
    """

    def __init__(self, memory: mmap.mmap, ranks: Sequence[int], place: int, pidfds: Sequence[int], *, spins: bool) -> None:
        size = len(ranks)
        self._ranks = tuple(ranks)
        self._place = place
        self._counters = memoryview(memory).cast("q")
        self._mine_at = (1 + place) * _LINE // 8
        self._peers_at = tuple((1 + i) * _LINE // 8 for i in range(size) if i != place)
        self._slots_HPB = torch.frombuffer(memory, dtype=torch.uint8, offset=_header_bytes(size)).view(2, size, SLOT_BYTES)
        self._pidfds = dict(zip(self._ranks, pidfds, strict=True))
        self._deaths = select.poll()
        for pidfd in pidfds:
            if pidfd >= 0:
                self._deaths.register(pidfd, select.POLLIN)
        self._spin_ns = _SPIN_NS if spins else 0
        self._round = 0
        self._views_of: tuple[int, torch.dtype] | None = None
        self._halves: tuple[_Half, ...] = ()

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Sum of `x` over the ranks, in rank order, each sum rounded to the type of `x`. May overwrite `x`; use the result."""
        x = x.contiguous()
        for part_N in self._pieces(x):
            first_N, second_N, *others = self._meet(part_N).parts
            torch.add(first_N, second_N, out=part_N)
            for other_N in others:
                part_N.add_(other_N)
        return x

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """Stack the ranks' tensors: [size, *x.shape]."""
        out = x.new_empty((len(self._ranks), *x.shape))
        out_PN = out.view(len(self._ranks), x.numel())
        done = 0
        for part_N in self._pieces(x.contiguous()):
            end = done + part_N.numel()
            out_PN[:, done:end].copy_(self._meet(part_N).all_PN)
            done = end
        return out

    def close(self) -> None:
        """Stop watching the peers. The memory goes with the last tensor over it."""
        _close(tuple(self._pidfds.values()))
        self._pidfds = {}

    @staticmethod
    def _pieces(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """A contiguous tensor, flat, in parts that fit a slot; none for an empty one."""
        flat_N = x.view(-1)
        if x.nbytes <= SLOT_BYTES:
            return (flat_N,) if x.nbytes else ()
        step = SLOT_BYTES // x.element_size()
        return tuple(flat_N[start : start + step] for start in range(0, flat_N.numel(), step))

    def _meet(self, part_N: torch.Tensor) -> _Half:
        """One round: publish this rank's part and wait for the others'. What comes back is good until the next round but one."""
        wanted = (part_N.numel(), part_N.dtype)
        if wanted != self._views_of:
            self._views(*wanted)
        self._round = number = self._round + 1
        half = self._halves[number & 1]
        half.mine_N.copy_(part_N)
        counters = self._counters
        counters[self._mine_at] = number
        for at in self._peers_at:
            if counters[at] < number:
                self._wait(at, number)
        return half

    @torch.inference_mode(False)  # tensors made in inference mode could not be written outside of it
    def _views(self, count: int, dtype: torch.dtype) -> None:
        slots_HPN = self._slots_HPB.view(dtype)[:, :, :count]
        self._halves = tuple(_Half(all_PN[self._place], all_PN.unbind(0), all_PN) for all_PN in slots_HPN.unbind(0))
        self._views_of = (count, dtype)

    def _wait(self, at: int, number: int) -> None:
        """Spin, then yield, then sleep, then sleep on the peers' deaths, until the counter at `at` has come to `number`."""
        counters = self._counters
        began_ns = time.monotonic_ns()
        waited_ns = 0
        while counters[at] < number:
            if waited_ns < self._spin_ns:
                for _ in range(16):
                    if counters[at] >= number:
                        return
            elif waited_ns < _SLEEP_AFTER_NS:
                os.sched_yield()
            elif waited_ns < _WATCH_AFTER_NS:
                time.sleep(_SLEEP_S)
            elif dead := self._deaths.poll(_WATCH_MS):
                if counters[at] >= number:  # it came before somebody ended
                    return
                ended = {fd for fd, _ in dead}
                names = ", ".join(str(rank) for rank, pidfd in self._pidfds.items() if pidfd in ended)
                raise EngineFailure(f"rank {names} has ended during a collective of rank {self._ranks[self._place]}")
            elif waited_ns > _GIVE_UP_NS:
                late = self._ranks[at * 8 // _LINE - 1]
                raise EngineFailure(f"rank {self._ranks[self._place]} has waited {waited_ns / 1e9:.0f} s for rank {late}")
            waited_ns = time.monotonic_ns() - began_ns
