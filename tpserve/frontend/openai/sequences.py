"""The engine requests of an API request: one for each choice of each prompt.

Owns their number and their differences. The choices of a prompt differ only in `choice`, except that the prompt is scored once,
for the first choice. With a seed, each prompt of a list gets the same answer as if it were sent alone. `params_of` does all
checks, so its result can be admitted.
"""

import secrets
from collections.abc import Callable, Iterator, Sequence

from msgspec.structs import replace

from tpserve.errors import UserError
from tpserve.frontend.openai.grammar import field_of_grammar
from tpserve.frontend.openai.params import sampling_params, with_length
from tpserve.frontend.openai.prompts import Prompt
from tpserve.frontend.openai.schema import ChatCompletionRequest, CompletionRequest
from tpserve.frontend.openai.service import ModelLimits, OpenAIServing
from tpserve.text.assembler import Assembler
from tpserve.text.logprob_entries import PromptScores
from tpserve.types.packed import pack
from tpserve.types.request import Request
from tpserve.types.sampling import EngineSamplingParams

MAX_SENT_TOKENS = 1 << 23
"""The prompt tokens of all sequences of a request. One frame carries them to the engine: 32 MiB, half of the frame's bound."""
MAX_SENT_ALLOWED = 1 << 20
"""The allowed token ids of all sequences of a request, in the same frame."""
MAX_SENT_GRAMMAR_BYTES = 16 << 20
"""The grammars of all sequences of a request, in the same frame."""
MAX_SHOWN_SCORES = 1 << 21
"""The log probabilities of prompts in one answer; in vLLM's format about 150 MB of JSON."""


async def params_of(
    service: OpenAIServing,
    call: CompletionRequest | ChatCompletionRequest,
    prompts: Sequence[Prompt],
    sizes: Sequence[int],
    limits: ModelLimits,
    grammar: str = "",
) -> list[EngineSamplingParams]:
    """The sampling parameters of each prompt. `sizes`: `max_tokens` of each prompt. UserError names a field."""
    field = "best_of" if call.num_drawn > call.n else "n"
    service.refuse_too_many(len(prompts) * call.num_drawn, field)
    num_tokens = sum(len(prompt.ids) for prompt in prompts)
    num_allowed = len(prompts) * call.num_drawn * len(call.allowed_token_ids or ())
    if num_allowed > MAX_SENT_ALLOWED:
        raise UserError(
            f"allowed_token_ids times prompts times {field} are {num_allowed}, this server takes {MAX_SENT_ALLOWED} at once; "
            "split the request",
            param="allowed_token_ids",
        )
    if num_tokens * call.num_drawn > MAX_SENT_TOKENS:
        raise UserError(
            f"the request's prompts times {field} have {num_tokens * call.num_drawn} tokens, this server takes {MAX_SENT_TOKENS} "
            "at once; split it",
            param=field if call.num_drawn > 1 else "prompt",
        )
    refuse_too_many_scores(call, num_tokens)
    params = sampling_params(call, service.tokenizer, limits, grammar)
    if grammar:
        await service.grammars.check(grammar, field_of_grammar(call))
        if (sent := len(prompts) * call.num_drawn * len(grammar)) > MAX_SENT_GRAMMAR_BYTES:
            raise UserError(
                f"the grammar times prompts times {field} has {sent} bytes, this server takes {MAX_SENT_GRAMMAR_BYTES} at once; "
                "split the request",
                param=field,
            )
    return [with_length(params, size) for size in sizes]


def random_seed() -> int:
    """A seed of 64 random bits."""
    return secrets.randbits(64)


def requests_of(
    service: OpenAIServing,
    call: CompletionRequest | ChatCompletionRequest,
    prompts: Sequence[Prompt],
    params: Sequence[EngineSamplingParams],
    shown: frozenset[int] = frozenset(),
    draw_seed: Callable[[], int] = random_seed,
) -> list[tuple[Request, Assembler]]:
    """All choices of all prompts, in order, each with the assembler of its output. Without a seed each draws one.

    `shown`: special tokens that outputs show all the same.
    """

    def choices(prompt: Prompt, params: EngineSamplingParams) -> Iterator[tuple[Request, Assembler]]:
        packed, scores = pack(prompt.ids), None if call.num_scored is None else PromptScores(prompt.ids)
        for choice in range(call.num_drawn):
            request = Request(
                id=service.request_table.next_id(),
                prompt=packed,
                params=params if choice == 0 else replace(params, prompt_logprobs=None),
                seed=draw_seed() if call.seed is None else call.seed % 2**64,
                choice=choice,
                priority=call.priority,
                cache_salt=call.cache_salt or "",
            )
            assembler = Assembler(
                service.tokenizer,
                prompt.ids,
                stop=call.stops,
                stop_token_ids=call.stop_token_ids,
                include_stop=call.include_stop_str_in_output,
                min_tokens=call.min_tokens,
                skip_special_tokens=call.skip_special_tokens,
                scores=scores,
                num_open=prompt.num_open,
                shown=shown,
            )
            yield request, assembler

    return [each for prompt, own in zip(prompts, params, strict=True) for each in choices(prompt, own)]


def refuse_too_many_scores(call: CompletionRequest | ChatCompletionRequest, num_tokens: int) -> None:
    """UserError when the answer would have too many log probabilities of prompts; every choice repeats those of its prompt."""
    shown = num_tokens * call.num_shown_scores
    if shown > MAX_SHOWN_SCORES:
        field = "prompt_logprobs" if call.prompt_logprobs is not None else "logprobs"
        raise UserError(
            f"{field}: the answer would hold {shown} log probabilities of prompts, this server sends {MAX_SHOWN_SCORES} at most; "
            "ask for fewer or split the request",
            param=field,
            code="invalid_value",
        )
