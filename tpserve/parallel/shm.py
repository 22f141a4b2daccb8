"""All-reduce and all-gather of CPU tensors between the ranks of one host, through shared memory (the page).

Owns the page, its setup and the waits in it; knows no model and no process group. The page is anonymous (memfd): it has no name
in any file system, and the kernel frees it with the last process that maps it, however that process ends.

Layout: a token, then one counter per rank on its own cache line, then two halves with one slot per rank. In round n a rank
writes its part to its slot of half n % 2, sets its counter to n, waits until every counter is at least n, and reads all slots.
No second wait is needed: a rank that writes half n % 2 again, in round n + 2, has seen all counters at n + 1, and a rank sets
n + 1 only after it has read round n. A tensor larger than a slot takes several rounds, one per part.

This relies on the memory order of x86: stores become visible in program order, loads are in program order, and an aligned
counter is written and read whole. Other processors guarantee less, so they get no page.

A waiting rank sees a peer's death through its pidfd, asks whether the epoch is over, and raises PeerLost.

Sums of float32, bfloat16 and int32 are the CPU library's where it is there (kernels/cpu/all_reduce.h), by the same protocol and
with the same bits, so that ranks with and without it work together; what it has not got, and long waits, are done here.
"""

import mmap
import os
import platform
import secrets
import select
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
from torch._C._distributed_c10d import Store  # torch.distributed has it without its types

from tpserve.errors import PeerLost
from tpserve.parallel.store import gather
from tpserve_kernels.cpu.all_reduce import Page, all_reduce_args
from tpserve_kernels.cpu.library import SUM_DTYPES, Operation, calls_of, library

SLOT_BYTES = 1 << 20
"""The largest part of a tensor in one round; the parts of two ranks fit a core's cache."""
_LINE = 64
_SPIN_NS = 10_000
"""Short: while this rank spins, a peer that needs this core cannot run, and a yield on an idle core costs almost nothing."""
_SLEEP_AFTER_NS = 1_000_000
_WATCH_AFTER_NS = 5_000_000
_SLEEP_S = 50e-6
_WATCH_MS = 1
_GIVE_UP_NS = 600 * 10**9
"""The same timeout as the backend's collectives: peers may compile kernels or read weights."""


class RankLocation(NamedTuple):
    """Where a rank runs. Ranks with equal `host` have one kernel and one pid namespace, so each can use the other's pid."""

    host: str
    pid: int


class _Half(NamedTuple):
    """Views of one half of the page for tensors of N elements: this rank's slot, every rank's slot, and all in one tensor."""

    local_N: torch.Tensor
    parts: tuple[torch.Tensor, ...]
    all_PN: torch.Tensor


def exchange_locations(
    store: Store, rank: int, world_size: int, timeout_s: float, is_over: Callable[[], bool] = lambda: False
) -> list[RankLocation]:
    """The location of every rank of the world. All ranks call this. Errors as of `store.gather`."""
    values = gather(store, "place", rank, range(world_size), f"{_host()} {os.getpid()}".encode(), timeout_s, is_over)
    return [RankLocation(host, int(pid)) for host, pid in (each.decode().split() for each in values)]


def create_shm_group(
    store: Store,
    locations: Sequence[RankLocation],
    ranks: Sequence[int],
    rank: int,
    cores: int,
    timeout_s: float,
    is_over: Callable[[], bool] = lambda: False,
) -> "ShmAllReduce | str":
    """Map one page for the group `ranks`, of which this rank is `rank`. Either all of them get it, or all get the reason why not.

    `store` must be new for these ranks. `locations`: of all ranks of the world. `cores`: the number of cores that the ranks of
    this host share; with fewer cores than ranks no rank spins. `is_over`: whether the epoch is over, which ends waits. PeerLost
    when a rank does not come within `timeout_s`.
    """
    if len({locations[i].host for i in ranks}) > 1:
        return "the ranks do not share a host"
    if platform.machine() not in ("x86_64", "AMD64"):
        return f"not on {platform.machine()}, which may reorder memory accesses"
    name = f"page{ranks[0]}"
    size = _header_bytes(len(ranks)) + 2 * len(ranks) * SLOT_BYTES
    memory, pidfds, reason, published = None, [], "", False
    with ExitStack() as created, ExitStack() as watches:
        try:
            if rank == ranks[0]:
                fd, memory = _create(size)
                created.callback(os.close, fd)  # after every rank has mapped it or has failed
                store.set(name, f"{fd} {memory[:_LINE].decode()}")
                published = True
            else:
                memory = _open(locations[ranks[0]].pid, *_read(store, name, timeout_s).split())
            for i in ranks:
                pidfds.append(os.pidfd_open(locations[i].pid) if i != rank else -1)
                watches.callback(_close, pidfds[-1:])
        except OSError as error:
            reason = f"rank {rank}: {error}"
            if rank == ranks[0] and not published:
                store.set(name, "-1 -")  # no rank can open this, so the others fail at once
        reasons = gather(store, f"{name}.", rank, ranks, reason.encode(), timeout_s, is_over)
        if any(reasons):
            return next(filter(None, reasons)).decode()
        watches.pop_all()
    assert memory is not None
    local_ranks = sum(location.host == locations[rank].host for location in locations)
    return ShmAllReduce(memory, ranks, ranks.index(rank), pidfds, spins=cores >= local_ranks, is_over=is_over)


def _host() -> str:
    """An id of this kernel boot and pid namespace."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{Path('/proc/self/ns/pid').stat().st_ino}"
    except OSError:
        return secrets.token_hex(8)  # unknown, so it equals no other rank's host


def _read(store: Store, key: str, timeout_s: float) -> str:
    store.wait([key], timedelta(seconds=timeout_s))
    return store.get(key).decode()


def _create(size: int) -> tuple[int, mmap.mmap]:
    """A zeroed page with a token at its start, and its file descriptor. OSError when there is not enough memory.

    The memory is allocated now: later, a shortage would kill the process.
    """
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
    """Map the page of another process. OSError when it is not accessible or has another token (a process of a cloned host)."""
    own_fd = os.open(f"/proc/{pid}/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
    try:
        if os.pread(own_fd, _LINE, 0) != token.encode():
            raise OSError(f"process {pid} is not the rank it should be")
        return mmap.mmap(own_fd, 0)
    finally:
        os.close(own_fd)


def _header_bytes(size: int) -> int:
    """Bytes of the token and `size` counters, in whole memory pages."""
    return -(-(1 + size) * _LINE // mmap.PAGESIZE) * mmap.PAGESIZE


def _close(pidfds: Sequence[int]) -> None:
    for pidfd in pidfds:
        if pidfd >= 0:
            os.close(pidfd)


class ShmAllReduce:
    """One rank's view of the page. `ranks`: the global ranks of the group. `index`: this rank's index in `ranks`.

    `pidfds`: of the peers, -1 for this rank; this object owns them. All ranks make the same calls in the same order, with equal
    shapes and dtypes. `page`: for sums inside a list of native operations (`all_reduce_args`, `Library.run_calls`), whose
    long waits `watch` takes over. `spins`: whether waits here may spin; for those of the library see `Library.allow_spinning`.
    """

    def __init__(
        self,
        memory: mmap.mmap,
        ranks: Sequence[int],
        index: int,
        pidfds: Sequence[int],
        *,
        spins: bool,
        is_over: Callable[[], bool] = lambda: False,
    ) -> None:
        size = len(ranks)
        self._is_over = is_over
        self._ranks = tuple(ranks)
        self._index = index
        self._counters = memoryview(memory).cast("q")
        self._own_counter = (1 + index) * _LINE // 8
        self._peer_counters = tuple((1 + i) * _LINE // 8 for i in range(size) if i != index)
        self._slots_HPB = torch.frombuffer(memory, dtype=torch.uint8, offset=_header_bytes(size)).view(2, size, SLOT_BYTES)
        self._pidfds = dict(zip(self._ranks, pidfds, strict=True))
        self._deaths = select.poll()
        for pidfd in pidfds:
            if pidfd >= 0:
                self._deaths.register(pidfd, select.POLLIN)
        self._spin_ns = _SPIN_NS if spins else 0
        counters, slots = torch.frombuffer(memory, dtype=torch.uint8, offset=_LINE).data_ptr(), self._slots_HPB.data_ptr()
        self.page = Page(counters, slots, SLOT_BYTES, 0, 0, 0, size, index)
        self._watched_round, self._watched_since_ns = 0, 0
        self._views_key: tuple[int, torch.dtype] | None = None
        self._halves: tuple[_Half, ...] = ()

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of `x` over the ranks, in rank order, each step rounded to the dtype of `x`. May overwrite `x`; use the result.

        PeerLost when a peer has ended, the epoch is over, or a peer does not come within ten minutes.
        """
        x = x.contiguous()
        lib = library()
        if lib is not None and x.dtype in SUM_DTYPES:
            arguments = all_reduce_args(self.page, x.view(1, -1))
            lib.run_calls(calls_of((Operation.ALL_REDUCE, arguments)), self.watch)
            return x
        for part_N in self._parts(x):
            first_N, second_N, *others = self._exchange(part_N).parts
            torch.add(first_N, second_N, out=part_N)
            for other_N in others:
                part_N.add_(other_N)
        return x

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """Stack the ranks' tensors, in rank order: [size, *x.shape]. Errors as of `all_reduce`."""
        out = x.new_empty((len(self._ranks), *x.shape))
        out_PN = out.view(len(self._ranks), x.numel())
        done = 0
        for part_N in self._parts(x.contiguous()):
            end = done + part_N.numel()
            out_PN[:, done:end].copy_(self._exchange(part_N).all_PN)
            done = end
        return out

    def close(self) -> None:
        """Close the pidfds. The memory is freed with the last tensor that uses it."""
        _close(tuple(self._pidfds.values()))
        self._pidfds = {}

    @staticmethod
    def _parts(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """A contiguous tensor, flattened, in parts that fit a slot; no part for an empty tensor."""
        flat_N = x.view(-1)
        if x.nbytes <= SLOT_BYTES:
            return (flat_N,) if x.nbytes else ()
        step = SLOT_BYTES // x.element_size()
        return tuple(flat_N[start : start + step] for start in range(0, flat_N.numel(), step))

    def _exchange(self, part_N: torch.Tensor) -> _Half:
        """One round: publish this rank's part and wait for the others. The result is valid until the round after the next."""
        key = (part_N.numel(), part_N.dtype)
        if key != self._views_key:
            self._make_views(*key)
        number: int = self.page.round + 1
        self.page.round = number
        half = self._halves[number & 1]
        half.local_N.copy_(part_N)
        counters = self._counters
        counters[self._own_counter] = number
        for at in self._peer_counters:
            if counters[at] < number:
                self._wait(at, number)
        return half

    @torch.inference_mode(False)  # inference-mode tensors are read-only outside of it
    def _make_views(self, count: int, dtype: torch.dtype) -> None:
        slots_HPN = self._slots_HPB.view(dtype)[:, :, :count]
        self._halves = tuple(_Half(all_PN[self._index], all_PN.unbind(0), all_PN) for all_PN in slots_HPN.unbind(0))
        self._views_key = (count, dtype)

    def _wait(self, at: int, number: int) -> None:
        """Spin, then yield, then sleep, then watch, until the counter at index `at` reaches `number`."""
        counters = self._counters
        start_ns = time.monotonic_ns()
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
            else:
                self.watch()
            waited_ns = time.monotonic_ns() - start_ns

    def watch(self) -> None:
        """Wait up to a millisecond more for the present round, which some peer has not published yet.

        PeerLost when a peer has ended without it, when the epoch is over, or after ten minutes.
        """
        number, now_ns = self.page.round, time.monotonic_ns()
        if self._watched_round != number:
            self._watched_round, self._watched_since_ns = number, now_ns
        dead = self._deaths.poll(_WATCH_MS)
        late = [at for at in self._peer_counters if self._counters[at] < number]
        if dead and late:  # else all peers published their parts before one ended
            ended = {fd for fd, _ in dead}
            names = ", ".join(str(rank) for rank, pidfd in self._pidfds.items() if pidfd in ended)
            raise PeerLost(f"rank {names} has ended during a collective of rank {self._ranks[self._index]}")
        if late and self._is_over():
            raise PeerLost(f"the epoch of rank {self._ranks[self._index]} is over")
        waited_ns = now_ns - self._watched_since_ns
        if late and waited_ns > _GIVE_UP_NS:
            late_rank = self._ranks[late[0] * 8 // _LINE - 1]
            raise PeerLost(f"rank {self._ranks[self._index]} has waited {waited_ns / 1e9:.0f} s for rank {late_rank}")
