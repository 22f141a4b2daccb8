"""Locates a layer's experts in a checkpoint: single or stacked tensors, matrices as [outputs, inputs] or transposed."""

from dataclasses import dataclass

from tpserve.types.model_spec import ExpertsSpec
from tpserve.weights.names import ExpertNames
from tpserve.weights.source import Source


@dataclass(frozen=True)
class ExpertWeights:
    """`prefix`: of the layer's names. `channels`: the channels of each expert that this rank computes."""

    names: ExpertNames
    prefix: str
    spec: ExpertsSpec
    hidden: int
    channels: range

    def gate_up(self, expert: int) -> tuple[Source, Source]:
        """The gate rows and the up rows of `channels`."""
        names, size, hidden = self.names, self.spec.size, self.hidden
        if names.transposed:
            gate, up = (
                self._stacked(names.stacked_gate_up, (hidden, 2 * size), 1, rows, expert, True) for rows in self._interleaved()
            )
            return gate, up
        below = range(size + self.channels.start, size + self.channels.stop)
        gate, up = (self._stacked(names.stacked_gate_up, (2 * size, hidden), 0, rows, expert) for rows in (self.channels, below))
        return self._single(names.gate, (size, hidden), 0, gate), self._single(names.up, (size, hidden), 0, up)

    def down(self, expert: int) -> Source:
        """The columns of `channels` in the down projection."""
        names, shape = self.names, (self.hidden, self.spec.size)
        if names.transposed:
            return self._stacked(names.stacked_down, shape[::-1], 0, self.channels, expert, True)
        return self._single(names.down, shape, 1, self._stacked(names.stacked_down, shape, 1, self.channels, expert))

    def gate_up_bias(self, expert: int) -> tuple[Source, Source]:
        """The biases of the rows of `gate_up`."""
        name, shape = f"{self.names.stacked_gate_up}_bias", (2 * self.spec.size,)
        gate, up = (self._stacked(name, shape, 0, rows, expert) for rows in self._interleaved())
        return gate, up

    def down_bias(self, expert: int) -> Source:
        """The bias of all outputs of the down projection."""
        return self._stacked(f"{self.names.stacked_down}_bias", (self.hidden,), 0, range(self.hidden), expert)

    def _interleaved(self) -> tuple[range, range]:
        """The gate and the up outputs of `channels` where the two are interleaved."""
        first, end = 2 * self.channels.start, 2 * self.channels.stop
        return range(first, end, 2), range(first + 1, end, 2)

    def _single(self, name: str, shape: tuple[int, int], dim: int, stacked: Source) -> Source:
        """A tensor of one expert or, where the checkpoint has none, its place in the stack."""
        name = f"{self.prefix}{name.format(expert=stacked.expert)}.weight"
        return Source(name, shape, dim, self.channels, instead=stacked)

    def _stacked(
        self, name: str, shape: tuple[int, ...], dim: int, taken: range, expert: int, transposed: bool = False
    ) -> Source:
        return Source(self.prefix + name, shape, dim, taken, transposed, expert, self.spec.count)
