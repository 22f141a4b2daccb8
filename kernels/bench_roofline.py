"""The time of each kernel against the roofline of the GPU: bytes over copy bandwidth, or operations over matmul rate.

    python kernels/bench_roofline.py --output roofline.json
    TRITON_INTERPRET=1 python kernels/bench_roofline.py --smoke --output roofline.json   # tiny, no GPU

--smoke only tries the program: its times mean nothing. Both limits are measured in the same run. Inputs are random (zeros run
too fast), and calls cycle through several sets of them, so that they come from memory and not from the cache. Each set is one
call in a captured CUDA graph, so the time contains no Python. Imports torch and triton only. Shapes are those of an 8B Llama,
whole or as one of eight ranks; windows are gpt-oss's, with its sinks, and latents those of one of DeepSeek V3's eight ranks.
"""

import argparse
import functools
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import triton

from tpserve_kernels import activation, attention, heads, norm
from tpserve_kernels.attention_plan import PagedRequests, plan_attention
from tpserve_kernels.cpu.qkv_heads import HeadNorms, Rotation

DTYPE = torch.bfloat16
HIDDEN, INTERMEDIATE, PAGE = 4096, 14336, 16
HEADS = (32, 8, 128)
RANK_HEADS = (4, 1, 128)
WINDOW_HEADS = (64, 8, 64)
LATENT_HEADS = (16, 1, 576)
LATENT = 512
COLD_BYTES = 256 << 20
MAX_SETS = 64

Call = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """A kernel at one shape: the minimum bytes and operations, and a function that makes a call with its own inputs."""

    kernel: str
    shape: str
    num_bytes: int
    num_flops: int
    make: Callable[[], Call]


@dataclass(frozen=True)
class Floor:
    """The rates that the GPU reaches in plain torch."""

    copy_gb_s: float
    matmul_tflop_s: float

    def us(self, case: Case) -> float:
        """The least time of a case, in microseconds."""
        return max(case.num_bytes / self.copy_gb_s / 1e3, case.num_flops / self.matmul_tflop_s / 1e6)


@dataclass(frozen=True)
class Row:
    """One row of the table."""

    kernel: str
    shape: str
    us: float
    gb_s: float
    tflop_s: float
    floor_us: float
    share_of_floor: float


def random(device: str, *shape: int) -> torch.Tensor:
    """Standard normal numbers in DTYPE."""
    return torch.randn(*shape, dtype=DTYPE, device=device)


def row_cases(device: str, num_rows: int) -> list[Case]:
    """The kernels that work row by row, on bfloat16."""
    num_heads, num_kv_heads, head_dim = HEADS
    num_qkv = (num_heads + 2 * num_kv_heads) * head_dim
    weight = random(device, HIDDEN)
    cos, sin = torch.rand(2, 4096, head_dim // 2, device=device)
    rotation = Rotation(torch.arange(num_rows, device=device) % 4096, cos, sin)
    norms = HeadNorms(weight[:head_dim], weight[:head_dim], 1e-5)
    slots = torch.randperm(-(-num_rows // PAGE) * PAGE, device=device)[:num_rows]

    def rms_norm() -> Call:
        x = random(device, num_rows, HIDDEN)
        return lambda: norm.rms_norm(x, weight, 1e-5)

    def add_rms_norm() -> Call:
        x, residual = random(device, num_rows, HIDDEN), random(device, num_rows, HIDDEN)
        return lambda: norm.add_rms_norm(x, residual, weight, 1e-5)

    def silu_mul() -> Call:
        x = random(device, num_rows, 2 * INTERMEDIATE)
        return lambda: activation.silu_mul(x)

    def place_heads() -> Call:
        packed = random(device, num_rows, num_heads + 2 * num_kv_heads, head_dim)
        q, k, v = packed.tensor_split((num_heads, num_heads + num_kv_heads), dim=1)
        k_cache, v_cache = (random(device, -(-num_rows // PAGE) * PAGE, num_kv_heads, head_dim) for _ in range(2))
        return lambda: heads.place_heads(q, k, v, k_cache, v_cache, slots, norms, rotation)

    row = 2 * num_rows
    return [
        Case("rms_norm", f"{num_rows} x {HIDDEN}", row * 2 * HIDDEN, 0, rms_norm),
        Case("add_rms_norm", f"{num_rows} x {HIDDEN}", row * 4 * HIDDEN, 0, add_rms_norm),
        Case("silu_mul", f"{num_rows} x 2 x {INTERMEDIATE}", row * 3 * INTERMEDIATE, 0, silu_mul),
        Case("place_heads", f"{num_rows} x {num_heads}+2x{num_kv_heads} x {head_dim}", row * 2 * num_qkv, 0, place_heads),
    ]


def attention_case(
    device: str,
    name: str,
    heads: tuple[int, int, int],
    requests: list[tuple[int, int]],
    latent: int | None = None,
    window: int | None = None,
) -> Case:
    """Paged attention of (query length, context length) requests whose blocks are in random order.

    `latent`: the values are this many channels of the keys. With a window there are sinks too.
    """
    num_heads, num_kv_heads, head_dim = heads
    query_lens, context_lens = zip(*requests, strict=True)
    num_blocks = [-(-context // PAGE) for context in context_lens]
    num_rows = sum(query_lens)
    starts = torch.tensor([0, *itertools.accumulate(query_lens)], dtype=torch.int32, device=device)
    contexts = torch.tensor(context_lens, dtype=torch.int32, device=device)
    table_rows = torch.arange(len(requests), dtype=torch.int32, device=device)

    def make() -> Call:
        tables = torch.zeros(len(requests), max(num_blocks), dtype=torch.int32, device=device)
        blocks = iter(torch.randperm(sum(num_blocks)).tolist())
        for table, count in zip(tables, num_blocks, strict=True):
            table[:count] = torch.tensor(list(itertools.islice(blocks, count)))
        q = random(device, num_rows, num_heads, head_dim)
        k_cache = random(device, sum(num_blocks), PAGE, num_kv_heads, head_dim)
        v_cache = torch.randn_like(k_cache) if latent is None else k_cache[..., :latent]
        where = PagedRequests(tables, table_rows, starts, contexts, num_rows, max(query_lens), window)
        plan = plan_attention(where, num_heads, v_cache)  # once for all layers: not a part of a call
        sinks = None if window is None else torch.randn(num_heads, device=device)
        return lambda: attention.paged_attention(q, k_cache, v_cache, plan, head_dim**-0.5, sinks_N=sinks)

    if window is None:
        pairs = sum(query * context - query * (query - 1) // 2 for query, context in requests)  # of row and position
        positions = sum(context_lens)
    else:
        pairs = sum(min(window, position + 1) for query, context in requests for position in range(context - query, context))
        positions = sum(min(context, query + window - 1) for query, context in requests)
    value_dim, cached_dim = (head_dim, 2 * head_dim) if latent is None else (latent, head_dim)
    num_bytes = 2 * (num_rows * num_heads * (head_dim + value_dim) + positions * num_kv_heads * cached_dim)
    return Case("paged_attention", name, num_bytes, 2 * pairs * num_heads * (head_dim + value_dim), make)


def cases(device: str, smoke: bool) -> list[Case]:
    """All cases of a run."""
    if smoke:
        requests = [(1, 20), (3, 5)]
        return [
            *row_cases(device, 2),
            attention_case(device, "smoke 4/2 heads of 16", (4, 2, 16), requests),
            attention_case(device, "smoke window of 7", (4, 2, 16), requests, window=7),
            attention_case(device, "smoke latents of 48", (4, 1, 48), requests, latent=32),
        ]
    return [
        *(case for num_rows in (1, 256, 8192) for case in row_cases(device, num_rows)),
        attention_case(device, "decode 1 at 8k", HEADS, [(1, 8192)]),
        attention_case(device, "decode 1 at 128k", HEADS, [(1, 131072)]),
        attention_case(device, "decode 64 at 1k with 1 at 128k", HEADS, [*[(1, 1024)] * 64, (1, 131072)]),
        attention_case(device, "decode 64 at 2k", HEADS, [(1, 2048)] * 64),
        attention_case(device, "decode 256 at 1k", HEADS, [(1, 1024)] * 256),
        attention_case(device, "decode 64 at 4k, 1 of 8 ranks", RANK_HEADS, [(1, 4096)] * 64),
        attention_case(device, "prefill 8k", HEADS, [(8192, 8192)]),
        attention_case(device, "prefill 2k after 14k", HEADS, [(2048, 16384)]),
        attention_case(device, "prefill 2k with decode 63 at 2k", HEADS, [(2048, 2048), *[(1, 2048)] * 63]),
        attention_case(device, "decode 64 at 2k, window of 128", WINDOW_HEADS, [(1, 2048)] * 64, window=128),
        attention_case(device, "prefill 8k, window of 128", WINDOW_HEADS, [(8192, 8192)], window=128),
        attention_case(device, "latents, decode 64 at 4k", LATENT_HEADS, [(1, 4096)] * 64, latent=LATENT),
        attention_case(device, "latents, decode 1 at 32k", LATENT_HEADS, [(1, 32768)], latent=LATENT),
        attention_case(device, "latents, prefill 2k", LATENT_HEADS, [(2048, 2048)], latent=LATENT),
    ]


def median_us(calls: list[Call], device: str, repeats: int = 20) -> float:
    """Median microseconds of one call, over `calls` in turn: replays of a CUDA graph, or one pass on the CPU."""
    for call in calls[:3]:
        call()  # compiles the kernel and warms the allocator
    if device == "cpu":
        began = time.perf_counter()
        for call in calls:
            call()
        return (time.perf_counter() - began) * 1e6 / len(calls)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        outputs = [call() for call in calls]  # referenced, so that no two outputs share memory
    event = functools.partial(torch.cuda.Event, enable_timing=True)
    times_ms: list[float] = []
    for _ in range(3 + repeats):
        begin, end = event(), event()
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times_ms.append(begin.elapsed_time(end))
    del outputs
    return statistics.median(times_ms[3:]) * 1e3 / len(calls)


def measure_floor(device: str, smoke: bool) -> Floor:
    """Measure copy bandwidth and matmul rate."""
    num_values, size = (1 << 10, 32) if smoke else (1 << 29, 8192)
    source, target = random(device, num_values), torch.empty(num_values, dtype=DTYPE, device=device)
    copy_us = median_us([lambda: target.copy_(source)], device)
    a, b = random(device, size, size), random(device, size, size)
    matmul_us = median_us([lambda: a @ b] * 4, device)
    return Floor(copy_gb_s=4 * num_values / copy_us / 1e3, matmul_tflop_s=2 * size**3 / matmul_us / 1e6)


def measure(case: Case, floor: Floor, device: str, smoke: bool) -> Row:
    """Time a case."""
    num_sets = 1 if smoke else min(MAX_SETS, 1 + COLD_BYTES // case.num_bytes)
    us = median_us([case.make() for _ in range(num_sets)], device)
    rates = (case.num_bytes / us / 1e3, case.num_flops / us / 1e6)
    return Row(case.kernel, case.shape, us, *rates, floor.us(case), floor.us(case) / us)


def main() -> None:
    """Measure, print the table and write it as JSON."""
    parser = argparse.ArgumentParser(description="Time every kernel against the roofline of the GPU.")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes; works in Triton's interpreter")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not (arguments.smoke and triton.knobs.runtime.interpret):
        parser.error("no CUDA device here; to try the program itself, set TRITON_INTERPRET=1 and give --smoke")
    say = sys.stdout.write
    name = torch.cuda.get_device_name() if device == "cuda" else "interpreter"
    floor = measure_floor(device, arguments.smoke)
    say(f"{name}: copy {floor.copy_gb_s:,.0f} GB/s, bfloat16 matmul {floor.matmul_tflop_s:,.0f} TFLOP/s\n")
    say(f"{'kernel':16} {'shape':32} {'us':>9} {'GB/s':>7} {'TFLOP/s':>8} {'floor us':>9} {'share':>6}\n")
    rows = []
    for case in cases(device, arguments.smoke):
        row = measure(case, floor, device, arguments.smoke)
        rows.append(row)
        say(f"{row.kernel:16} {row.shape:32} {row.us:9.1f} {row.gb_s:7,.0f} {row.tflop_s:8.1f} ")
        say(f"{row.floor_us:9.1f} {row.share_of_floor:6.0%}\n")
    versions = {"torch": torch.__version__, "triton": triton.__version__}
    report = {"device": name, **versions, **asdict(floor), "rows": [asdict(row) for row in rows]}
    arguments.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
