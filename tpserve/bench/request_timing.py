"""The times of one request, on any clock, and the latencies that follow from them. Pure.

    TTFT    time to first token: from sending a request to the first chunk with generated text
    TPOT    time per output token: from the first chunk to the last, divided by the tokens after the first; one value a request
    ITL     inter-token latency: from one chunk to the next; one value a chunk. With several tokens in a chunk, read TPOT
    E2EL    end-to-end latency: from sending a request to its last chunk

Without a server a chunk is a token, a request is sent when `LLM.generate` is called, and ITL in a batch is the time of a step.
"""

from collections.abc import Iterable, Sequence
from typing import Literal

import msgspec

Metric = Literal["ttft", "tpot", "itl", "e2el"]
LABELS: dict[Metric, str] = {"ttft": "TTFT", "tpot": "TPOT", "itl": "ITL", "e2el": "E2EL"}


class RequestTiming(msgspec.Struct, frozen=True):
    """Times in seconds. `begin_s`: send. `token_s`: each chunk. `end_s`: the last chunk, or the failure of a failed request."""

    begin_s: float
    token_s: Sequence[float]
    end_s: float
    output_tokens: int

    @property
    def ttft_s(self) -> float:
        """Seconds to the first chunk. A token without text, such as an ignored end of sequence, arrives with a later chunk."""
        return (self.token_s[0] if self.token_s else self.end_s) - self.begin_s

    @property
    def e2el_s(self) -> float:
        """Seconds to the last chunk."""
        return self.end_s - self.begin_s

    @property
    def tpot_s(self) -> float | None:
        """Mean seconds of a token after the first; None for a single token."""
        return (self.e2el_s - self.ttft_s) / (self.output_tokens - 1) if self.output_tokens > 1 else None

    @property
    def itl_s(self) -> list[float]:
        """Seconds from each chunk to the next."""
        return [later - earlier for earlier, later in zip(self.token_s, self.token_s[1:], strict=False)]


def seconds(timings: Iterable[RequestTiming]) -> dict[Metric, list[float]]:
    """All values of every metric, in seconds."""
    timings = list(timings)
    return {
        "ttft": [timing.ttft_s for timing in timings],
        "tpot": [timing.tpot_s for timing in timings if timing.tpot_s is not None],
        "itl": [value for timing in timings for value in timing.itl_s],
        "e2el": [timing.e2el_s for timing in timings],
    }
