"""What changes single logits of whole rows before a truncation, in place: masks, bias, penalties. One launch each.

Their order and their sense are those of tpserve/sampler/filters.py, whose functions in torch are the specification; the
`*_reference` functions here say the same of one row after the other.

Legend: R rows, V vocabulary ids, G rows with a grammar of W words of 32 bits, N (row, id) pairs, M banned words of E ids before
the last, P rows with penalties, X slots, L positions. Logits are float32 [R, V], the values of a row adjacent. What belongs to
row r of pairs or words is [ends_R[r - 1], ends_R[r]).
"""

import torch
import triton
import triton.language as tl

from tpserve_kernels.sampler_types import Sequences

AT_ONCE = 4096
"""Logits that a program reads at once."""
IDS_AT_ONCE = 1024
"""Tokens or pairs that a program reads at once."""
WORDS_AT_ONCE = 128
"""Banned words that a program reads at once."""
OUT = float("-inf")


def mask_bits(logits_RV: torch.Tensor, row_G: torch.Tensor, bits_GW: torch.Tensor) -> None:
    """Ids of the rows `row_G`, int64, whose bits are not set become -inf.

    Id i is bit i % 32 of word i // 32 of `bits_GW`, int32, the words of a row adjacent.
    """
    width = logits_RV.shape[1]
    _check(logits_RV)
    assert bits_GW.dtype == torch.int32 and bits_GW.stride(1) == 1 and bits_GW.shape[1] * 32 >= width
    _mask_bits_kernel[(len(row_G), triton.cdiv(width, AT_ONCE))](
        logits_RV,
        row_G,
        bits_GW,
        logits_RV.stride(0),
        bits_GW.stride(0),
        width,
        BLOCK=AT_ONCE,
        num_warps=8,
        enable_fp_fusion=False,
    )


def mask_bits_reference(logits_RV: torch.Tensor, row_G: torch.Tensor, bits_GW: torch.Tensor) -> None:
    """`mask_bits` in torch."""
    bit_B = torch.arange(32, dtype=torch.int32, device=bits_GW.device)
    allowed_GV = (bits_GW[:, :, None] >> bit_B & 1).flatten(1)[:, : logits_RV.shape[1]].bool()
    logits_RV[row_G] = logits_RV[row_G].masked_fill(~allowed_GV, OUT)


def allow(logits_RV: torch.Tensor, id_N: torch.Tensor, ends_R: torch.Tensor) -> None:
    """All but the ids of its pairs, int64, become -inf in each row that has pairs, unless nothing would be left."""
    _check(logits_RV)
    kept_N = torch.empty(len(id_N), device=logits_RV.device)
    _allow_kernel[(len(logits_RV),)](
        logits_RV, id_N, ends_R, kept_N, logits_RV.stride(0), logits_RV.shape[1], BLOCK=AT_ONCE, IDS=IDS_AT_ONCE, num_warps=8,
        enable_fp_fusion=False,
    )  # fmt: skip


def allow_reference(logits_RV: torch.Tensor, id_N: torch.Tensor, ends_R: torch.Tensor) -> None:
    """`allow` in torch."""
    for row, (start, end) in enumerate(_spans(ends_R)):
        masked_V = torch.full_like(logits_RV[row], OUT)
        masked_V[id_N[start:end]] = logits_RV[row, id_N[start:end]]
        if start < end and masked_V.max() > OUT:
            logits_RV[row] = masked_V


def ban(
    logits_RV: torch.Tensor,
    last_M: torch.Tensor,
    prefix_ME: torch.Tensor,
    length_M: torch.Tensor,
    ends_R: torch.Tensor,
    sequences: Sequences,
) -> None:
    """The last id of each word becomes -inf where the output ends with the ids before it, unless nothing would be left of a row.

    `prefix_ME`: int32, contiguous, the ids before the last, right-aligned, `length_M` of them; `last_M`, `length_M`: int64.
    """
    _check(logits_RV)
    tokens_XL, slot_R, position_R, prompt_R = sequences
    assert prefix_ME.dtype == torch.int32 and prefix_ME.is_contiguous()
    before_M = torch.empty(len(last_M), device=logits_RV.device)
    _ban_kernel[(len(logits_RV),)](
        logits_RV, last_M, prefix_ME, length_M, ends_R, tokens_XL, slot_R, position_R, prompt_R, before_M, logits_RV.stride(0),
        tokens_XL.stride(0), logits_RV.shape[1], prefix_ME.shape[1], BLOCK=AT_ONCE, WORDS=WORDS_AT_ONCE, num_warps=8,
        enable_fp_fusion=False,
    )  # fmt: skip


def ban_reference(
    logits_RV: torch.Tensor,
    last_M: torch.Tensor,
    prefix_ME: torch.Tensor,
    length_M: torch.Tensor,
    ends_R: torch.Tensor,
    sequences: Sequences,
) -> None:
    """`ban` in torch."""
    for row, (start, end) in enumerate(_spans(ends_R)):
        _, output = sequences.ids(row)
        masked_V = logits_RV[row].clone()
        for word in range(start, end):
            length = int(length_M[word])
            prefix = prefix_ME[word].tolist()[prefix_ME.shape[1] - length :]
            if len(output) >= length and output[len(output) - length :] == prefix:
                masked_V[last_M[word]] = OUT
        if masked_V.max() > OUT:
            logits_RV[row] = masked_V


def add_bias(logits_RV: torch.Tensor, row_N: torch.Tensor, id_N: torch.Tensor, value_N: torch.Tensor, first: int = 0) -> None:
    """Add float32 values to (row, id) pairs, int64; no pair occurs twice. `first`: the id of column 0; others are left out."""
    _check(logits_RV)
    _bias_kernel[(triton.cdiv(len(row_N), IDS_AT_ONCE),)](
        logits_RV, row_N, id_N, value_N, logits_RV.stride(0), len(row_N), first, logits_RV.shape[1], BLOCK=IDS_AT_ONCE,
        num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip


def add_bias_reference(
    logits_RV: torch.Tensor, row_N: torch.Tensor, id_N: torch.Tensor, value_N: torch.Tensor, first: int = 0
) -> None:
    """`add_bias` in torch."""
    inside_N = (id_N >= first) & (id_N < first + logits_RV.shape[1])
    logits_RV[row_N[inside_N], id_N[inside_N] - first] += value_N[inside_N]


def penalize(
    logits_RV: torch.Tensor,
    row_P: torch.Tensor,
    presence_P: torch.Tensor,
    frequency_P: torch.Tensor,
    repetition_P: torch.Tensor,
    sequences: Sequences,
    first: int = 0,
) -> None:
    """Lower the logits of ids that the sequences of the rows `row_P`, int64, have already; penalties float32.

    `first`: the id of column 0.

    Each program counts the ids of its own part of the vocabulary in the sequence. Counts kept from step to step would have to
    follow drawn tokens, preemptions, recoveries and known tokens that are drawn again. The tokens are there in any case, and
    most sequences are shorter to read than the counts of a vocabulary.
    """
    _check(logits_RV)
    tokens_XL, slot_R, position_R, prompt_R = sequences
    _penalize_kernel[(len(row_P), triton.cdiv(logits_RV.shape[1], AT_ONCE))](
        logits_RV, row_P, presence_P, frequency_P, repetition_P, tokens_XL, slot_R, position_R, prompt_R, logits_RV.stride(0),
        tokens_XL.stride(0), first, logits_RV.shape[1], BLOCK=AT_ONCE, IDS=IDS_AT_ONCE, num_warps=8, enable_fp_fusion=False,
    )  # fmt: skip


def penalize_reference(
    logits_RV: torch.Tensor,
    row_P: torch.Tensor,
    presence_P: torch.Tensor,
    frequency_P: torch.Tensor,
    repetition_P: torch.Tensor,
    sequences: Sequences,
    first: int = 0,
) -> None:
    """`penalize` in torch."""
    for row, presence, frequency, repetition in zip(row_P.tolist(), presence_P, frequency_P, repetition_P, strict=True):
        x_V = logits_RV[row]
        ids = range(first, first + len(x_V))
        prompt, output = ([id - first for id in each if id in ids] for each in sequences.ids(row))
        count_V = torch.bincount(torch.tensor(output, dtype=torch.int64), minlength=len(x_V)).to(x_V.device)
        seen_V = torch.zeros_like(count_V, dtype=torch.bool)
        seen_V[torch.tensor(prompt + output, dtype=torch.int64)] = True
        x_V = torch.where(seen_V, torch.where(x_V > 0, x_V / repetition, x_V * repetition), x_V)
        logits_RV[row] = x_V - frequency * count_V - presence * (count_V > 0)


def _check(logits_RV: torch.Tensor) -> None:
    assert logits_RV.dtype == torch.float32 and logits_RV.stride(1) == 1


def _spans(ends_R: torch.Tensor) -> list[tuple[int, int]]:
    ends = ends_R.tolist()
    return list(zip([0, *ends], ends, strict=False))


@triton.jit
def _mask_bits_kernel(logits_ptr, row_ptr, bits_ptr, logits_stride, bits_stride, width, BLOCK: tl.constexpr):
    """One program per BLOCK ids of one row."""
    number = tl.program_id(0).to(tl.int64)
    row = tl.load(row_ptr + number)
    id = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    bits = tl.load(bits_ptr + number * bits_stride + id // 32, mask=id < width, other=-1)
    tl.store(logits_ptr + row * logits_stride + id, float("-inf"), mask=(id < width) & (((bits >> (id % 32)) & 1) == 0))


@triton.jit
def _start(ends_ptr, row):
    """Where the pairs or words of a row begin."""
    return tl.load(ends_ptr + row - 1, mask=row > 0, other=0)


@triton.jit
def _largest(row_ptr, width, BLOCK: tl.constexpr):
    """The largest logit of a row."""
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    for at in range(0, width, BLOCK):
        id = at + tl.arange(0, BLOCK)
        best = tl.maximum(best, tl.load(row_ptr + id, mask=id < width, other=float("-inf")))
    return tl.max(best, 0)


@triton.jit
def _allow_kernel(logits_ptr, id_ptr, ends_ptr, kept_ptr, logits_stride, width, BLOCK: tl.constexpr, IDS: tl.constexpr):
    """One program per row: keeps the logits of the allowed ids, fills the row with -inf, puts them back."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * logits_stride
    start, end = _start(ends_ptr, row), tl.load(ends_ptr + row)
    best = tl.full((IDS,), float("-inf"), tl.float32)
    for at in range(start, end, IDS):
        pair = at + tl.arange(0, IDS)
        id = tl.load(id_ptr + pair, mask=pair < end, other=0)
        x = tl.load(row_ptr + id, mask=pair < end, other=float("-inf"))
        tl.store(kept_ptr + pair, x, mask=pair < end)
        best = tl.maximum(best, x)
    if tl.max(best, 0) > float("-inf"):
        tl.debug_barrier()  # other threads read and write the same logits
        for at in range(0, width, BLOCK):
            id = at + tl.arange(0, BLOCK)
            tl.store(row_ptr + id, float("-inf"), mask=id < width)
        tl.debug_barrier()
        for at in range(start, end, IDS):
            pair = at + tl.arange(0, IDS)
            id = tl.load(id_ptr + pair, mask=pair < end, other=0)
            tl.store(row_ptr + id, tl.load(kept_ptr + pair, mask=pair < end, other=0.0), mask=pair < end)


@triton.jit
def _complete(word, end, prefix_ptr, length_ptr, own_ptr, position, prompt, longest):
    """Which words the output ends with, but for the last id of each."""
    length = tl.load(length_ptr + word, mask=word < end, other=0)
    same = (word < end) & (position - length >= prompt)
    for back in range(1, longest + 1):
        token = tl.load(own_ptr + tl.maximum(position - back, 0))
        same = same & (
            (token == tl.load(prefix_ptr + word * longest + longest - back, mask=word < end, other=0)) | (length < back)
        )
    return same


@triton.jit(do_not_specialize=["longest"])
def _ban_kernel(
    logits_ptr, last_ptr, prefix_ptr, length_ptr, ends_ptr, tokens_ptr, slot_ptr, position_ptr, prompt_ptr, before_ptr,
    logits_stride, tokens_stride, width, longest, BLOCK: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """One program per row: notes the logits of its words, sets those that are complete to -inf, puts all back if none is left."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * logits_stride
    start, end = _start(ends_ptr, row), tl.load(ends_ptr + row)
    if start < end:
        own_ptr = tokens_ptr + tl.load(slot_ptr + row) * tokens_stride
        position, prompt = tl.load(position_ptr + row), tl.load(prompt_ptr + row)
        for at in range(start, end, WORDS):
            word = at + tl.arange(0, WORDS)
            last = tl.load(last_ptr + word, mask=word < end, other=0)
            tl.store(before_ptr + word, tl.load(row_ptr + last, mask=word < end, other=0.0), mask=word < end)
        tl.debug_barrier()  # words may share their last id
        for at in range(start, end, WORDS):
            word = at + tl.arange(0, WORDS)
            last = tl.load(last_ptr + word, mask=word < end, other=0)
            complete = _complete(word, end, prefix_ptr, length_ptr, own_ptr, position, prompt, longest)
            tl.store(row_ptr + last, float("-inf"), mask=complete)
        tl.debug_barrier()
        if _largest(row_ptr, width, BLOCK) == float("-inf"):
            tl.debug_barrier()
            for at in range(start, end, WORDS):
                word = at + tl.arange(0, WORDS)
                last = tl.load(last_ptr + word, mask=word < end, other=0)
                tl.store(row_ptr + last, tl.load(before_ptr + word, mask=word < end, other=0.0), mask=word < end)


@triton.jit(do_not_specialize=["pairs"])
def _bias_kernel(
    logits_ptr, row_ptr, id_ptr, value_ptr, logits_stride, pairs, first_id, width, BLOCK: tl.constexpr
):  # fmt: skip
    """One program per BLOCK pairs."""
    pair = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(row_ptr + pair, mask=pair < pairs, other=0)
    column = tl.load(id_ptr + pair, mask=pair < pairs, other=-1) - first_id
    inside = (pair < pairs) & (column >= 0) & (column < width)
    x_ptr = logits_ptr + row * logits_stride + column
    x = tl.load(x_ptr, mask=inside, other=0.0) + tl.load(value_ptr + pair, mask=inside, other=0.0)
    tl.store(x_ptr, x, mask=inside)


@triton.jit
def _count(own_ptr, start, end, first, BLOCK: tl.constexpr, IDS: tl.constexpr):
    """How often each of BLOCK ids from `first` on is among the tokens [start, end): int32."""
    count = tl.zeros((BLOCK,), tl.int32)
    for at in range(start, end, IDS):
        index = at + tl.arange(0, IDS)
        id = tl.load(own_ptr + index, mask=index < end, other=-1) - first
        inside = (id >= 0) & (id < BLOCK)
        count += tl.histogram(tl.where(inside, id, 0), BLOCK, mask=inside)
    return count


@triton.jit
def _penalize_kernel(
    logits_ptr, row_ptr, presence_ptr, frequency_ptr, repetition_ptr, tokens_ptr, slot_ptr, position_ptr, prompt_ptr,
    logits_stride, tokens_stride, first_id, width, BLOCK: tl.constexpr, IDS: tl.constexpr,
):  # fmt: skip
    """One program per BLOCK ids of one row, of those from `first_id` on."""
    number = tl.program_id(0)
    row = tl.load(row_ptr + number)
    own_ptr = tokens_ptr + tl.load(slot_ptr + row) * tokens_stride
    position = tl.load(position_ptr + row).to(tl.int32)
    prompt = tl.minimum(tl.load(prompt_ptr + row).to(tl.int32), position)
    first = tl.program_id(1) * BLOCK
    column = first + tl.arange(0, BLOCK)
    of_prompt = _count(own_ptr, 0, prompt, first_id + first, BLOCK, IDS)
    of_output = _count(own_ptr, prompt, position, first_id + first, BLOCK, IDS)
    x_ptr = logits_ptr + row * logits_stride + column
    x = tl.load(x_ptr, mask=column < width, other=0.0)
    repetition = tl.load(repetition_ptr + number)
    x = tl.where(of_prompt + of_output > 0, tl.where(x > 0, tl.div_rn(x, repetition), x * repetition), x)
    x = x - tl.load(frequency_ptr + number) * of_output.to(tl.float32)
    x = x - tl.load(presence_ptr + number) * (of_output > 0).to(tl.float32)
    tl.store(x_ptr, x, mask=column < width)
