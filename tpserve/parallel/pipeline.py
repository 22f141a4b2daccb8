"""Hidden states from stage to stage. Each rank talks to the rank of its own tensor-parallel place in the next stage.

Shapes are known to both sides from the plan, so nothing but the tensor crosses. Sends do not wait: a stage goes on to
its next plan while the last one's activations travel. What was sent is kept until `in_flight` later sends: by then the
plan's result is back, so it was received, and waiting for it is a formality (gloo frees a send only when waited for).
"""

from collections import deque

import torch
import torch.distributed as dist


class Pipeline:
    """One rank's place in the pipeline. `previous` and `next` are global ranks, None at the ends.

    `in_flight`: most plans that can be under way. `via_host`: the backend cannot send device memory (gloo with CUDA
    tensors, when ranks share a card).
    """

    def __init__(
        self, previous: int | None = None, next: int | None = None, *, in_flight: int = 1, via_host: bool = False
    ) -> None:
        self._previous = previous
        self._next = next
        self._in_flight = in_flight
        self._via_host = via_host
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
        hidden_TH = torch.empty((rows, width), dtype=dtype, device="cpu" if self._via_host else device)
        dist.recv(hidden_TH, src=self._previous)
        return hidden_TH.to(device)

    def send(self, hidden_TH: torch.Tensor) -> None:
        """Hand hidden states to the next stage without waiting for it."""
        assert self._next is not None
        while len(self._sent) > self._in_flight:
            work, _ = self._sent.popleft()
            if work is not None:
                work.wait()
        hidden_TH = (hidden_TH.cpu() if self._via_host else hidden_TH).contiguous()
        self._sent.append((dist.isend(hidden_TH, dst=self._next), hidden_TH))
