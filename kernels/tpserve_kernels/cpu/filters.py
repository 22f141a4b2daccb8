"""Filters of rows of logits, in place: kernels/cpu/filters.h. The specification, in torch, is tpserve/sampler/filters.py.

Logits are float32 [R, V], the numbers of a row adjacent; the other tensors have an entry for each of K rows, `row_K`, int64.
"""

import ctypes

import torch

from tpserve_kernels.cpu.library import Operation, library


class MaskBitsArgs(ctypes.Structure):
    """`MaskBits` of kernels/cpu/api.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("logits", "row", "bits")),
        *((name, ctypes.c_int64) for name in ("rows", "vocab", "stride", "bits_stride")),
    )


class PenalizeArgs(ctypes.Structure):
    """`Penalize` of kernels/cpu/api.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("logits", "row", "tokens", "position", "prompt")),
        *((name, ctypes.c_void_p) for name in ("presence", "frequency", "repetition")),
        *((name, ctypes.c_int64) for name in ("rows", "vocab", "stride", "history", "tokens_stride")),
    )


class TruncateArgs(ctypes.Structure):
    """`Truncate` of kernels/cpu/api.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("logits", "row", "temperature", "log_min_p", "top_k", "top_p")),
        *((name, ctypes.c_int64) for name in ("rows", "vocab", "stride")),
    )


def mask_bits(logits_RV: torch.Tensor, row_K: torch.Tensor, bits_KW: torch.Tensor) -> None:
    """Ids whose bits are not set become -inf: id i is bit i % 32 of word i // 32 of `bits_KW`, int32."""
    _check(logits_RV, row_K, bits_KW)
    vocab = logits_RV.shape[1]
    assert bits_KW.dtype == torch.int32 and bits_KW.stride(1) == 1 and bits_KW.shape[1] * 32 >= vocab
    _run(
        Operation.MASK_BITS,
        MaskBitsArgs(*_addresses(logits_RV, row_K, bits_KW), len(row_K), vocab, logits_RV.stride(0), bits_KW.stride(0)),
    )


def penalize(
    logits_RV: torch.Tensor,
    row_K: torch.Tensor,
    tokens_RL: torch.Tensor,
    position_K: torch.Tensor,
    prompt_K: torch.Tensor,
    penalties: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> None:
    """Lower the logits of ids that the sequence has already.

    `tokens_RL`: int32, of the same rows as `logits_RV`; the first `position_K` of them count, and those from `prompt_K` on are
    output; both int64. `penalties`: presence, frequency and repetition, float32 [K].
    """
    of_rows = (position_K, prompt_K, *penalties)
    _check(logits_RV, row_K, *of_rows)
    assert tokens_RL.dtype == torch.int32 and tokens_RL.stride(1) == 1 and len(tokens_RL) == len(logits_RV)
    assert position_K.dtype == prompt_K.dtype == torch.int64 and all(each.dtype == torch.float32 for each in penalties)
    sizes = len(row_K), logits_RV.shape[1], logits_RV.stride(0), tokens_RL.shape[1], tokens_RL.stride(0)
    _run(Operation.PENALIZE, PenalizeArgs(*_addresses(logits_RV, row_K, tokens_RL, *of_rows), *sizes))


def truncate(
    logits_RV: torch.Tensor,
    row_K: torch.Tensor,
    temperature_K: torch.Tensor,
    log_min_p_K: torch.Tensor,
    top_k_K: torch.Tensor,
    top_p_K: torch.Tensor,
) -> None:
    """Min-p, then top-k, then top-p. `log_min_p_K`: float64, -inf for none; `top_k_K`: int64, 0; `top_p_K`: float64, 1."""
    of_rows = (temperature_K, log_min_p_K, top_k_K, top_p_K)
    _check(logits_RV, row_K, *of_rows)
    assert temperature_K.dtype == torch.float32 and log_min_p_K.dtype == top_p_K.dtype == torch.float64
    assert top_k_K.dtype == torch.int64
    sizes = len(row_K), logits_RV.shape[1], logits_RV.stride(0)
    _run(Operation.TRUNCATE, TruncateArgs(*_addresses(logits_RV, row_K, *of_rows), *sizes))


def _check(logits_RV: torch.Tensor, row_K: torch.Tensor, *of_rows: torch.Tensor) -> None:
    assert logits_RV.dtype == torch.float32 and logits_RV.stride(1) == 1 and row_K.dtype == torch.int64
    assert row_K.is_contiguous() and all(len(each) == len(row_K) and each.stride(-1) == 1 for each in of_rows)


def _addresses(*tensors: torch.Tensor) -> tuple[int, ...]:
    return tuple(each.data_ptr() for each in tensors)


def _run(operation: Operation, arguments: ctypes.Structure) -> None:
    lib = library()
    assert lib is not None
    lib.run(operation, arguments)
