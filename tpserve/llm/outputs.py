"""What `generate` returns, in vLLM's names. Plain data: it also crosses between the scripts of a torchrun job, as msgpack."""

from collections.abc import Sequence
from typing import Literal

from msgspec import Struct

from tpserve.engine_client.requests import RequestState
from tpserve.text.assembler import OutputDelta
from tpserve.text.logprob_entries import PromptScores
from tpserve.text.logprobs import pairs
from tpserve.text.tokenizer import Tokenizer
from tpserve.types.plan import TokenLogprobs


class Logprob(Struct, frozen=True):
    """A token's natural log probability. `rank`: 1 for the likeliest; None for a token that is not among those asked for."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


class CompletionOutput(Struct, frozen=True):
    """One choice. `stop_reason`: the stop string or token that ended it, None for the model's own end or `max_tokens`.

    `logprobs`: for each token the likeliest ones by id, and its own; with them `cumulative_logprob` is the sum of the chosen.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None
    logprobs: list[dict[int, Logprob]] | None
    finish_reason: Literal["stop", "length", "abort", "error"] | None
    stop_reason: int | str | None


class RequestStateStats(Struct, frozen=True):
    """When things happened to one prompt, all its choices together.

    `arrival_time` is when the call began, in seconds since 1970, and `first_token_latency` counts from there. All `_ts` are
    seconds of the monotonic clock of rank 0's host: given to the scheduler, first planned, first and last token. `token_ts`,
    which vLLM does not have: every token.
    """

    arrival_time: float
    first_token_latency: float
    queued_ts: float
    scheduled_ts: float
    first_token_ts: float
    last_token_ts: float
    num_generation_tokens: int
    token_ts: list[float]

    @staticmethod
    def of(sequences: Sequence[RequestState], arrival_time: float, arrived_s: float) -> "RequestStateStats":
        """Of sequences that have ended, each of which has a token. `arrived_s`: the call's begin on the monotonic clock."""
        token_ts = sorted(token_s for sequence in sequences for token_s in sequence.token_s)
        return RequestStateStats(
            arrival_time=arrival_time,
            first_token_latency=token_ts[0] - arrived_s,
            queued_ts=sequences[0].arrived_s,
            scheduled_ts=sequences[0].arrived_s + min(sequence.queue_s for sequence in sequences),
            first_token_ts=token_ts[0],
            last_token_ts=token_ts[-1],
            num_generation_tokens=len(token_ts),
            token_ts=token_ts,
        )


class RequestOutput(Struct, frozen=True):
    """The answer to one prompt. `prompt` is None for a prompt given as ids; the first of `prompt_logprobs` is None."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: list[dict[int, Logprob] | None] | None
    outputs: list[CompletionOutput]
    metrics: RequestStateStats
    finished: bool = True
    num_cached_tokens: int = 0


class OutputBuilder:
    """Builds outputs of one request. `detokenize` false: ids only."""

    def __init__(self, tokenizer: Tokenizer, detokenize: bool) -> None:
        self._tokenizer = tokenizer
        self._detokenize = detokenize

    def completion(self, index: int, delta: OutputDelta, num_top: int | None) -> CompletionOutput:
        """A choice from the one piece of its sequence."""
        entries = [(entry.token, entry.logprobs) for entry in delta.entries if entry.logprobs is not None]
        return CompletionOutput(
            index=index,
            text=delta.text if self._detokenize else "",
            token_ids=delta.tokens,
            cumulative_logprob=None if num_top is None else sum(logprobs.chosen for _, logprobs in entries),
            logprobs=None if num_top is None else [self._position(token, logprobs) for token, logprobs in entries],
            finish_reason=delta.finish,
            stop_reason=delta.stop_reason,
        )

    def prompt(self, scores: PromptScores, num_top: int) -> list[dict[int, Logprob] | None]:
        """A prompt's log probabilities, position by position."""
        known = [scores.at(position, num_top) for position in range(len(scores.ids))]
        return [
            None if logprobs is None else self._position(token, logprobs)
            for token, logprobs in zip(scores.ids, known, strict=True)
        ]

    def _position(self, token: int, logprobs: TokenLogprobs) -> dict[int, Logprob]:
        found = {other: self._one(other, value, rank) for rank, (other, value) in enumerate(pairs(logprobs), 1)}
        found.setdefault(token, self._one(token, logprobs.chosen, None))
        return found

    def _one(self, token: int, value: float, rank: int | None) -> Logprob:
        return Logprob(value, rank, self._tokenizer.token_text(token) if self._detokenize else None)
