"""Times all-reduces with the server's own group code, and finds their transport in NCCL's log. The only check that computes."""

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
MEASURE_S = 0.2
"""Time to spend on each size."""
STOP_S = 0.5
"""No larger size is measured after an all-reduce that takes this long."""
ALL_REDUCE_LIMIT_S = 15.0
"""An all-reduce that takes longer hangs: a size is at most sixteen times the size before, which took less than `STOP_S`."""
SLOW_TOKEN_S = 0.02
PROMPT_TOKENS, SLOW_PROMPT_S = 1000, 1.0
_CHANNEL = re.compile(r"Channel \d+(?:/\d+)? : (\d+)\[[^\]]*\] -> (\d+)\[[^\]]*\] (?:\[(?:send|receive)\] )?via (\S.*)")
_CARRIERS = (
    (re.compile(r"NET/.*GDRDMA"), "InfiniBand or RoCE, straight from the GPU (GDRDMA)"),
    (re.compile(r"NET/Socket"), "TCP (NET/Socket)"),
    (re.compile(r"NET/"), "InfiniBand or RoCE through host memory (NET without GDRDMA)"),
    (re.compile(r"P2P"), "GPU to GPU (P2P)"),
    (re.compile(r"SHM"), "host memory (SHM)"),
)


def measure(group: Group, dtype: torch.dtype, device: torch.device, watchdog: HangWatchdog, step: str) -> list[tuple[int, float]]:
    """Time all-reduces of growing sizes. Returns bytes and seconds of each size.

    A collective: all ranks of the group call it, and all get the times of the slowest rank. `step`: the name in a hang's report.
    """
    times = []
    for num_bytes in SIZES:
        x = torch.zeros(num_bytes // dtype.itemsize, dtype=dtype, device=device)
        with watchdog.limit(f"{step} of {size(num_bytes)}", ALL_REDUCE_LIMIT_S):
            took_s = _slowest(group, _time(group, x, 1))
            if took_s <= STOP_S:
                took_s = _slowest(group, _time(group, x, max(2, min(100, int(MEASURE_S / took_s)))))
        times.append((num_bytes, took_s))
        if took_s > STOP_S:
            break
    return times


def _time(group: Group, x: torch.Tensor, count: int) -> float:
    """Mean seconds of an all-reduce, of `count` in a row."""
    _synchronize(x)
    begin_s = time.perf_counter()
    for _ in range(count):
        x = group.all_reduce(x)
    _synchronize(x)
    return (time.perf_counter() - begin_s) / count


def _synchronize(x: torch.Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)


def _slowest(group: Group, took_s: float) -> float:
    """The slowest rank's time, on all ranks, since all must run the same number of all-reduces."""
    return max(nanoseconds for (nanoseconds,) in group.all_gather_ints([int(took_s * 1e9) + 1])) / 1e9


def carriers(log: str) -> dict[str, int]:
    """The carriers of NCCL's channels in its log, with the number of pairs of ranks for each. Empty when the log names none."""
    pairs = {(source, target, _carrier(via)) for source, target, via in _CHANNEL.findall(log)}
    return dict(Counter(carrier for _, _, carrier in pairs))


def _carrier(via: str) -> str:
    return next((name for pattern, name in _CARRIERS if pattern.match(via)), via)


def read_nccl(directory: Path) -> dict[str, int]:
    """The carriers in the log files that NCCL has written into `directory`."""
    return carriers("\n".join(path.read_text(errors="replace") for path in sorted(directory.glob("nccl*"))))


def judge_nccl(found: dict[str, int], nnodes: int) -> Verdict:
    """The verdict on NCCL's transport. `found`: the carriers of all ranks. A group inside one node should not use a network."""
    text = ", ".join(f"{name}: {count} pairs" for name, count in sorted(found.items()))
    if not text:
        return Verdict("good", "transport", "NCCL; carriers unknown (NCCL_DEBUG is already set, or NCCL made no channel)")
    if any("TCP" in name for name in found):
        remedy = (
            "with InfiniBand or RoCE in these machines: NCCL_IB_HCA, IPC_LOCK and /dev/infiniband in the container, "
            "nvidia-peermem; without, keep -tp inside a node and put -pp across"
            if nnodes > 1
            else "ranks of one node use TCP: is /dev/shm shared (--ipc=host), are NCCL_P2P_DISABLE or NCCL_SHM_DISABLE set?"
        )
        return Verdict("slow", "transport", text, remedy)
    if any("without GDRDMA" in name for name in found):
        return Verdict(
            "slow", "transport", text, "load nvidia-peermem (or use DMA-BUF) so that the network card reads GPU memory"
        )
    return Verdict("good", "transport", text)


def judge(what: str, times: Sequence[tuple[int, float]], num_ranks: int, num_all_reduces: int, token_bytes: int) -> Verdict:
    """The verdict on the all-reduces of a group of `num_ranks`. `times`: bytes and seconds by size.

    `num_all_reduces`: those that a token waits for, one after another, through all stages. `token_bytes`: of one token in each.
    """
    (smallest, latency_s), (largest, longest_s) = times[0], times[-1]
    token_s, prompt_s = num_all_reduces * latency_s, num_all_reduces * PROMPT_TOKENS * token_bytes * longest_s / largest
    found = (
        f"{duration(latency_s)} for {size(smallest)}, {_rate(largest, longest_s, num_ranks)} for {size(largest)} "
        f"(bus bandwidth, {num_ranks} ranks); a token waits for {num_all_reduces} of them, {duration(token_s)}, "
        f"{PROMPT_TOKENS:,} of a prompt {duration(prompt_s)}"
    )
    if token_s > SLOW_TOKEN_S or prompt_s > SLOW_PROMPT_S:
        remedy = (
            "fewer ranks a stage (-tp) and more stages (-pp), above all across nodes; a faster network; nothing else on the cores"
        )
        return Verdict("slow", what, found, remedy)
    return Verdict("good", what, found)


def lines(times: Sequence[tuple[int, float]], num_ranks: int) -> list[tuple[str, str, str]]:
    """The rows of the table: size, time, bus bandwidth."""
    return [(size(num_bytes), duration(took_s), _rate(num_bytes, took_s, num_ranks)) for num_bytes, took_s in times]


def _rate(num_bytes: int, took_s: float, num_ranks: int) -> str:
    """The bus bandwidth as nccl-tests defines it."""
    return f"{2 * (num_ranks - 1) / num_ranks * num_bytes / took_s / 1e9:.3g} GB/s"
