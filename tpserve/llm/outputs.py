"""The outputs of `LLM.generate` and `LLM.chat`, with vLLM's names. Plain data, since it also travels as msgpack between the
scripts of a torchrun job."""

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
    """A token's natural log probability. `rank`: 1 for the most likely token; None for a token outside the requested top ones."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


class CompletionOutput(Struct, frozen=True):
    """One choice.

    `stop_reason`: the stop string or token id that ended it; None for the model's own end of sequence or `max_tokens`.
    `logprobs`: for each generated token a dict by token id, of the most likely tokens and the generated one.
    `cumulative_logprob`: the sum over the generated tokens; None unless `logprobs` are requested.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None
    logprobs: list[dict[int, Logprob]] | None
    finish_reason: Literal["stop", "length", "abort", "error"] | None
    stop_reason: int | str | None


class RequestStateStats(Struct, frozen=True):
    """The times of one prompt, over all its choices.

    `arrival_time` is the start of the call in seconds since 1970, and `first_token_latency` is the time from there to the first
    token. The fields in `_ts` are seconds of the monotonic clock on rank 0's host: queued in the scheduler, first scheduled,
    first and last token. `token_ts` holds the time of every token; vLLM has no such field.
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
        """Built from ended sequences with at least one token each. `arrived_s`: start of the call on the monotonic clock."""
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
    """The output for one prompt. `prompt` is None for a prompt of token ids; the first entry of `prompt_logprobs` is None."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: list[dict[int, Logprob] | None] | None
    outputs: list[CompletionOutput]
    metrics: RequestStateStats
    finished: bool = True
    num_cached_tokens: int = 0


class OutputBuilder:
    """Builds the outputs of one request. Without `detokenize` they hold token ids and no text."""

    def __init__(self, tokenizer: Tokenizer, detokenize: bool) -> None:
        self._tokenizer = tokenizer
        self._detokenize = detokenize

    def completion(self, index: int, delta: OutputDelta, num_top: int | None) -> CompletionOutput:
        """A choice, from the one delta that holds its whole output. `num_top`: log probabilities a token; None for none."""
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
        """The log probabilities of a prompt, one entry a position."""
        positions = [scores.at(position, num_top) for position in range(len(scores.ids))]
        return [
            None if logprobs is None else self._position(token, logprobs)
            for token, logprobs in zip(scores.ids, positions, strict=True)
        ]

    def _position(self, token: int, logprobs: TokenLogprobs) -> dict[int, Logprob]:
        entries = {other: self._logprob(other, value, rank) for rank, (other, value) in enumerate(pairs(logprobs), 1)}
        entries.setdefault(token, self._logprob(token, logprobs.chosen, None))
        return entries

    def _logprob(self, token: int, value: float, rank: int | None) -> Logprob:
        return Logprob(value, rank, self._tokenizer.token_text(token) if self._detokenize else None)
