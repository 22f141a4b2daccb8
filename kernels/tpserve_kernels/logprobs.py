"""Log probabilities of the raw logits without a row of exponentials and without a sort, in three launches.

    best_keys   of each part of a row the n largest logits, as integers that sort by (logit, lowest id first)
    masses      of each part the sum of exponentials relative to the largest logit of the row, as an integer, and the chosen logit
    finish      of each row the n largest of its parts, the logarithm of the sum, and what both say

Between ranks the results of the first and of the second launch are gathered. Each of them is exact in any order, so the bits do
not depend on parts, shards or batch. What is promised is documented in tpserve/sampler/logprobs.py.

Legend: S rows, V vocabulary ids of this rank, C parts of a row, n largest logits, P ranks.
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
from tpserve_kernels.sampler_types import RawLogits

PART = 4096
"""Vocabulary ids of a part."""
FEW_KEYS = 20
"""Up to so many keys of a part are read by one compiled kernel."""
NO_KEY = -(1 << 63)
"""A key below every real one."""
MASS_ONE = 2.0**40
"""An exponential of 1 as an integer."""


def best_keys(logits: RawLogits, first: int, num_parts: int, num_top: int) -> torch.Tensor:
    """The keys of the `num_top` largest logits of each part, best first, at least one: [S, C, n] int64, filled up with NO_KEY.

    `first`: the id of the first logit; `num_parts`: C, at least what V ids take, equal on all ranks. One launch.
    """
    values_SV, scale, cap = logits
    rows, width = values_SV.shape
    assert values_SV.stride(1) == 1 and num_parts * PART >= width
    keys_SCn = torch.empty(rows, num_parts, max(1, num_top), dtype=torch.int64, device=values_SV.device)
    _best_keys_kernel[(rows, num_parts)](
        values_SV, keys_SCn, values_SV.stride(0), width, first, max(1, num_top), scale, cap or 0.0, CAPPED=cap is not None,
        NO_KEY=NO_KEY, PART=PART, num_warps=8, enable_fp_fusion=False,
    )  # fmt: skip
    return keys_SCn


def masses(logits: RawLogits, first: int, token_S: torch.Tensor, keys_PSCn: torch.Tensor) -> torch.Tensor:
    """The mass of each part, and the key of the token's logit where it is in the part: [S, C, 2] int64, else NO_KEY. One launch.

    `keys_PSCn`: what `best_keys` gave every rank; `token_S`: int64.
    """
    values_SV, scale, cap = logits
    ranks, rows, num_parts, num_keys = keys_PSCn.shape
    assert keys_PSCn.is_contiguous() and token_S.dtype == torch.int64
    masses_SC2 = torch.empty(rows, num_parts, 2, dtype=torch.int64, device=values_SV.device)
    _masses_kernel[(rows, num_parts)](
        values_SV, keys_PSCn, token_S, masses_SC2, values_SV.stride(0), values_SV.shape[1], first, rows, ranks * num_parts,
        num_keys, scale, cap or 0.0, CAPPED=cap is not None, NO_KEY=NO_KEY, MASS_ONE=MASS_ONE, PART=PART,
        PARTS=triton.next_power_of_2(ranks * num_parts), num_warps=8, enable_fp_fusion=False,
    )  # fmt: skip
    return masses_SC2


def from_parts(
    keys_PSCn: torch.Tensor, masses_PSC2: torch.Tensor, num_top: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(logprob of the token [S] float32, ids of the `num_top` largest [S, n] int64, their logprobs [S, n] float32)."""
    ranks, rows, num_parts, num_keys = keys_PSCn.shape
    assert keys_PSCn.is_contiguous() and masses_PSC2.is_contiguous()
    device, parts = keys_PSCn.device, ranks * num_parts
    chosen_S, top_Sn = torch.empty(rows, device=device), torch.empty(rows, num_top, device=device)
    id_Sn = torch.empty(rows, num_top, dtype=torch.int64, device=device)
    most_keys = triton.next_power_of_2(parts * max(num_keys, FEW_KEYS))
    _from_parts_kernel[(rows,)](
        keys_PSCn, masses_PSC2, chosen_S, id_Sn, top_Sn, rows, parts, num_parts, num_keys, num_top, NO_KEY=NO_KEY,
        MASS_ONE=MASS_ONE, PARTS=triton.next_power_of_2(parts), KEYS=most_keys, num_warps=4,
        enable_fp_fusion=False,
    )  # fmt: skip
    return chosen_S, id_Sn, top_Sn


def logprobs_reference(logits: RawLogits, token_S: torch.Tensor, num_top: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What the three launches give for whole rows, in torch, bit for bit."""
    x_SV = finish_reference(*logits)
    top_S1 = x_SV.amax(dim=1, keepdim=True)
    mass_S = as_integer_reference(exp32_reference(x_SV - top_S1), MASS_ONE).sum(dim=1)
    lse_S1 = top_S1.double() + log64_reference(mass_S.double() / MASS_ONE)[:, None]
    best = x_SV.sort(dim=1, descending=True, stable=True)
    chosen_S = x_SV.gather(1, token_S[:, None]).double() - lse_S1
    return chosen_S.squeeze(1).float(), best.indices[:, :num_top], (best.values[:, :num_top].double() - lse_S1).float()


@triton.jit
def _key(x, id):
    """An integer in the order of (logit, lowest id first)."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)  # both zeros are equal
    return ((bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64) << 32) | (0xFFFFFFFF - id.to(tl.int64))


@triton.jit
def _logit(key):
    """The logit of a key."""
    bits = (key >> 32).to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["num_keys"])
def _best_keys_kernel(
    logits_ptr, keys_ptr, logits_stride, width, first, num_keys, scale, cap,
    CAPPED: tl.constexpr, NO_KEY: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """One program per part of a row."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    index = part * PART + tl.arange(0, PART)
    x = finish(tl.load(logits_ptr + row * logits_stride + index, mask=index < width, other=0.0), scale, cap, CAPPED)
    key = tl.where(index < width, _key(x, first + index), NO_KEY)
    own_ptr = keys_ptr + (row * tl.num_programs(1) + part) * num_keys
    for number in range(num_keys):
        best = tl.max(key, 0)
        tl.store(own_ptr + number, best)
        key = tl.where(key == best, NO_KEY, key)


@triton.jit(do_not_specialize=["rows", "num_keys"])
def _masses_kernel(
    logits_ptr, keys_ptr, token_ptr, masses_ptr, logits_stride, width, first, rows, parts, num_keys, scale, cap,
    CAPPED: tl.constexpr, NO_KEY: tl.constexpr, MASS_ONE: tl.constexpr, PART: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """One program per part of a row. Part c of rank p is number p * C + c."""
    row, part, num_parts = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    number = tl.arange(0, PARTS)
    at = (number // num_parts * rows + row) * num_parts + number % num_parts
    top = _logit(tl.max(tl.load(keys_ptr + at * num_keys, mask=number < parts, other=NO_KEY), 0))
    index = part * PART + tl.arange(0, PART)
    x = finish(tl.load(logits_ptr + row * logits_stride + index, mask=index < width, other=0.0), scale, cap, CAPPED)
    mass = tl.sum(tl.where(index < width, as_integer(exp32(x - top), MASS_ONE), 0), 0)
    chosen = (index < width) & (first + index == tl.load(token_ptr + row))
    own_ptr = masses_ptr + (row * num_parts + part) * 2
    tl.store(own_ptr, mass)
    tl.store(own_ptr + 1, tl.max(tl.where(chosen, _key(x, first + index), NO_KEY), 0))


@triton.jit(do_not_specialize=["rows", "num_keys", "num_top"])
def _from_parts_kernel(
    keys_ptr, masses_ptr, chosen_ptr, id_ptr, top_ptr, rows, parts, num_parts, num_keys, num_top,
    NO_KEY: tl.constexpr, MASS_ONE: tl.constexpr, PARTS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """One program per row."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, PARTS)
    at = (part // num_parts * rows + row) * num_parts + part % num_parts
    mass = tl.sum(tl.load(masses_ptr + at * 2, mask=part < parts, other=0), 0)
    chosen = _logit(tl.max(tl.load(masses_ptr + at * 2 + 1, mask=part < parts, other=NO_KEY), 0))
    number = tl.arange(0, KEYS)
    part = number // num_keys  # from `parts` on there are none
    at = ((part // num_parts * rows + row) * num_parts + part % num_parts) * num_keys + number % num_keys
    key = tl.load(keys_ptr + at, mask=part < parts, other=NO_KEY)
    lse = _logit(tl.max(key, 0)).to(tl.float64) + log64(mass.to(tl.float64) * (1.0 / MASS_ONE))
    tl.store(chosen_ptr + row, (chosen.to(tl.float64) - lse).to(tl.float32))
    for number in range(num_top):
        best = tl.max(key, 0)
        tl.store(id_ptr + row * num_top + number, 0xFFFFFFFF - (best & 0xFFFFFFFF))
        tl.store(top_ptr + row * num_top + number, (_logit(best).to(tl.float64) - lse).to(tl.float32))
        key = tl.where(key == best, NO_KEY, key)
