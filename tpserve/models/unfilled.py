"""The parameters of a stage before they are loaded: each is filled when it is about to be packed. Owns no numbers."""

from collections.abc import Callable, Iterable

import torch

from tpserve.quant.weight_memory import PRIVATE, WeightMemory
from tpserve.weights.parameter import Parameter


class UnfilledWeights:
    """`fill` fills a parameter; it is called once for each, or once for each matrix of a stack.

    With a `memory` that has the packed weights, nothing is filled: the few tensors that stay plain are copied from there.
    """

    def __init__(
        self, parameters: Iterable[Parameter], fill: Callable[[Parameter], None], memory: WeightMemory = PRIVATE
    ) -> None:
        self._parameters = {_address(parameter.tensor): parameter for parameter in parameters}
        self._left = dict(self._parameters)
        self._fill = fill
        self._memory = memory

    def fill(self, part: torch.Tensor) -> None:
        """See `PlainWeights`."""
        parameter = self._left.pop(_address(part), None)
        if parameter is not None and not self._memory.packed:
            self._fill(parameter)

    def matrix(self, stack_ENK: torch.Tensor, index: int) -> torch.Tensor:
        """See `PlainWeights`. The matrix has memory of its own, and the stack's stays untouched."""
        address = _address(stack_ENK)
        self._left.pop(address, None)
        piece = self._parameters[address].piece(index, len(stack_ENK))
        self._fill(piece)
        return piece.tensor

    def fill_rest(self) -> None:
        """Fill what nobody has asked for, in the order of declaration."""
        while self._left:
            parameter = self._left.pop(next(iter(self._left)))
            if self._memory.packed:
                parameter.tensor.copy_(self._memory.keep(parameter.tensor))
            else:
                self._fill(parameter)
                self._memory.keep(parameter.tensor)


def _address(x: torch.Tensor) -> int:
    """Of the storage, which no two parameters share."""
    return x.untyped_storage().data_ptr()
