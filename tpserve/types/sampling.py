"""What the engine must know to choose a request's next token. Stop *strings* are the frontend's and do not appear here."""

from msgspec import Struct


class SamplingParams(Struct, frozen=True, array_like=True):
    """One request's sampling parameters, validated by the frontend, as the sampling rank reads them.

    `temperature` 0 is greedy. `max_tokens` counts generated tokens. `stop_token_ids` always end the sequence;
    `ignore_eos` disables only the model's own end-of-sequence ids.
    `logprobs`: None for none, n >= 0 for the chosen token and the n most likely ones (of the raw logits).
    """

    temperature: float = 1.0
    max_tokens: int = 16
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None
