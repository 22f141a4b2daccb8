"""What carries the ranks' sums, and how fast: the group code that serves, timed. The only part that computes."""

import re
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch

from tpserve.config.sizes import size
from tpserve.doctor.hang import HangWatchdog
from tpserve.doctor.verdict import Verdict, duration
from tpserve.parallel.group import Group

SIZES = tuple(1 << power for power in (12, 16, 20, 24, 26))
TRIES_S = 0.2
ENOUGH_S = 0.5
"""A larger sum is not tried when one has taken this long."""
SUM_S = 15.0
"""What does not come back within this hangs: a size is at most sixteen times one that took `ENOUGH_S`."""
SLOW_TOKEN_S = 0.02
PROMPT, SLOW_PROMPT_S = 1000, 1.0
_CHANNEL = re.compile(r"Channel \d+(?:/\d+)? : (\d+)\[[^\]]*\] -> (\d+)\[[^\]]*\] (?:\[(?:send|receive)\] )?via (\S.*)")
_CARRIERS = (
    (re.compile(r"NET/.*GDRDMA"), "InfiniBand or RoCE, straight from the GPU (GDRDMA)"),
    (re.compile(r"NET/Socket"), "TCP (NET/Socket)"),
    (re.compile(r"NET/"), "InfiniBand or RoCE through host memory (NET without GDRDMA)"),
    (re.compile(r"P2P"), "GPU to GPU (P2P)"),
    (re.compile(r"SHM"), "host memory (SHM)"),
)


def measure(group: Group, dtype: torch.dtype, device: torch.device, limit: HangWatchdog, what: str) -> list[tuple[int, float]]:
    """Bytes and seconds of an all-reduce, by size. All ranks of the group call it, and all get the slowest one's times."""
    found = []
    for num_bytes in SIZES:
        x = torch.zeros(num_bytes // dtype.itemsize, dtype=dtype, device=device)
        with limit.of(f"{what} of {size(num_bytes)}", SUM_S):
            took_s = _slowest(group, _time(group, x, 1))
            if took_s <= ENOUGH_S:
                took_s = _slowest(group, _time(group, x, max(2, min(100, int(TRIES_S / took_s)))))
        found.append((num_bytes, took_s))
        if took_s > ENOUGH_S:
            break
    return found


def _time(group: Group, x: torch.Tensor, count: int) -> float:
    """Seconds each, of so many in a row."""
    _wait(x)
    begin_s = time.perf_counter()
    for _ in range(count):
        x = group.all_reduce(x)
    _wait(x)
    return (time.perf_counter() - begin_s) / count


def _wait(x: torch.Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)


def _slowest(group: Group, took_s: float) -> float:
    """The same for all ranks, who must try equally often."""
    return max(theirs[0] for theirs in group.all_gather_ints([int(took_s * 1e9) + 1])) / 1e9


def carriers(log: str) -> dict[str, int]:
    """What NCCL says that carries its channels, with the number of pairs of ranks that have it. Empty when it says nothing."""
    pairs = {(source, target, _carrier(via)) for source, target, via in _CHANNEL.findall(log)}
    return dict(Counter(carrier for _, _, carrier in pairs))


def _carrier(via: str) -> str:
    return next((name for pattern, name in _CARRIERS if pattern.match(via)), via)


def read_nccl(directory: Path) -> dict[str, int]:
    """The same, of the files that NCCL has written there."""
    return carriers("\n".join(path.read_text(errors="replace") for path in sorted(directory.glob("nccl*"))))


def judge_nccl(found: dict[str, int], nnodes: int) -> Verdict:
    """`found`: of all ranks. A group of one node has no reason to go over a network."""
    told = ", ".join(f"{name}: {count} pairs" for name, count in sorted(found.items()))
    if not told:
        return Verdict("good", "transport", "NCCL, which was not asked or did not say (NCCL_DEBUG is set, or it made no channel)")
    if any("TCP" in name for name in found):
        remedy = (
            "with InfiniBand or RoCE in these machines: NCCL_IB_HCA, IPC_LOCK and /dev/infiniband in the container, "
            "nvidia-peermem; without, keep -tp inside a node and put -pp across"
            if nnodes > 1
            else "ranks of one node speak TCP: is /dev/shm shared (--ipc=host), are NCCL_P2P_DISABLE or NCCL_SHM_DISABLE set?"
        )
        return Verdict("slow", "transport", told, remedy)
    if any("without GDRDMA" in name for name in found):
        return Verdict(
            "slow", "transport", told, "load nvidia-peermem (or use DMA-BUF) so that the network card reads GPU memory"
        )
    return Verdict("good", "transport", told)


def judge(what: str, times: Sequence[tuple[int, float]], ranks: int, sums: int, token_bytes: int) -> Verdict:
    """`sums`: so many a token waits for, one after the other, on its way through all stages; `token_bytes`: of each, its part."""
    (least, latency_s), (most, longest_s) = times[0], times[-1]
    token_s, prompt_s = sums * latency_s, sums * PROMPT * token_bytes * longest_s / most
    found = (
        f"{duration(latency_s)} for {size(least)}, {_rate(most, longest_s, ranks)} for {size(most)} (bus bandwidth, {ranks} "
        f"ranks); a token waits for {sums} of them, {duration(token_s)}, {PROMPT:,} of a prompt {duration(prompt_s)}"
    )
    if token_s > SLOW_TOKEN_S or prompt_s > SLOW_PROMPT_S:
        remedy = (
            "fewer ranks a stage (-tp) and more stages (-pp), above all across nodes; a faster network; nothing else on the cores"
        )
        return Verdict("slow", what, found, remedy)
    return Verdict("good", what, found)


def lines(times: Sequence[tuple[int, float]], ranks: int) -> list[tuple[str, str, str]]:
    """The table of sizes: size, time, bus bandwidth."""
    return [(size(n), duration(s), _rate(n, s, ranks)) for n, s in times]


def _rate(num_bytes: int, took_s: float, ranks: int) -> str:
    return f"{2 * (ranks - 1) / ranks * num_bytes / took_s / 1e9:.3g} GB/s"
