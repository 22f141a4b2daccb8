"""A rank's packed weights between its processes: taken from the agent where they fit, else left with it once they are loaded.

Only on the CPU with its library of kernels, and only where an agent would start this rank again. Whatever goes wrong, weights
are loaded as usual.
"""

import logging
import os
from collections.abc import Iterable

import msgspec
import torch

from tpserve.process.weights_keeper import WeightsKeeper
from tpserve.quant.weight_memory import PRIVATE, WeightMemory
from tpserve.weights.parameter import Parameter
from tpserve.weights.shared_memory import Index, MappedMemory, WrittenMemory, digest
from tpserve_kernels.cpu.library import library, serves

log = logging.getLogger(__name__)


class KeptByAgent:
    """`memory` for this rank's weights: `memory.packed` says that the process before has left them."""

    def __init__(self, rank: int, weights_socket: int, facts: dict[str, str]) -> None:
        """`weights_socket`: to the agent, -1 for none. `facts`: what decides the weights, besides the rank."""
        self._rank = rank
        self._facts = facts
        self._keeper = WeightsKeeper(weights_socket) if weights_socket >= 0 else None
        self._kept = None if self._keeper is None else self._keeper.kept()
        self._mapped: MappedMemory | None = None
        self._written: WrittenMemory | None = None

    @property
    def num_bytes(self) -> int:
        """What the process before has left, until `find` or `memory` takes it. It counts as memory in use."""
        return 0 if self._kept is None else os.fstat(self._kept[1]).st_size

    def find(self) -> bool:
        """Map what the process before has left, if it fits; whether `memory` has the weights."""
        kept, self._kept = self._kept, None
        if kept is not None:
            self._mapped = self._map(*kept)
        return self._mapped is not None

    def memory(self, parameters: Iterable[Parameter], device: torch.device, dtype: torch.dtype) -> WeightMemory:
        """Where the packed form of these parameters lies, or is to lie."""
        if self.find():
            mapped, self._mapped = self._mapped, None
            assert mapped is not None
            return mapped
        if self._keeper is None:
            return PRIVATE
        self._keeper.forget()  # before loading: there may not be memory for both
        if not serves(device, dtype):
            return PRIVATE
        try:
            self._written = WrittenMemory(parameters)
        except OSError as error:
            log.debug("rank %d: a process after this one will load its weights again: %s", self._rank, error)
        return self._written or PRIVATE

    def leave(self) -> None:
        """The weights are loaded: leave them to the process after this one."""
        written, self._written = self._written, None
        if written is None or self._keeper is None:
            return
        try:
            index = written.finish(self._digest())
            if index is not None:
                self._keeper.keep(msgspec.msgpack.encode(index), written.descriptor)
        except OSError as error:
            log.debug("rank %d: a process after this one will load its weights again: %s", self._rank, error)
        finally:
            written.close()

    def _map(self, description: bytes, descriptor: int) -> MappedMemory | None:
        try:
            index = msgspec.msgpack.decode(description, type=Index)
            if index.digest != self._digest():
                raise ValueError("they are of other files or settings")
            memory = MappedMemory(descriptor, index)
        except (OSError, ValueError) as error:  # ValueError: msgspec's, too
            log.info("rank %d loads its weights: those of the process before cannot be used: %s", self._rank, error)
            return None
        finally:
            os.close(descriptor)
        log.info("rank %d maps the weights of the process before", self._rank)
        return memory

    def _digest(self) -> str:
        found = library()
        return digest(self._facts, self._rank, "" if found is None else found.version)
