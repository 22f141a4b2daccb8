"""Min-p, top-k and top-p of whole rows of logits without a sort, in one launch.

Each keeps a beginning of the order (largest logit first, of equal ones the lowest id first), and so do all three together. Such a
beginning is a threshold and how many of the logits that equal it stay. The threshold of top-k and of top-p is the largest number
with enough mass at or above it. The mass of a number is 1, or its probability as an integer: sums are exact in any order. The
threshold is found by bisection, alternately of the numbers and of their bits, in an interval whose ends move to numbers of the
row; so the search ends at a number of the row, after 64 steps at most. After three steps over the row the numbers that are left
in question are copied together.

Sources: top-k, Fan et al. 2018 (arXiv:1805.04833); top-p, Holtzman et al. 2019 (arXiv:1904.09751); min-p, Nguyen et al. 2024
(arXiv:2407.01082). The search without a sort is that of FlashInfer's samplers (Ye et al. 2025, arXiv:2501.01005).

Legend: R rows, V vocabulary ids.
"""

import torch
import triton
import triton.language as tl

from tpserve_kernels.arithmetic import as_integer, as_integer_reference, exp32, exp32_reference

WEIGHT_ONE = 2.0**40
"""A weight of 1 as an integer: sums over 2**22 ids are exact in 64 bits."""
AT_ONCE = 4096
"""Logits that a program reads at once."""
ROW_STEPS = 3
"""Steps of a search over the row itself."""


def truncate(
    logits_RV: torch.Tensor,
    temperature_R: torch.Tensor,
    log_min_p_R: torch.Tensor,
    top_k_R: torch.Tensor,
    top_p_R: torch.Tensor,
) -> None:
    """Min-p, then top-k, then top-p; what they leave out becomes -inf, in place.

    logits_RV: float32 [R, V], the values of a row adjacent; a row of -inf alone stays. temperature_R: float32, positive for rows
    with top-p. log_min_p_R: float64, -inf for none. top_k_R: int64, 0 for none. top_p_R: float64, 1 for none.
    Errors: AssertionError when shapes, dtypes or layouts differ from this.
    """
    rows, width = logits_RV.shape
    assert logits_RV.dtype == temperature_R.dtype == torch.float32 and logits_RV.stride(1) == 1
    assert log_min_p_R.dtype == top_p_R.dtype == torch.float64 and top_k_R.dtype == torch.int64
    of_rows = (temperature_R, log_min_p_R, top_k_R, top_p_R)
    assert all(x.shape == (rows,) and x.is_contiguous() for x in of_rows)
    together_RV = torch.empty(rows, width, device=logits_RV.device)
    _truncate_kernel[(rows,)](
        logits_RV, *of_rows, together_RV, logits_RV.stride(0), width, WEIGHT_ONE=WEIGHT_ONE, STEPS=ROW_STEPS,
        BLOCK=min(AT_ONCE, triton.next_power_of_2(width)), num_warps=16, enable_fp_fusion=False,
    )  # fmt: skip


def truncate_reference(
    logits_RV: torch.Tensor,
    temperature_R: torch.Tensor,
    log_min_p_R: torch.Tensor,
    top_k_R: torch.Tensor,
    top_p_R: torch.Tensor,
) -> None:
    """`truncate` in torch, bit for bit, by a sort."""
    width = logits_RV.shape[1]
    sorted_RV, id_RV = logits_RV.sort(dim=1, descending=True, stable=True)
    top_R1, at_V = sorted_RV[:, :1], torch.arange(width, device=logits_RV.device)
    least_R1 = top_R1.double() + (temperature_R.double() * log_min_p_R)[:, None]
    kept_RV = ~(sorted_RV < least_R1) & ((top_k_R[:, None] == 0) | (at_V < top_k_R[:, None]))
    term_RV = exp32_reference((sorted_RV - top_R1) / torch.where(temperature_R == 0, 1.0, temperature_R)[:, None])
    weight_RV = as_integer_reference(torch.where(kept_RV, term_RV, 0.0), WEIGHT_ONE)
    sum_RV = weight_RV.cumsum(dim=1)
    total_R = sum_RV[:, -1]
    target_R = (total_R.double() * top_p_R).ceil().long().clamp(min=1).minimum(total_R)
    kept_RV &= (top_p_R[:, None] >= 1) | (sum_RV - weight_RV < target_R[:, None])
    kept_RV |= top_R1 == float("-inf")
    logits_RV.masked_fill_(~torch.zeros_like(kept_RV).scatter(1, id_RV, kept_RV), float("-inf"))


@triton.jit
def _key(x):
    """An integer in the order of float32 numbers, in a scalar of 64 bits."""
    bits = x.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)


@triton.jit
def _number(key):
    """The number of a key."""
    bits = key.to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _weight(x, top, temperature, WEIGHT_ONE: tl.constexpr):
    """exp((x - top) / temperature) as an integer, WEIGHT_ONE for the largest."""
    return as_integer(exp32(tl.div_rn(x - top, temperature)), WEIGHT_ONE)


@triton.jit
def _divide(x_ptr, size, middle, top, temperature, WEIGHTED: tl.constexpr, WEIGHT_ONE: tl.constexpr, BLOCK: tl.constexpr):
    """(mass of the numbers from `middle` on, the smallest of them, the largest number below `middle`)"""
    mass = tl.zeros((BLOCK,), tl.int64)
    above, below = tl.full((BLOCK,), float("inf"), tl.float32), tl.full((BLOCK,), float("-inf"), tl.float32)
    for at in range(0, size, BLOCK):
        index = at + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + index, mask=index < size, other=float("-inf"))
        upper = x >= middle
        if WEIGHTED:
            mass += tl.where(upper, _weight(x, top, temperature, WEIGHT_ONE), 0)
        else:
            mass += upper.to(tl.int64)
        above = tl.minimum(above, tl.where(upper, x, float("inf")))
        below = tl.maximum(below, tl.where(upper, float("-inf"), x))
    return tl.sum(mass, 0), tl.min(above, 0), tl.max(below, 0)


@triton.jit
def _search(
    x_ptr, size, low, high, beyond, target, top, temperature, steps,
    WEIGHTED: tl.constexpr, WEIGHT_ONE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Narrow [low, high] to the largest number of the row that mass `target` lies at or above, in so many steps.

    The mass from `low` on reaches the target, and what lies above `high`, `beyond`, does not. Returns all three.
    """
    step = 0
    while (low < high) & (step < steps):
        middle = low * 0.5 + high * 0.5
        if step % 2 == 1:  # of the bits: between numbers of different sizes it takes fewer steps
            middle = _number((_key(low) + _key(high)) >> 1)
        middle = tl.where(middle > low, tl.minimum(middle, high), high)
        mass, above, below = _divide(x_ptr, size, middle, top, temperature, WEIGHTED, WEIGHT_ONE, BLOCK)
        if mass >= target:
            low = above
        else:
            high, beyond = below, mass
        step += 1
    return low, high, beyond


@triton.jit
def _copy_together(x_ptr, size, low, out_ptr, BLOCK: tl.constexpr):
    """Copy the numbers from `low` on; how many there are."""
    count = 0
    for at in range(0, size, BLOCK):
        index = at + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + index, mask=index < size, other=float("-inf"))
        taken = (x >= low).to(tl.int32)
        tl.store(out_ptr + count + tl.cumsum(taken, 0) - 1, x, mask=taken > 0)
        count += tl.sum(taken, 0)
    return count


@triton.jit
def _cut(
    row_ptr, x_ptr, size, width, low, high, target, top, temperature, together_ptr,
    WEIGHTED: tl.constexpr, WEIGHT_ONE: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(threshold, mass above it, the numbers from it on and how many). `x_ptr`: the row, or its numbers from `low` on."""
    beyond = target * 0
    if size == width:
        low, high, beyond = _search(
            row_ptr, width, low, high, beyond, target, top, temperature, STEPS, WEIGHTED, WEIGHT_ONE, BLOCK
        )
        size = _copy_together(row_ptr, width, low, together_ptr, BLOCK)
        x_ptr = together_ptr
        tl.debug_barrier()  # other threads read what these have written
    low, high, beyond = _search(x_ptr, size, low, high, beyond, target, top, temperature, 1000, WEIGHTED, WEIGHT_ONE, BLOCK)
    return low, beyond, x_ptr, size


@triton.jit
def _at_least(x):
    """The smallest float32 that is not below a float64."""
    nearest = x.to(tl.float32)
    return tl.where(nearest.to(tl.float64) >= x, nearest, _number(_key(nearest) + 1))


@triton.jit
def _ends(x_ptr, size, BLOCK: tl.constexpr):
    """The largest number, and the smallest that is not -inf."""
    largest, smallest = tl.full((BLOCK,), float("-inf"), tl.float32), tl.full((BLOCK,), float("inf"), tl.float32)
    for at in range(0, size, BLOCK):
        index = at + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + index, mask=index < size, other=float("-inf"))
        largest = tl.maximum(largest, x)
        smallest = tl.minimum(smallest, tl.where(x > float("-inf"), x, float("inf")))
    return tl.max(largest, 0), tl.min(smallest, 0)


@triton.jit
def _mass_above(x_ptr, size, low, top, temperature, WEIGHT_ONE: tl.constexpr, BLOCK: tl.constexpr):
    """(weight of the numbers above `low`, how many equal it)"""
    mass, equal = tl.zeros((BLOCK,), tl.int64), tl.zeros((BLOCK,), tl.int64)
    for at in range(0, size, BLOCK):
        index = at + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + index, mask=index < size, other=float("-inf"))
        mass += tl.where(x > low, _weight(x, top, temperature, WEIGHT_ONE), 0)
        equal += (x == low).to(tl.int64)
    return tl.sum(mass, 0), tl.sum(equal, 0)


@triton.jit
def _keep(x_ptr, size, low, ties, BLOCK: tl.constexpr):
    """All numbers become -inf but those above `low` and the first `ties` that equal it."""
    seen = ties * 0
    for at in range(0, size, BLOCK):
        index = at + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + index, mask=index < size, other=float("-inf"))
        equal = (x == low).to(tl.int64)
        out = (x < low) | ((x == low) & (seen + tl.cumsum(equal, 0) > ties))
        tl.store(x_ptr + index, float("-inf"), mask=(index < size) & out)
        seen += tl.sum(equal, 0)


@triton.jit
def _truncate_kernel(
    logits_ptr, temperature_ptr, log_min_p_ptr, top_k_ptr, top_p_ptr, together_ptr, logits_stride, width,
    WEIGHT_ONE: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per row."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * logits_stride
    copy_ptr = together_ptr + row * width
    temperature, log_min_p = tl.load(temperature_ptr + row), tl.load(log_min_p_ptr + row)
    k, p = tl.load(top_k_ptr + row), tl.load(top_p_ptr + row)
    top, low = _ends(row_ptr, width, BLOCK)
    if top > float("-inf"):
        x_ptr, size, ties = row_ptr, width, k * 0 + width
        if log_min_p > float("-inf"):
            low = tl.maximum(low, _at_least(top.to(tl.float64) + temperature.to(tl.float64) * log_min_p))
        if k > 0:
            count, _, _ = _divide(row_ptr, width, low, top, temperature, False, WEIGHT_ONE, BLOCK)
            if count > k:
                low, beyond, x_ptr, size = _cut(
                    row_ptr, x_ptr, size, width, low, top, k, top, temperature, copy_ptr, False, WEIGHT_ONE, STEPS, BLOCK
                )
                ties = k - beyond
        if p < 1:
            mass, equal = _mass_above(x_ptr, size, low, top, temperature, WEIGHT_ONE, BLOCK)
            total = mass + tl.minimum(ties, equal) * _weight(low, top, temperature, WEIGHT_ONE)
            target = tl.minimum(tl.maximum(tl.ceil(total.to(tl.float64) * p).to(tl.int64), 1), total)
            last, beyond, _, _ = _cut(
                row_ptr, x_ptr, size, width, low, top, target, top, temperature, copy_ptr, True, WEIGHT_ONE, STEPS, BLOCK
            )
            each = tl.maximum(_weight(last, top, temperature, WEIGHT_ONE), 1)
            left = (target - beyond + each - 1) // each
            ties = tl.where(last > low, left, tl.minimum(ties, left))
            low = last
        tl.debug_barrier()
        _keep(row_ptr, width, low, ties, BLOCK)
