"""Packs the weights of a stage one parameter at a time: filled, packed, and its plain tensor let go before the next one.

So loading takes the packed model and one parameter, not the plain model beside it: a plain tensor that nobody has filled takes
addresses, but no memory.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch

from tpserve.layers.row_parallel import pack_row_parallel
from tpserve.parallel.group import Group
from tpserve.quant.packed import Stack, Table, Weight, can_pack, pack, pack_stack
from tpserve.quant.weight_memory import PRIVATE, WeightMemory


class PlainWeights(Protocol):
    """Where the numbers of plain tensors come from."""

    def fill(self, part: torch.Tensor) -> None:
        """Fill the parameter that `part` is, or views, unless that has been done."""

    def matrix(self, stack_ENK: torch.Tensor, index: int) -> torch.Tensor:
        """Matrix `index` of a stack that is a whole parameter: [N, K]. The others need not have been filled."""


class LoadedWeights:
    """Plain tensors that have been filled."""

    def fill(self, part: torch.Tensor) -> None:
        """Nothing is left to do."""

    def matrix(self, stack_ENK: torch.Tensor, index: int) -> torch.Tensor:
        """A view."""
        return stack_ENK[index]


@dataclass(frozen=True)
class Packer:
    """How weights are packed. `int8`: the layers' matrices are quantized. `memory`: where they lie afterwards.

    A plain tensor must not be read after it was packed: its memory is gone. All ranks of a stage pack in the same order.
    """

    int8: bool = False
    plain: PlainWeights = field(default_factory=LoadedWeights)
    memory: WeightMemory = PRIVATE

    def matrix(self, weight_NK: Weight, *, int8: bool | None = None) -> Weight:
        """`pack`. `int8`: instead of the packer's."""
        int8 = self.int8 if int8 is None else int8
        return self._packed(weight_NK, lambda: pack(weight_NK, int8=int8, memory=self.memory))

    def row_parallel(self, weight_NK: Weight, tp: Group) -> Weight:
        """`pack_row_parallel`."""
        return self._packed(weight_NK, lambda: pack_row_parallel(weight_NK, tp, int8=self.int8, memory=self.memory))

    def table(self, table_VH: Table) -> Table:
        """A table whose rows are looked up, and which is not packed."""
        if not isinstance(table_VH, torch.Tensor):
            return table_VH
        self.plain.fill(table_VH)
        kept = self.memory.keep(table_VH)
        if kept is not table_VH and _owns_storage(table_VH):
            table_VH.untyped_storage().resize_(0)
        return kept

    def stack(self, stack_ENK: Stack) -> Stack:
        """`pack_stack`; a stack that is a parameter is filled matrix by matrix, too."""
        if not isinstance(stack_ENK, torch.Tensor):
            return stack_ENK
        if self.memory.packed or not can_pack(stack_ENK) or not _owns_storage(stack_ENK):
            self.plain.fill(stack_ENK)
            return pack_stack(stack_ENK, int8=self.int8, memory=self.memory)
        matrices = (self.plain.matrix(stack_ENK, index) for index in range(len(stack_ENK)))
        return pack_stack(stack_ENK, int8=self.int8, matrices=matrices, memory=self.memory)

    def _packed(self, plain: Weight, pack_plain: Callable[[], Weight]) -> Weight:
        if not isinstance(plain, torch.Tensor):
            return plain
        self.plain.fill(plain)
        packed = pack_plain()
        if packed is not plain and _owns_storage(plain):
            plain.untyped_storage().resize_(0)
        return packed


def _owns_storage(x: torch.Tensor) -> bool:
    return x.untyped_storage().nbytes() == x.nbytes
