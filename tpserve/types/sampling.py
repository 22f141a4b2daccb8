"""What the engine must know to choose a request's next token. Stop *strings* are the frontend's and do not appear here."""

from msgspec import Struct


class SamplingParams(Struct, frozen=True, array_like=True):
    """One request's sampling parameters, validated by the frontend, as the sampling rank reads them. Defaults ask for nothing.

    `temperature` 0 is greedy. `max_tokens` counts generated tokens. `stop_token_ids` always end the sequence;
    `ignore_eos` disables only the model's own end-of-sequence ids.
    `logprobs`: None for none, n >= 0 for the chosen token and the n most likely ones (of the raw logits).
    `top_k` 0 is off. Presence and frequency penalty count generated tokens, repetition penalty sees the prompt as well.
    `logit_bias`: (id, bias) pairs, each id once; `allowed_token_ids`: distinct, empty for all.
    `bad_words`: token sequences of which no one is completed by a generated token.
    `min_tokens`: so many tokens are generated before one may end the sequence.
    `prompt_logprobs`: as `logprobs`, for every token of the prompt but the first; with it `max_tokens` may be 0.
    """

    temperature: float = 1.0
    max_tokens: int = 16
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed_token_ids: tuple[int, ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()
    min_tokens: int = 0
    prompt_logprobs: int | None = None
