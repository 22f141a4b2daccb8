"""What scoring latents costs beside expanding them to keys and values of heads, in attention alone, one layer on the CPU.

    python -m tests.parity.bench_mla

Sizes of DeepSeek-V2-Lite, bfloat16, one thread; milliseconds of its time, the best of several. "latents": attention over
cached latents, with the products that bring queries into their space and values out of it. "expanded": attention over cached
keys and values of heads, with the product that makes them, once, of the chunk's latents.
"""

import time
from collections.abc import Callable

import torch

from tpserve.attention.metadata import AttentionMetadata
from tpserve.attention.paged import AttentionParams, KVLayout, attend, build_metadata
from tpserve.quant.grouped import per_head
from tpserve.quant.packed import pack_stack

HEADS, LATENT, PLAIN, ROTATED, VALUE = 16, 512, 128, 64, 128
BLOCK_SIZE = 16


def batch(context: int, rows: int) -> AttentionMetadata:
    """The last rows of one sequence."""
    table, none = torch.arange(context // BLOCK_SIZE).int().unsqueeze(0), torch.empty(0, dtype=torch.int64)
    return AttentionMetadata(torch.tensor([0, rows]).int(), torch.tensor([context]).int(), table, none, (rows,), (context,))


def attention(layout: KVLayout, dim: int, context: int, rows: int) -> Callable[[], torch.Tensor]:
    cache = layout.empty(context // BLOCK_SIZE, BLOCK_SIZE, torch.bfloat16, torch.device("cpu"))
    cache.k.normal_()
    cache.v.normal_()
    planned, q_TND = build_metadata(batch(context, rows), HEADS, cache), torch.randn(rows, HEADS, dim).bfloat16()
    return lambda: attend(q_TND, cache, planned, AttentionParams(0.07))


def best_ms(*steps: Callable[[], object]) -> float:
    times = []
    for _ in range(12):
        start = time.thread_time()
        for step in steps:
            step()
        times.append(time.thread_time() - start)
    return 1000 * min(times)


@torch.inference_mode()
def main() -> None:
    torch.set_num_threads(1)
    up = torch.randn(HEADS, PLAIN + VALUE, LATENT).bfloat16()
    key_up, value_up = pack_stack(up[:, :PLAIN].transpose(1, 2)), pack_stack(up[:, PLAIN:])
    print("| rows | context | latents | expanded |\n|---|---|---|---|")
    for rows, context in ((512, 512), (512, 2048), (512, 8192), (1, 2048), (1, 8192)):
        padded = -(-rows // 4) * 4
        q, taken = torch.randn(padded, HEADS, PLAIN).bfloat16(), torch.randn(padded, HEADS, LATENT).bfloat16()
        over_latents = attention(KVLayout(1, LATENT + ROTATED, LATENT, v_in_k=True), LATENT + ROTATED, context, rows)
        over_heads = attention(KVLayout(HEADS, PLAIN + ROTATED, VALUE), PLAIN + ROTATED, context, rows)
        absorbed = best_ms(over_latents, lambda: per_head(q, key_up), lambda: per_head(taken, value_up))  # noqa: B023
        expanded = best_ms(over_heads, lambda: taken[:, 0] @ up.flatten(0, 1).T)  # noqa: B023
        print(f"| {rows} | {context:,} | {absorbed:.1f} | {expanded:.1f} |")


if __name__ == "__main__":
    main()
