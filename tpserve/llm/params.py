"""`SamplingParams`, with vLLM's names and defaults. Its values pass the same checks as a request over HTTP."""

import dataclasses
import difflib
from dataclasses import dataclass
from typing import Any, Self

from tpserve.errors import UserError
from tpserve.frontend.openai.body import parse
from tpserve.frontend.openai.params import refuse_contradictions
from tpserve.frontend.openai.schema import NEUTRAL, CompletionRequest


@dataclass
class StructuredOutputsParams:
    """The language of the output, in vLLM's names: one of the first six fields. docs/offline.md describes them."""

    json: str | dict[str, Any] | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: str | None = None
    disable_any_whitespace: bool = False
    disable_additional_properties: bool = False
    whitespace_pattern: str | None = None


@dataclass
class SamplingParams:
    """How to sample the output of a prompt. Raises UserError that names the wrong field.

    `max_tokens`: None takes the rest of the context; a larger number is cut to it. `n` choices are returned out of `best_of`
    generated ones, those with the highest mean log probability. `temperature` 0 is greedy. `stop` strings are left out of the
    text unless `include_stop_str_in_output`. `logprobs` and `prompt_logprobs`: the number of most likely tokens to return for
    each position, besides the actual token. Without `detokenize` texts are empty.
    """

    n: int = 1
    best_of: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = None
    structured_outputs: StructuredOutputsParams | dict[str, Any] | None = None

    def __new__(cls, *args: Any, **fields: Any) -> Self:
        names = [field.name for field in dataclasses.fields(cls)]
        for name in fields.keys() - names:
            if name in NEUTRAL:
                raise UserError(f"{name} is not supported by tpserve: leave it out", param=name, code="unsupported_parameter")
            near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
            hint = f": did you mean {near[0]}?" if near else f": known are {', '.join(names)}"
            raise UserError(f"unknown sampling parameter {name}{hint}", param=name)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        self.call()

    def call(self, **more: Any) -> CompletionRequest:
        """Returns the equivalent HTTP request without a prompt. `more`: further fields of the request.

        Raises UserError. The fields are checked again, since they may have changed after construction.
        """
        fields: dict[str, Any] = dataclasses.asdict(self) | more
        if not fields.pop("detokenize") and self.stop:
            raise UserError("stop strings need detokenize=True: leave one of them out", param="stop", code="invalid_value")
        if self.max_tokens == 0:
            raise UserError("max_tokens: must be at least 1, got 0", param="max_tokens", code="invalid_value")
        call, _ = parse({**fields, "prompt": ""}, CompletionRequest, set())
        refuse_contradictions(call)
        return call
