"""The kinds of matrix product that a model uses, so that the self-test can run each alone. Owns no weight.

Legend: T or R rows, E matrices, N outputs, K inner channels, F = E K.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from tpserve.quant.grouped import grouped_matmul, per_head
from tpserve.quant.int8 import Int8Stack, Int8Weight
from tpserve.quant.matmul import matmul
from tpserve.quant.packed import Stack, Weight, stack_shape


@dataclass(frozen=True)
class Product:
    """One kind of product. `run` maps rows [T, width] of `dtype` to rows [T, any].

    `name`: short, and equal for products of one kind, shape and dtype. `size`: elements of its matrices; the time of a product
    is roughly proportional to it.
    """

    name: str
    width: int
    size: int
    dtype: torch.dtype
    run: Callable[[torch.Tensor], torch.Tensor]


def of_weight(weight_NK: Weight, dtype: torch.dtype) -> Product:
    """`matmul` with this weight, on rows of `dtype`."""
    outputs, inner = weight_NK.shape
    return Product(
        _name("matmul", weight_NK, dtype, inner, outputs), inner, inner * outputs, dtype, partial(matmul, weight_NK=weight_NK)
    )


def of_experts(stack_ENK: Stack, dtype: torch.dtype) -> Product:
    """`grouped_matmul` of all rows with the first matrix."""
    _, outputs, inner = stack_shape(stack_ENK)
    first = stack_ENK[:1]

    def run(x_RK: torch.Tensor) -> torch.Tensor:
        return grouped_matmul(x_RK, first, torch.tensor([len(x_RK)], dtype=torch.int32))

    return Product(_name("experts", stack_ENK, dtype, inner, outputs), inner, inner * outputs, dtype, run)


def of_heads(stack_ENK: Stack, dtype: torch.dtype) -> Product:
    """`per_head` of rows [T, F] with all heads."""
    count, outputs, inner = stack_shape(stack_ENK)

    def run(x_TF: torch.Tensor) -> torch.Tensor:
        return per_head(x_TF.view(-1, count, inner), stack_ENK).flatten(1)

    return Product(_name(f"{count} heads", stack_ENK, dtype, inner, outputs), count * inner, count * inner * outputs, dtype, run)


def _name(kind: str, weight: Weight | Stack, dtype: torch.dtype, inner: int, outputs: int) -> str:
    int8 = "int8 " if isinstance(weight, Int8Weight | Int8Stack) else ""
    return f"{int8}{kind} {str(dtype).removeprefix('torch.')} {inner}x{outputs}"
