"""Weights in int8, with a scale for each output channel; a product quantizes its rows to int8 too, with a scale each (W8A8).

Rows and weights are rounded symmetrically, to [-127, 127]; sums are exact integers. Needs the library of CPU kernels.
Source: ZeroQuant (Yao et al. 2022, arXiv:2206.01861), per-token and per-channel scales.

Legend: T or R rows, K inner channels, N outputs, E matrices.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from tpserve.errors import UserError
from tpserve.quant.weight_memory import PRIVATE, WeightMemory
from tpserve_kernels.cpu import int8
from tpserve_kernels.cpu.library import ISA_VARIABLE, load


@dataclass(frozen=True)
class Int8Weight:
    """A matrix in int8. `blob`: uint8, packed (`tpserve_kernels.cpu.int8`); `shape`: (N, K); `dtype`: of the plain tensor.

    Where ranks share K, a product is a sum over ranks of integers: `row_scales`, whose maximum over the ranks scales the rows of
    all of them, then `sums`, then `rescaled` with the sums of all ranks.
    """

    blob: torch.Tensor
    shape: torch.Size
    dtype: torch.dtype

    @staticmethod
    def of(weight_NK: torch.Tensor, scale_N: torch.Tensor | None = None, memory: WeightMemory = PRIVATE) -> "Int8Weight":
        """Quantize a float32 or bfloat16 matrix. `scale_N`: those of `row_scales` by default, and nowhere below."""
        blob = memory.take(int8.packed_bytes(*weight_NK.shape))
        if not memory.packed:
            int8.pack(weight_NK, scale_N, blob)
        return Int8Weight(blob, weight_NK.shape, weight_NK.dtype)

    def product(
        self, x_TK: torch.Tensor, bias_N: torch.Tensor | None = None, out_dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        """x @ weight.T + bias: [T, N] in `out_dtype`, by default that of `x`.

        AssertionError if the dtype of `x` is not that of the plain tensor.
        """
        assert x_TK.dtype == self.dtype
        return int8.product(x_TK, self.blob, self.shape[0], None if bias_N is None else bias_N.float(), out_dtype)

    def sums(self, x_TK: torch.Tensor, scale_T: torch.Tensor) -> torch.Tensor:
        """The integer sums of a product: int32 [T, N]. `scale_T`: of the rows, float32."""
        return int8.integer_sums(int8.quantize(x_TK, scale_T)[0], self.blob, self.shape[0])

    def rescaled(self, sums_TN: torch.Tensor, scale_T: torch.Tensor, bias_N: torch.Tensor | None) -> torch.Tensor:
        """What the sums stand for, + bias: [T, N] in the dtype of the plain tensor."""
        return int8.rescale(sums_TN, scale_T, self.blob, self.dtype, None if bias_N is None else bias_N.float())

    def rows(self, ids_T: torch.Tensor) -> torch.Tensor:
        """Rows of the matrix, rounded to the dtype of the plain tensor: [T, K]. `ids_T`: int64."""
        return int8.lookup(ids_T, self.blob, self.shape[1]).to(self.dtype)


@dataclass(frozen=True)
class Int8Stack:
    """E matrices [N, K] in int8, one after the other: `blob_EB`, uint8 [E, bytes of one]."""

    blob_EB: torch.Tensor
    shape: torch.Size
    """(E, N, K)"""
    dtype: torch.dtype
    """Of the plain tensor."""

    @staticmethod
    def of(
        matrices: Iterable[torch.Tensor], shape: torch.Size, dtype: torch.dtype, memory: WeightMemory = PRIVATE
    ) -> "Int8Stack":
        """Quantize float32 or bfloat16 matrices into `memory`, one after another."""
        count, outputs, inner = shape
        blob_EB = memory.take(count, int8.packed_bytes(outputs, inner))
        if not memory.packed:
            for weight_NK, blob in zip(matrices, blob_EB, strict=True):
                int8.pack(weight_NK, blob=blob)
        return Int8Stack(blob_EB, shape, dtype)

    def __getitem__(self, matrices: slice) -> "Int8Stack":
        """Some of the matrices."""
        blob_EB = self.blob_EB[matrices]
        return Int8Stack(blob_EB, torch.Size((len(blob_EB), *self.shape[1:])), self.dtype)

    def __iter__(self) -> Iterator[Int8Weight]:
        """Each matrix."""
        for blob in self.blob_EB:
            yield Int8Weight(blob, self.shape[1:], self.dtype)

    def grouped_product(self, x_RK: torch.Tensor, ends_E: torch.Tensor, bias_EN: torch.Tensor | None) -> torch.Tensor:
        """Each row times the matrix of its group, as of `grouped_matmul`: [R, N] in the dtype of `x`."""
        return int8.grouped_product(x_RK, self.blob_EB, self.shape[1], ends_E, None if bias_EN is None else bias_EN.float())


row_scales = int8.row_scales
"""The scale of each row of a float32 or bfloat16 matrix [T, K]: float32 [T]."""


def check_inner(inner: int) -> None:
    """UserError when sums over `inner` channels, those of all ranks, might not fit an int32."""
    if inner > int8.MAX_INNER:
        raise UserError(
            f"--quantization int8 adds up at most {int8.MAX_INNER:,} inner channels of a product, and a layer has {inner:,}: "
            "leave --quantization out"
        )


def check_available() -> None:
    """UserError when int8 products cannot be computed here, with the reason."""
    library, why_not = load()
    if library is None:
        raise UserError(
            f"--quantization int8 needs the library of CPU kernels, which cannot be used ({why_not}): install tpserve where a "
            f"C++ compiler is (g++ or clang++) and run without {ISA_VARIABLE}=off, or leave --quantization out",
            param="quantization",
        )
