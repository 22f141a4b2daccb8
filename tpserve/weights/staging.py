"""Ranges of mapped files onto a card, through a bounded pool of pinned buffers.

Threads copy into the buffers, so that the pages of the next ranges are read while the card takes those before. A range goes in
slabs of rows, each through the next buffer of a ring:

    [sent - copying, sent) the card is reading | [sent, submitted) threads are filling | the next one: waited for, then filled

A buffer is filled again only when the copy from it has been waited for.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch

NUM_THREADS = 4
NUM_BUFFERS = 8
"""Half of them are filled while the other half is copied from."""
BUFFER_BYTES = 16 << 20


@dataclass(frozen=True)
class Slab:
    """Rows of a range of a mapped file. `take` gets them on the device, in the file's dtype, once."""

    rows: torch.Tensor
    take: Callable[[torch.Tensor], None]


def slabs(cut: torch.Tensor, take: Callable[[slice, torch.Tensor], None]) -> Iterator[Slab]:
    """A range as slabs that fit a buffer, or of one row. `take` gets each with the place of its rows in the range."""
    count = max(1, BUFFER_BYTES // max(1, cut[:1].nbytes))
    for first in range(0, len(cut), count):
        rows = slice(first, first + count)

        def take_rows(there: torch.Tensor, rows: slice = rows) -> None:
            take(rows, there)

        yield Slab(cut[rows], take_rows)


class StagingBuffer:
    """Pinned memory that a thread fills and the card copies from, in turns."""

    def __init__(self) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8)
        self._copied: torch.Event | None = None

    def reserve(self, num_bytes: int) -> None:
        """Wait until the card has read what is in it; a row larger than the buffer makes it larger."""
        if self._copied is not None:
            self._copied.synchronize()
            self._copied = None
        if len(self._bytes) < num_bytes:
            self._bytes = torch.empty(max(num_bytes, BUFFER_BYTES), dtype=torch.uint8, pin_memory=True)

    @torch.inference_mode()
    def fill(self, rows: torch.Tensor) -> torch.Tensor:
        """Copy the rows into it, on any thread; returns them in pinned memory."""
        there = self._bytes[: rows.nbytes].view(rows.dtype).view(rows.shape)
        return there.copy_(rows)

    def send(self, rows: torch.Tensor, device: torch.device) -> torch.Tensor:
        """Queue the copy of what `fill` returned; returns it on the device."""
        there = rows.to(device, non_blocking=True)
        self._copied = torch.Event("cuda")
        self._copied.record()
        return there


def send_all(work: Iterable[Slab], device: torch.device) -> Iterator[Slab]:
    """Bring slabs to the card in order, and yield each once `take` has been called. Errors of reading come in order, too."""
    ring = [StagingBuffer() for _ in range(NUM_BUFFERS)]
    reading: deque[tuple[Slab, StagingBuffer, Future[torch.Tensor]]] = deque()

    def send_oldest() -> Slab:
        slab, buffer, filled = reading.popleft()
        slab.take(buffer.send(filled.result(), device))
        return slab

    with ThreadPoolExecutor(NUM_THREADS, "load") as threads:
        try:
            for number, slab in enumerate(work):
                buffer = ring[number % NUM_BUFFERS]
                buffer.reserve(slab.rows.nbytes)
                reading.append((slab, buffer, threads.submit(buffer.fill, slab.rows)))
                if len(reading) > NUM_BUFFERS // 2:
                    yield send_oldest()
            while reading:
                yield send_oldest()
        finally:
            for _, _, filled in reading:
                filled.cancel()
            for buffer in ring:
                buffer.reserve(0)
