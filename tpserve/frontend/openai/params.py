"""Sampling parameters of a request. Checks token ids against the vocabulary and fields against each other."""

from msgspec.structs import replace

from tpserve.errors import UserError
from tpserve.frontend.openai.schema import ChatCompletionRequest, CompletionRequest
from tpserve.frontend.openai.service import ModelLimits
from tpserve.frontend.openai.token_ids import check_ids, refuse_unknown
from tpserve.text.tokenizer import Tokenizer
from tpserve.types.sampling import EngineSamplingParams

GREEDY_BELOW = 1e-5
"""A smaller temperature counts as 0, as in vLLM: float32 cannot represent logits divided by it."""


def refuse_contradictions(call: CompletionRequest | ChatCompletionRequest) -> None:
    """UserError when fields that are valid by themselves contradict each other."""
    streams = "does not go with stream true; leave one of them out"
    rules = [
        ("seed", call.seed is not None and not -(2**63) <= call.seed < 2**64, "must fit 64 bits"),
        ("stream_options", call.stream_options is not None and not call.stream, "needs stream true"),
        ("prompt_logprobs", call.prompt_logprobs is not None and call.stream, streams),
    ]
    if isinstance(call, ChatCompletionRequest):
        rules.append(("top_logprobs", call.top_logprobs is not None and not call.logprobs, "needs logprobs true"))
    else:
        rules.append(("suffix", bool(call.suffix) and call.echo, "does not go with echo true; leave one of them out"))
        cut = call.truncate_prompt_tokens is not None
        rules.append(("truncate_prompt_tokens", bool(call.suffix) and cut, "does not go with suffix; leave one of them out"))
        rules.append(("max_tokens", call.max_tokens == 0 and not call.echo, "is 0, which needs echo true"))
        rules.append(("best_of", call.num_drawn < call.n, f"is {call.best_of}, and n {call.n}; raise the one or lower the other"))
        rules.append(("best_of", call.num_drawn > call.n and call.stream, f"above n {streams}"))
    for param, broken, text in rules:
        if broken:
            raise UserError(f"{param} {text}", param=param, code="invalid_value")


def sampling_params(
    call: CompletionRequest | ChatCompletionRequest, tokenizer: Tokenizer, limits: ModelLimits, grammar: str = ""
) -> EngineSamplingParams:
    """The parameters that all sequences of a request share: all but `max_tokens`. UserError names the wrong field.

    `grammar`: of the output, empty for any text.
    """
    vocab_size = limits.vocab_size
    if len(call.allowed_token_ids or ()) > vocab_size:
        raise UserError(
            f"allowed_token_ids has {len(call.allowed_token_ids or ())} ids, the model's vocabulary {vocab_size}",
            param="allowed_token_ids",
            code="invalid_value",
        )
    allowed = sorted({*(call.allowed_token_ids or ())})
    check_ids(call.stop_token_ids, vocab_size, "stop_token_ids")
    check_ids(list(call.logit_bias), vocab_size, "logit_bias")
    check_ids(allowed, vocab_size, "allowed_token_ids")
    bad_words = _bad_words(call.bad_words, tokenizer, limits)
    if allowed and all((id,) in bad_words for id in allowed):
        raise UserError("bad_words leave none of allowed_token_ids to draw", param="bad_words", code="invalid_value")
    return EngineSamplingParams(
        temperature=0.0 if call.temperature < GREEDY_BELOW else call.temperature,
        ignore_eos=call.ignore_eos,
        stop_token_ids=tuple(call.stop_token_ids),
        logprobs=call.num_logprobs,
        top_k=call.top_k if 0 < call.top_k < vocab_size else 0,
        top_p=call.top_p,
        min_p=call.min_p,
        presence_penalty=call.presence_penalty,
        frequency_penalty=call.frequency_penalty,
        repetition_penalty=call.repetition_penalty,
        logit_bias=tuple(sorted(call.logit_bias.items())),
        allowed_token_ids=tuple(allowed),
        bad_words=bad_words,
        min_tokens=call.min_tokens,
        prompt_logprobs=call.num_scored,
        grammar=grammar,
    )


def with_length(params: EngineSamplingParams, max_tokens: int) -> EngineSamplingParams:
    """The parameters of a sequence that may generate `max_tokens`."""
    if params.min_tokens > max_tokens:
        raise UserError(
            f"min_tokens is {params.min_tokens}, and max_tokens {max_tokens}; lower the one or raise the other",
            param="min_tokens",
            code="invalid_value",
        )
    return replace(params, max_tokens=max_tokens)


def _bad_words(words: list[str], tokenizer: Tokenizer, limits: ModelLimits) -> tuple[tuple[int, ...], ...]:
    """The token ids of each word, once at the beginning of a text and once after a space."""
    sequences: dict[tuple[int, ...], None] = {}
    for index, word in enumerate(words):
        spellings = [tokenizer.encode(space + word.lstrip(" "), add_special_tokens=False) for space in ("", " ")]
        if not word.strip(" ") or not all(spellings):
            raise UserError(f"bad_words[{index}] has no tokens of its own", param=f"bad_words[{index}]", code="invalid_value")
        for ids in spellings:
            refuse_unknown(ids, tokenizer, limits, f"bad_words[{index}]")
            sequences[tuple(ids)] = None
    return tuple(sequences)
