"""A fixed layout of small arrays that go to the card in one copy, always to the same place, as a CUDA graph needs it."""

from array import array
from collections.abc import Sequence
from itertools import accumulate

import torch

from tpserve.worker.host_arrays import ALIGNMENT, DTYPES


class Packet:
    """Arrays of fixed lengths. Each `send` replaces all of them, in the order of the stream.

    `on_device`: the arrays on the card, views of one buffer.
    """

    def __init__(self, padding: "Sequence[array[int] | array[float]]", copies: int, device: torch.device) -> None:
        """`padding`: the arrays as they are where nothing is sent. `copies`: buffers of pinned memory, used in turn."""
        self._padding = list(padding)
        sizes = [-(-len(each) * each.itemsize // ALIGNMENT) * ALIGNMENT for each in self._padding]
        starts = [0, *accumulate(sizes)]
        self._on_host = [torch.empty(starts[-1], dtype=torch.uint8, pin_memory=True) for _ in range(copies)]
        self._sent: list[torch.Event | None] = [None] * copies
        self._turn = 0
        self._buffer = torch.empty(starts[-1], dtype=torch.uint8, device=device)
        self.on_device = [
            self._buffer[start : start + len(each) * each.itemsize].view(DTYPES[each.typecode])
            for start, each in zip(starts, self._padding, strict=False)
        ]

    def send(self, arrays: "Sequence[array[int] | array[float]]") -> None:
        """Queue a copy of `arrays`, padded; those that are left out are all padding."""
        joined = bytearray()
        for index, padding in enumerate(self._padding):
            data = arrays[index] if index < len(arrays) else padding[:0]
            joined += data.tobytes()
            joined += padding[len(data) :].tobytes()
            joined += bytes(-len(joined) % ALIGNMENT)
        turn = self._turn = (self._turn + 1) % len(self._on_host)
        sent = self._sent[turn]
        if sent is not None and not sent.query():
            sent.synchronize()  # the card still reads this buffer
        self._on_host[turn].copy_(torch.frombuffer(joined, dtype=torch.uint8))
        self._buffer.copy_(self._on_host[turn], non_blocking=True)
        event = self._sent[turn] = torch.Event("cuda")
        event.record()
