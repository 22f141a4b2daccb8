"""How a checkpoint stores a matrix: plain, block FP8 (one scale for 128 x 128), or MXFP4 (one scale for 32 numbers).

A scheme is a row of a table: its tensors, the elements of them that a source needs (views of mapped files, so nothing is
read before it is used), and the conversion into the parameter. Quantized numbers are computed in float32, slab by slab on
the parameter's device, and rounded once.

R rows and C columns of the stored matrix, G groups of 32 columns.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from tpserve.errors import UserError
from tpserve.weights.files import FileTensor
from tpserve.weights.source import Source

PLAIN_KINDS = ("F64", "F32", "BF16", "F16")
FP8_BLOCK = 128
"""Rows and columns that share a scale."""
FP4_GROUP = 32
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_FP4_PAIRS = torch.tensor([(_E2M1[byte & 15], _E2M1[byte >> 4]) for byte in range(256)], dtype=torch.float16)
"""The two numbers of a byte, the low half first."""
_FP4_SCALES = torch.tensor([2.0 ** (byte - 127) for byte in range(256)], dtype=torch.float32)


@dataclass(frozen=True)
class QuantScheme:
    """`suffixes`: the names of the scheme's tensors are the plain tensor's name plus each suffix.

    `slice(source, tensors)` returns the views to read, UserError for another shape or dtype than the source needs;
    `load(source, cuts, view)` converts them into `view`, which has the shape `source.shard`. `by_rows`: there is one cut, and
    some of its rows can be loaded into the same rows of the view.
    """

    title: str
    suffixes: tuple[str, ...]
    slice: Callable[[Source, Sequence[FileTensor]], list[torch.Tensor]]
    load: Callable[[Source, Sequence[torch.Tensor], torch.Tensor], None]
    by_rows: bool = False


def _slice_plain(source: Source, tensors: Sequence[FileTensor]) -> list[torch.Tensor]:
    (tensor,) = tensors
    if tensor.kind == "F8_E4M3":
        raise UserError(f"{tensor} is F8_E4M3 without {source.name}_scale_inv, the scales of its blocks")
    _expect(tensor, source.stored, PLAIN_KINDS)
    return [tensor.tensor[source.index]]


def _load_plain(source: Source, cuts: Sequence[torch.Tensor], view: torch.Tensor) -> None:
    view.copy_(cuts[0])


def _slice_fp8(source: Source, tensors: Sequence[FileTensor]) -> list[torch.Tensor]:
    weight, scales = tensors
    _expect(weight, source.stored, ("F8_E4M3",))
    *outer, rows, columns = source.stored
    _expect(scales, (*outer, -(-rows // FP8_BLOCK), -(-columns // FP8_BLOCK)), ("F32", "BF16", "F8_E8M0"))
    block_rows, block_columns = (_cover(taken, FP8_BLOCK) for taken in _taken(source))
    return [weight.tensor[source.index], scales.tensor[(*_matrix(source), block_rows, block_columns)]]


def _load_fp8(source: Source, cuts: Sequence[torch.Tensor], view: torch.Tensor) -> None:
    weight_RC, scales = cuts
    row_R, column_C = (_blocks(taken, FP8_BLOCK, view.device) for taken in _taken(source))
    scales_C = scales.to(view.device).float().mul(2.0**8)[:, column_C]
    for rows in _slabs(view):
        codes = weight_RC[rows].to(view.device).view(torch.int8).to(torch.int16)
        # Moving sign, exponent and fraction to their float16 positions gives exactly the number times 2 ** -8, several times
        # faster than a conversion. (The two codes for NaN, which no weight has, become 480.)
        numbers = codes.bitwise_left_shift_(7).bitwise_and_(~0x4000).view(torch.float16).float()
        view[rows] = numbers.mul_(scales_C[row_R[rows]])


def _slice_fp4(source: Source, tensors: Sequence[FileTensor]) -> list[torch.Tensor]:
    blocks, scales = tensors
    *outer, columns, rows = source.stored  # the stored matrix is the transpose of the plain one
    groups = -(-columns // FP4_GROUP)
    _expect(blocks, (*outer, rows, groups, FP4_GROUP // 2), ("U8",))
    _expect(scales, (*outer, rows, groups), ("U8",))
    taken_C, taken_R = _taken(source)
    index = (*_matrix(source), slice(taken_R.start, taken_R.stop, taken_R.step), _cover(taken_C, FP4_GROUP))
    return [blocks.tensor[index], scales.tensor[index]]


def _load_fp4(source: Source, cuts: Sequence[torch.Tensor], view: torch.Tensor) -> None:
    blocks_RG, scales_RG = cuts
    view_RC, columns = view.T, _taken(source)[0]
    first = columns.start % FP4_GROUP
    taken = slice(first, first + columns.stop - columns.start, columns.step)
    pairs, powers = _FP4_PAIRS.view(torch.int32).flatten().to(view.device), _FP4_SCALES.to(view.device)
    for rows in _slabs(view_RC):
        codes, scale = blocks_RG[rows].to(view.device).int(), scales_RG[rows].to(view.device).int()
        numbers = pairs.index_select(0, codes.flatten()).view(torch.float16).float().view(*scale.shape, FP4_GROUP)
        numbers *= powers.index_select(0, scale.flatten()).view(*scale.shape, 1)
        view_RC[rows] = numbers.flatten(1)[:, taken]


PLAIN = QuantScheme("plain", ("",), _slice_plain, _load_plain, by_rows=True)
BLOCK_FP8 = QuantScheme("block-FP8", ("", "_scale_inv"), _slice_fp8, _load_fp8)
MXFP4 = QuantScheme("MXFP4", ("_blocks", "_scales"), _slice_fp4, _load_fp4)
SCHEMES = (BLOCK_FP8, MXFP4, PLAIN)
"""The first scheme applies whose last suffix the checkpoint has for a tensor."""


def _expect(tensor: FileTensor, shape: tuple[int, ...], kinds: tuple[str, ...]) -> None:
    if tuple(tensor.tensor.shape) != shape:
        raise UserError(f"{tensor} has shape {list(tensor.tensor.shape)}, but config.json asks for {list(shape)}")
    if tensor.kind not in kinds:
        raise UserError(f"{tensor} is {tensor.kind}: supported are {', '.join(kinds)}")


def _matrix(source: Source) -> tuple[int | slice, ...]:
    """The index of the source's matrix in a stack; empty without a stack."""
    return (source.expert,) if source.num_experts else ()


def _taken(source: Source) -> tuple[range, range]:
    """The rows and columns of the plain matrix that the source takes."""
    rows, columns = (range(size) for size in source.shape)
    return (source.taken, columns) if source.dim == 0 else (rows, source.taken)


def _cover(taken: range, block: int) -> slice:
    """The blocks that the range touches."""
    return slice(taken.start // block, -(-taken.stop // block))


def _blocks(taken: range, block: int, device: torch.device) -> torch.Tensor:
    """The block of each element of the range, relative to the first touched block."""
    return torch.arange(taken.start, taken.stop, taken.step, device=device) // block - taken.start // block


def _slabs(view: torch.Tensor) -> Iterator[slice]:
    """Row slices small enough for a CPU cache, or for a negligible part of GPU memory."""
    elements = 1 << (18 if view.device.type == "cpu" else 24)
    step = max(1, elements // view.shape[1])
    return (slice(row, row + step) for row in range(0, len(view), step))
