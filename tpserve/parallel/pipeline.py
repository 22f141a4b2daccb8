"""Hidden states from stage to stage. Each rank talks to the rank of its own tensor-parallel place in the next stage.

Shapes are known to both sides from the plan, so nothing but the tensor crosses. Sends do not wait: a stage goes on to
its next plan while the last one's activations travel; their buffers are kept alive until delivered.
"""

from collections import deque

import torch
import torch.distributed as dist


class Pipeline:
    """One rank's place in the pipeline. `previous` and `next` are global ranks, None at the ends."""

    def __init__(self, previous: int | None = None, next: int | None = None) -> None:
        self._previous = previous
        self._next = next
        self._sent: deque[tuple[dist.Work | None, torch.Tensor]] = deque()

    @property
    def first(self) -> bool:
        return self._previous is None

    @property
    def last(self) -> bool:
        return self._next is None

    def receive(self, rows: int, width: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Wait for the previous stage's hidden states [rows, width]."""
        assert self._previous is not None
        hidden_TH = torch.empty((rows, width), dtype=dtype, device=device)
        dist.recv(hidden_TH, src=self._previous)
        return hidden_TH

    def send(self, hidden_TH: torch.Tensor) -> None:
        """Hand hidden states to the next stage without waiting for it."""
        assert self._next is not None
        while self._sent and (self._sent[0][0] is None or self._sent[0][0].is_completed()):
            self._sent.popleft()
        hidden_TH = hidden_TH.contiguous()
        self._sent.append((dist.isend(hidden_TH, dst=self._next), hidden_TH))
