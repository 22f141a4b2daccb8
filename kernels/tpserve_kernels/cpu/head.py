"""The LM head without rows of logits: kernels/cpu/head.h. The vocabulary is taken in blocks of 128 ids.

Legend: S rows, K inner channels, V vocabulary ids, B blocks, E the 128 ids of a block.
"""

import ctypes
from typing import NamedTuple

import torch

from tpserve_kernels.cpu.library import Operation, library

BLOCK = 128
LOWEST = torch.finfo(torch.float32).min


class HeadArgs(ctypes.Structure):
    """`Head` of kernels/cpu/api.h."""

    _fields_ = (
        ("weight", ctypes.c_void_p),
        ("x", ctypes.c_void_p),
        ("logits", ctypes.c_void_p),
        ("temperature", ctypes.c_void_p),
        ("best", ctypes.c_void_p),
        ("best_id", ctypes.c_void_p),
        ("tops", ctypes.c_void_p),
        ("sums", ctypes.c_void_p),
        ("workspace", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("x_stride", ctypes.c_int64),
        ("logits_stride", ctypes.c_int64),
        ("outputs", ctypes.c_int64),
        ("blocks", ctypes.c_int64),
        ("scale", ctypes.c_float),
    )


class Blocks(NamedTuple):
    """What a draw needs of each row's logits."""

    best_S: torch.Tensor
    """float32: the largest logit"""
    best_id_S: torch.Tensor
    """int64: its lowest id"""
    top_SB: torch.Tensor
    """float32: the largest logit of each block, at least the lowest finite number"""
    sum_SB: torch.Tensor
    """float64: the sum over a block of exp((logit - top) / temperature), exact in any order; 0 for a temperature of 0"""


def blocks_of_product(
    x_SK: torch.Tensor, blob: torch.Tensor, outputs: int, scale: float, temperature_S: torch.Tensor | None
) -> Blocks:
    """The blocks of the logits `scale` * x @ weight.T. `blob`: from `product.pack`; `x_SK`: of the weight's dtype.

    `temperature_S`: float32; None when only the largest logits are wanted: then the last two fields are empty.
    """
    x_SK = x_SK.contiguous()
    args = HeadArgs(
        weight=blob.data_ptr(), x=x_SK.data_ptr(), rows=len(x_SK), x_stride=x_SK.stride(0), outputs=outputs, scale=scale
    )
    return _blocks(args, temperature_S)


def blocks_of_logits(logits_SV: torch.Tensor, temperature_S: torch.Tensor) -> Blocks:
    """The blocks of logits: float32 [S, V], the values of a row adjacent. The same bits as of `blocks_of_product`."""
    args = HeadArgs(
        logits=logits_SV.data_ptr(), rows=len(logits_SV), logits_stride=logits_SV.stride(0), outputs=logits_SV.shape[1]
    )
    return _blocks(args, temperature_S)


def blocks_of_logits_reference(logits_SV: torch.Tensor, temperature_S: torch.Tensor) -> Blocks:
    """`blocks_of_logits` in plain torch: adding and subtracting 2**8 rounds a term to a multiple of 2**-44."""
    best_S, best_id_S = logits_SV.max(dim=1)
    padded_SV = torch.nn.functional.pad(logits_SV, (0, -logits_SV.shape[1] % BLOCK), value=float("-inf"))
    blocks_SBE = padded_SV.view(len(logits_SV), -1, BLOCK)
    # Relative to the block's own maximum nothing overflows, however small the temperature; the clamp is for blocks of -inf.
    top_SB = blocks_SBE.amax(dim=2).clamp(min=LOWEST)
    scale_S = torch.where(temperature_S == 0, 1.0, temperature_S)
    weight_SBE = (blocks_SBE - top_SB[:, :, None]).div_(scale_S[:, None, None]).exp_()
    sum_SB = weight_SBE.double().add_(2.0**8).sub_(2.0**8).sum(dim=2)
    return Blocks(best_S, best_id_S, top_SB, sum_SB.masked_fill_((temperature_S == 0)[:, None], 0))


def block_logits(x_SK: torch.Tensor, blob: torch.Tensor, outputs: int, scale: float, block_S: torch.Tensor) -> torch.Tensor:
    """The logits of one block for each row, float32 [S, E], -inf past the vocabulary. `block_S`: int64."""
    lib = library()
    assert lib is not None
    x_SK, block_S = x_SK.contiguous(), block_S.contiguous()
    out_SE = torch.empty(len(x_SK), BLOCK)
    args = HeadArgs(
        weight=blob.data_ptr(), x=x_SK.data_ptr(), best_id=block_S.data_ptr(), workspace=out_SE.data_ptr(), rows=len(x_SK),
        x_stride=x_SK.stride(0), outputs=outputs, blocks=-(-outputs // BLOCK), scale=scale,
    )  # fmt: skip
    lib.run(Operation.HEAD_BLOCK, args)
    return out_SE


def _blocks(args: HeadArgs, temperature_S: torch.Tensor | None) -> Blocks:
    lib = library()
    assert lib is not None
    rows, threads, args.blocks = args.rows, torch.get_num_threads(), -(-args.outputs // BLOCK)
    best, best_id = torch.empty(threads * rows), torch.empty(threads * rows, dtype=torch.int64)
    workspace = torch.empty(threads * rows * BLOCK)
    num_blocks = 0 if temperature_S is None else args.blocks
    top_SB, sum_SB = torch.empty(rows, num_blocks), torch.empty(rows, num_blocks, dtype=torch.float64)
    args.best, args.best_id, args.workspace = best.data_ptr(), best_id.data_ptr(), workspace.data_ptr()
    if temperature_S is not None:
        temperature_S = temperature_S.contiguous()
        args.temperature, args.tops, args.sums = temperature_S.data_ptr(), top_SB.data_ptr(), sum_SB.data_ptr()
    lib.run(Operation.HEAD, args)
    return Blocks(best[:rows], best_id[:rows], top_SB, sum_SB)
