"""Pipeline parallelism: hidden states from stage to stage. Each rank sends to the rank with its own tensor-parallel rank in the
next stage.

Both sides know the shapes from the plan, so only the tensor crosses. Sends do not wait: a stage starts its next plan while the
activations travel. The last `in_flight` tensors stay referenced: the result of the plan before them is back, so its tensor was
received, and the wait returns at once (gloo frees a send only after a wait).
"""

from collections import deque

import torch
import torch.distributed as dist

from tpserve.parallel.group import lost_peers


class Pipeline:
    """One rank's neighbours in the pipeline. `previous` and `next` are global ranks, None at the ends.

    `in_flight`: the maximum number of plans in flight. `via_host`: copy through host memory, since the backend cannot send
    device memory (gloo with CUDA tensors, when ranks share a GPU).
    """

    def __init__(
        self, previous: int | None = None, next: int | None = None, *, in_flight: int = 1, via_host: bool = False
    ) -> None:
        self._previous = previous
        self._next = next
        self._in_flight = in_flight
        self._via_host = via_host
        self._sent: deque[tuple[dist.Work | None, torch.Tensor]] = deque()

    def connect(self, device: torch.device) -> None:
        """Pass a number on, so that the links exist and the backend has their buffers. Every rank calls this."""
        if not self.first:
            self.receive(1, 1, torch.float32, device)
        if not self.last:
            self.send(torch.zeros((1, 1), device=device))

    @property
    def first(self) -> bool:
        """Whether this is the first stage."""
        return self._previous is None

    @property
    def last(self) -> bool:
        """Whether this is the last stage."""
        return self._next is None

    def receive(self, rows: int, width: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Wait for the hidden states of the previous stage: [rows, width] on `device`. PeerLost when gloo's peer is dead."""
        assert self._previous is not None
        hidden_TH = torch.empty((rows, width), dtype=dtype, device="cpu" if self._via_host else device)
        with lost_peers():
            dist.recv(hidden_TH, src=self._previous)
        return hidden_TH.to(device)

    def send(self, hidden_TH: torch.Tensor) -> None:
        """Send hidden states [T, H] to the next stage without waiting for it. The caller must not overwrite them afterwards."""
        assert self._next is not None
        while len(self._sent) >= self._in_flight:
            work, _ = self._sent.popleft()
            if work is not None:
                with lost_peers():
                    work.wait()
        hidden_TH = (hidden_TH.cpu() if self._via_host else hidden_TH).contiguous()
        with lost_peers():
            self._sent.append((dist.isend(hidden_TH, dst=self._next), hidden_TH))
