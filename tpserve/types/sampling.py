"""Sampling parameters as the engine needs them. Stop strings are not here: the frontend handles them."""

from typing import Annotated, Any

from msgspec import Meta, Struct, to_builtins

MAX_LOGPROBS = 20
"""The largest number of most likely tokens that a request may ask for at each position."""

Temperature = Annotated[float, Meta(ge=0, le=2)]
TopP = Annotated[float, Meta(gt=0, le=1)]
TopK = Annotated[int, Meta(ge=-1)]
MinP = Annotated[float, Meta(ge=0, le=1)]
RepetitionPenalty = Annotated[float, Meta(ge=0.01, le=100)]
Count = Annotated[int, Meta(ge=1)]


class SamplingDefaults(Struct, frozen=True, omit_defaults=True, kw_only=True):
    """Default sampling parameters of a model's requests, from its files or from the operator; None: no default.

    Names and bounds are those of a request. `unsupported`: fields of the file that tpserve does not support. `source`: the origin
    of the defaults, for the log; empty when there are none.
    """

    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: TopK | None = None
    min_p: MinP | None = None
    repetition_penalty: RepetitionPenalty | None = None
    max_tokens: Count | None = None
    unsupported: tuple[str, ...] = ()
    source: str = ""

    def specified(self) -> dict[str, Any]:
        """The parameters that have a default, by name."""
        return {name: value for name, value in to_builtins(self).items() if name not in ("unsupported", "source")}


class EngineSamplingParams(Struct, frozen=True, array_like=True):
    """One request's sampling parameters, validated by the frontend, as the sampling rank reads them.

    `temperature` 0 is greedy. `max_tokens` counts generated tokens. `stop_token_ids` always end the sequence;
    `ignore_eos` disables only the model's own end-of-sequence ids.
    `logprobs`: None for none, n >= 0 for the chosen token and the n most likely ones (of the raw logits).
    `top_k` 0 is off. Presence and frequency penalty count generated tokens, repetition penalty sees the prompt as well.
    `logit_bias`: (id, bias) pairs, each id once; `allowed_token_ids`: distinct, empty for all.
    `bad_words`: token sequences that a generated token must not complete.
    `min_tokens`: no token ends the sequence before this many are generated.
    `prompt_logprobs`: as `logprobs`, for every token of the prompt but the first; with it `max_tokens` may be 0.
    `grammar`: the language of the output in llguidance's form, empty for any text; its end ends the sequence.
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
    grammar: str = ""
