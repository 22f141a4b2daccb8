"""The draw of rows of logits: temperature, Gumbel noise and argmax in two launches, greedy rows among them.

What is drawn is documented in tpserve/sampler/draw.py: over blocks of 128 vocabulary ids, then inside the best block. The first
launch reads all logits and keeps of each block the largest one and an integer, the sum of its exponentials in units of 2^-44;
that is exact in any order. The second has one program per row. It makes float64 values of the blocks (LSE + noise), takes the
best block, and does the same for its 128 ids. Philox runs in registers (Salmon et al. 2011, doi:10.1145/2063384.2063405).

A row whose slot is negative pads a batch of a fixed size: it is not drawn, and nothing is read or written for it. Launches depend
on the numbers of rows and ids alone, so both can be captured in a CUDA graph.

Legend: S rows, V vocabulary ids of this rank, B blocks, P ranks, X slots, L positions of a slot.
"""

import torch
import triton
import triton.language as tl

from tpserve_kernels.arithmetic import (
    as_integer,
    as_integer_reference,
    exp32,
    exp32_reference,
    finish,
    finish_reference,
    log64,
    log64_reference,
)
from tpserve_kernels.cpu.head import BLOCK, LOWEST
from tpserve_kernels.philox import WORD, philox4x32
from tpserve_kernels.sampler_types import DrawTarget, Noise, RawLogits

BLOCKS_AT_ONCE = 32
"""Blocks per program of the first launch."""
PICKS_AT_ONCE = 32
"""Rows per program that picks among shards."""
SUM_ONE = 2.0**44
"""An exponential of 1 as an integer."""


def draw(logits: RawLogits, noise: Noise, target: DrawTarget) -> None:
    """Draw one token of each row, whose logits are here whole. Two launches.

    Errors: AssertionError when shapes, dtypes or layouts differ from what is said above.
    """
    _check(logits, noise, target)
    _draw(logits, noise, 0, target, None)


def best(logits: RawLogits, noise: Noise, first: int, slot_S: torch.Tensor | None = None) -> torch.Tensor:
    """The best value and token of each row in a vocabulary shard that begins at id `first`, a multiple of 128. Two launches.

    Returns [S, 2] float64: values that are comparable between the shards of a row, and tokens, which float64 holds exactly. The
    rows of padding are left as they were allocated. Errors: as of `draw`.
    """
    rows = len(logits.values_SV)
    best_S2 = torch.empty(rows, 2, dtype=torch.float64, device=logits.values_SV.device)
    assert first % BLOCK == 0
    target = DrawTarget(noise.position_S, slot_S)
    _check(logits, noise, target)
    _draw(logits, noise, first, target, best_S2)
    return best_S2


def pick(best_PS2: torch.Tensor, position_S: torch.Tensor, target: DrawTarget) -> None:
    """Write the token with the highest value among the shards of each row. One launch.

    `best_PS2`: what `best` gave each rank, in ascending order of ids: the first wins a tie. `position_S`: as of `Noise`.
    """
    ranks, rows, _ = best_PS2.shape
    assert best_PS2.dtype == torch.float64 and best_PS2.is_contiguous()
    slot_S, tokens_XL = _slots(target)
    _pick_kernel[(triton.cdiv(rows, PICKS_AT_ONCE),)](
        best_PS2, position_S, slot_S, target.out_S, tokens_XL, rows, ranks, tokens_XL.stride(0), SLOTS=target.slot_S is not None,
        STORED=target.tokens_XL is not None, RANKS=triton.next_power_of_2(ranks), ROWS=PICKS_AT_ONCE, num_warps=1,
        enable_fp_fusion=False,
    )  # fmt: skip


def best_reference(logits: RawLogits, noise: Noise, first: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The values [S] float64 and tokens [S] int64 of `best` in torch, bit for bit; with `first` 0 the tokens of `draw`."""
    x_SV = finish_reference(*logits)
    greedy_S = noise.temperature_S == 0
    scale_S1 = torch.where(greedy_S, 1.0, noise.temperature_S)[:, None]
    padded_SV = torch.nn.functional.pad(x_SV, (0, -x_SV.shape[1] % BLOCK), value=float("-inf"))
    x_SBE = padded_SV.view(len(x_SV), -1, BLOCK)
    top_SB = x_SBE.amax(dim=2)
    peak_SB = top_SB.clamp(min=LOWEST)
    sum_SB = as_integer_reference(exp32_reference((x_SBE - peak_SB[:, :, None]) / scale_S1[:, :, None]), SUM_ONE).sum(dim=2)
    log_SB = log64_reference(sum_SB.double() / SUM_ONE).masked_fill(sum_SB == 0, float("-inf"))
    block_B = torch.arange(top_SB.shape[1], device=x_SV.device) + first // BLOCK
    random_SB = peak_SB.double() / scale_S1.double() + log_SB + gumbel_reference(block_B[None], noise, level=0)
    value_S, block_S = torch.where(greedy_S[:, None], top_SB.double(), random_SB).max(dim=1)
    x_SE = x_SBE[torch.arange(len(x_SV), device=x_SV.device), block_S]
    id_SE = block_S[:, None] * BLOCK + torch.arange(BLOCK, device=x_SV.device)
    random_SE = x_SE.double() / scale_S1.double() + gumbel_reference(id_SE + first, noise, level=1)
    lane_S = torch.where(greedy_S[:, None], x_SE.double(), random_SE).argmax(dim=1)
    return value_S, block_S * BLOCK + lane_S + first


def gumbel_reference(id_SN: torch.Tensor, noise: Noise, level: int) -> torch.Tensor:
    """Standard Gumbel noise of ids, int64: float64 [S, N], -log(-log u), u the middle of one of 2**23 equal steps."""
    position_S1, choice_S1, seed_S1 = noise.position_S[:, None], noise.choice_S[:, None], noise.seed_S[:, None]
    counter = (id_SN, position_S1, choice_S1, torch.full_like(choice_S1, level))
    bits_SN = philox4x32(counter, (seed_S1 & WORD, (seed_S1 >> 32) & WORD))[0]
    return -log64_reference(-log64_reference(((bits_SN >> 9).double() + 0.5) * 2.0**-23))


def _check(logits: RawLogits, noise: Noise, target: DrawTarget) -> None:
    values_SV = logits.values_SV
    rows = len(values_SV)
    assert values_SV.stride(1) == 1 and values_SV.dtype in (torch.float32, torch.float16, torch.bfloat16)
    assert noise.temperature_S.dtype == torch.float32 and all(x.dtype == torch.int64 for x in noise[1:])
    of_rows = [*noise, target.out_S] + ([] if target.slot_S is None else [target.slot_S])
    assert all(x.shape == (rows,) and x.is_contiguous() for x in of_rows)
    assert target.slot_S is None or target.slot_S.dtype in (torch.int64, torch.int32)
    if target.tokens_XL is not None:
        assert target.slot_S is not None and target.tokens_XL.dtype == torch.int32 and target.tokens_XL.stride(1) == 1


def _slots(target: DrawTarget) -> tuple[torch.Tensor, torch.Tensor]:
    """The slots and tokens of a target, or any tensor in their place, which is not read."""
    slot_S = target.out_S if target.slot_S is None else target.slot_S
    return slot_S, target.out_S if target.tokens_XL is None else target.tokens_XL


def _draw(logits: RawLogits, noise: Noise, first: int, target: DrawTarget, best_S2: torch.Tensor | None) -> None:
    """Both launches: the best pairs of each row to `best_S2`, or without it tokens to `target`."""
    values_SV, scale, cap = logits
    rows, width = values_SV.shape
    num_blocks = triton.cdiv(width, BLOCK)
    top_SB = torch.empty(rows, num_blocks, device=values_SV.device)
    sum_SB = torch.empty(rows, num_blocks, dtype=torch.int64, device=values_SV.device)
    slot_S, tokens_XL = _slots(target)
    form = {"CAPPED": cap is not None, "SLOTS": target.slot_S is not None, "BLOCK": BLOCK, "SUM_ONE": SUM_ONE}
    cap = cap or 0.0
    _blocks_kernel[(triton.cdiv(rows * num_blocks, BLOCKS_AT_ONCE),)](
        values_SV, noise.temperature_S, slot_S, top_SB, sum_SB, values_SV.stride(0), rows, width, num_blocks, scale, cap,
        BLOCKS=BLOCKS_AT_ONCE, num_warps=8, enable_fp_fusion=False, **form,
    )  # fmt: skip
    interpreted = not isinstance(_draw_kernel, triton.JITFunction)  # it takes as long for one row as for several
    _draw_kernel[(triton.cdiv(rows, 16 if interpreted else 1),)](
        values_SV, top_SB, sum_SB, *noise, slot_S, target.out_S, tokens_XL, top_SB if best_S2 is None else best_S2,
        values_SV.stride(0), tokens_XL.stride(0), rows, width, num_blocks, first, scale, cap, STORED=target.tokens_XL is not None,
        SHARD=best_S2 is not None, INTERPRETED=interpreted, BLOCKS=triton.next_power_of_2(num_blocks), num_warps=8,
        enable_fp_fusion=False, **form,
    )  # fmt: skip


@triton.jit
def _slot(slot_ptr, row, rows, SLOTS: tl.constexpr):
    """The slot of each row; negative: the row is padding or beyond the last one."""
    slot = tl.where(row < rows, row, -1)
    if SLOTS:
        slot = tl.load(slot_ptr + row, mask=row < rows, other=-1).to(tl.int64)
    return slot


@triton.jit(do_not_specialize=["rows"])
def _blocks_kernel(
    logits_ptr, temperature_ptr, slot_ptr, top_ptr, sum_ptr, logits_stride, rows, width, num_blocks, scale, cap,
    CAPPED: tl.constexpr, SLOTS: tl.constexpr, SUM_ONE: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per BLOCKS blocks, row after row: the largest logit of each, and the sum of exponentials if any is random."""
    number = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    row = number // num_blocks
    mine = _slot(slot_ptr, row, rows, SLOTS) >= 0
    id = (number % num_blocks)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = mine[:, None] & (id < width)
    x = finish(tl.load(logits_ptr + row[:, None] * logits_stride + id, mask=inside, other=0.0), scale, cap, CAPPED)
    x = tl.where(inside, x, float("-inf"))
    top = tl.max(x, 1)
    tl.store(top_ptr + number, top, mask=mine)
    temperature = tl.load(temperature_ptr + row, mask=mine, other=0.0)
    if tl.max(temperature, 0) > 0:
        peak = tl.maximum(top, -3.4028234663852886e38)  # for a block of -inf
        divisor = tl.where(temperature == 0, 1.0, temperature)
        term = as_integer(exp32(tl.div_rn(x - peak[:, None], divisor[:, None])), SUM_ONE)
        tl.store(sum_ptr + number, tl.sum(term, 1), mask=mine)


@triton.jit
def _gumbel(id, seed, position, choice, LEVEL: tl.constexpr):
    """Standard Gumbel noise of each row's ids, float64."""
    zero = id * 0
    words = zero + position.to(tl.int32)[:, None], zero + choice.to(tl.int32)[:, None], zero + LEVEL
    bits, _, _, _ = tl.philox(seed[:, None], id, words[0], words[1], words[2])
    u = ((bits >> 9).to(tl.float64) + 0.5) * 1.1920928955078125e-07  # 2^-23
    return -log64(-log64(u))


@triton.jit
def _store_token(out_ptr, tokens_ptr, position_ptr, row, slot, tokens_stride, token, STORED: tl.constexpr):
    tl.store(out_ptr + row, token.to(out_ptr.dtype.element_ty), mask=slot >= 0)
    if STORED:
        position = tl.load(position_ptr + row, mask=slot >= 0, other=0)
        tl.store(tokens_ptr + slot * tokens_stride + position, token.to(tl.int32), mask=slot >= 0)


@triton.jit(do_not_specialize=["rows"])
def _draw_kernel(
    logits_ptr, top_ptr, sum_ptr, temperature_ptr, seed_ptr, position_ptr, choice_ptr, slot_ptr, out_ptr, tokens_ptr, best_ptr,
    logits_stride, tokens_stride, rows, width, num_blocks, first, scale, cap,
    CAPPED: tl.constexpr, SLOTS: tl.constexpr, STORED: tl.constexpr, SHARD: tl.constexpr, SUM_ONE: tl.constexpr,
    INTERPRETED: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per row, or per 16: the best block of each, and the best id of that."""
    ROWS: tl.constexpr = 16 if INTERPRETED else 1
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    slot = _slot(slot_ptr, row, rows, SLOTS)
    mine = slot >= 0
    temperature = tl.load(temperature_ptr + row, mask=mine, other=0.0)
    greedy = (temperature == 0)[:, None]
    divisor = tl.where(greedy, 1.0, temperature[:, None]).to(tl.float64)
    seed, choice = tl.load(seed_ptr + row, mask=mine, other=0), tl.load(choice_ptr + row, mask=mine, other=0)
    position = tl.load(position_ptr + row, mask=mine, other=0)
    some_random = tl.max(temperature, 0) > 0

    block = tl.arange(0, BLOCKS)[None, :]
    at = row[:, None] * num_blocks + block
    known = mine[:, None] & (block < num_blocks)
    top = tl.load(top_ptr + at, mask=known, other=float("-inf"))
    value = top.to(tl.float64)
    if some_random:
        total = tl.load(sum_ptr + at, mask=known, other=0)
        log = tl.where(total == 0, float("-inf"), log64(total.to(tl.float64) * (1.0 / SUM_ONE)))
        peak = tl.maximum(top, -3.4028234663852886e38).to(tl.float64)
        random = peak / divisor + log + _gumbel(first // BLOCK + block, seed, position, choice, 0)
        value = tl.where(greedy, value, random)
    highest, best = tl.max(value, 1, return_indices=True)

    start = tl.minimum(best, num_blocks - 1) * BLOCK  # NaN among the logits might lead elsewhere
    id = start[:, None] + tl.arange(0, BLOCK)[None, :]
    inside = mine[:, None] & (id < width)
    x = finish(tl.load(logits_ptr + row[:, None] * logits_stride + id, mask=inside, other=0.0), scale, cap, CAPPED)
    inner = tl.where(inside, x, float("-inf")).to(tl.float64)
    if some_random:
        inner = tl.where(greedy, inner, inner / divisor + _gumbel(first + id, seed, position, choice, 1))
    _, lane = tl.max(inner, 1, return_indices=True)
    token = first + tl.minimum(start + lane, width - 1)
    if SHARD:
        tl.store(best_ptr + row * 2, highest, mask=mine)
        tl.store(best_ptr + row * 2 + 1, token.to(tl.float64), mask=mine)
    else:
        _store_token(out_ptr, tokens_ptr, position_ptr, row, slot, tokens_stride, token, STORED)


@triton.jit(do_not_specialize=["rows"])
def _pick_kernel(
    best_ptr, position_ptr, slot_ptr, out_ptr, tokens_ptr, rows, ranks, tokens_stride,
    SLOTS: tl.constexpr, STORED: tl.constexpr, RANKS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One program per ROWS rows."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    slot = _slot(slot_ptr, row, rows, SLOTS)
    mine, rank = slot >= 0, tl.arange(0, RANKS)[None, :]
    value = tl.load(best_ptr + (rank * rows + row[:, None]) * 2, mask=mine[:, None] & (rank < ranks), other=float("-inf"))
    _, winner = tl.max(value, 1, return_indices=True)
    token = tl.load(best_ptr + (tl.minimum(winner, ranks - 1) * rows + row) * 2 + 1, mask=mine, other=0.0).to(tl.int64)
    _store_token(out_ptr, tokens_ptr, position_ptr, row, slot, tokens_stride, token, STORED)
