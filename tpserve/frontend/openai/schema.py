"""The request bodies of the API: the supported fields with their ranges, and the known fields that are refused.

Every field of a struct here is supported. `NEUTRAL` has the known fields that are not, with their values that have no effect; any
other value is an error that names the field. An unknown field is a warning, since clients send extras.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from tpserve.types.sampling import MAX_LOGPROBS, Count, MinP, RepetitionPenalty, Temperature, TopK, TopP

MAX_CHOICES = 128
MAX_BAD_WORDS = 128
MAX_BIASED_IDS = 1024
MAX_MESSAGES = 8192
MAX_CACHE_SALT_CHARS = 1024
MAX_DOCUMENTS = 1024
MAX_TOOLS = 1024

Choices = Annotated[int, Meta(ge=1, le=MAX_CHOICES)]
TokenId = Annotated[int, Meta(ge=0)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
StopString = Annotated[str, Meta(min_length=1, max_length=1024)]
NumLogprobs = Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)]
Messages = Annotated[list[dict[str, Any]], Meta(min_length=1, max_length=MAX_MESSAGES)]
Priority = Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)]
CacheSalt = Annotated[str, Meta(min_length=1, max_length=MAX_CACHE_SALT_CHARS)]
Tools = Annotated[list[dict[str, Any]], Meta(max_length=MAX_TOOLS)]
RequestId = Annotated[str, Meta(pattern=r"^[\x21-\x7e]{1,128}$")]
"""Printable ASCII, since it appears in a header and in log lines."""


class StreamOptions(Struct, frozen=True):
    """`include_usage`: a last chunk with token counts; `continuous_usage_stats`: counts in every chunk."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


class GenerationFields(Struct, frozen=True, kw_only=True):
    """The fields that all APIs share. `frontend/openai/grammar.py` reads those of structured output."""

    model: str | None = None
    temperature: Temperature = 1.0
    top_p: TopP = 1.0
    top_k: TopK = 0
    min_p: MinP = 0.0
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    repetition_penalty: RepetitionPenalty = 1.0
    logit_bias: Annotated[dict[int, Annotated[float, Meta(ge=-100, le=100)]], Meta(max_length=MAX_BIASED_IDS)] = {}
    allowed_token_ids: Annotated[list[TokenId], Meta(min_length=1)] | None = None
    bad_words: Annotated[list[Annotated[str, Meta(min_length=1, max_length=128)]], Meta(max_length=MAX_BAD_WORDS)] = []
    min_tokens: Annotated[int, Meta(ge=0)] = 0
    seed: int | None = None
    stop: StopString | Annotated[list[StopString], Meta(max_length=64)] = []
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=1024)] = []
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    priority: Priority = 0
    cache_salt: CacheSalt | None = None
    stream: bool = False
    background: bool = False
    request_id: RequestId | None = None
    structured_outputs: dict[str, Any] | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


class SamplingFields(GenerationFields, frozen=True, kw_only=True):
    """The fields that completions and chat completions share."""

    n: Choices = 1
    max_tokens: Count | None = None
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool = False
    truncate_prompt_tokens: Annotated[int, Meta(ge=-1)] | None = None
    truncation_side: Literal["left", "right"] = "left"
    prompt_logprobs: NumLogprobs | None = None
    stream_options: StreamOptions | None = None
    response_format: dict[str, Any] | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None


class CompletionRequest(SamplingFields, frozen=True, kw_only=True):
    """POST /v1/completions. `prompts.split_prompt` tells the forms of `prompt` apart."""

    prompt: str | list[Any]
    suffix: str = ""
    max_tokens: Annotated[int, Meta(ge=0)] | None = None
    logprobs: NumLogprobs | None = None
    echo: bool = False
    best_of: Choices | None = None
    add_special_tokens: bool = True

    @property
    def num_drawn(self) -> int:
        """The number of sequences to generate for each prompt."""
        return self.best_of or self.n

    @property
    def num_logprobs(self) -> int | None:
        """The number of top log probabilities per output token; None for none at all. `best_of` needs the drawn token's."""
        return 0 if self.logprobs is None and self.num_drawn > self.n else self.logprobs

    @property
    def num_echoed(self) -> int | None:
        """The number of top log probabilities per token of an echoed prompt; None without any."""
        return self.logprobs if self.echo else None

    @property
    def num_scored(self) -> int | None:
        """The number of top log probabilities that the engine computes per prompt token; None without any."""
        return max((count for count in (self.prompt_logprobs, self.num_echoed) if count is not None), default=None)

    @property
    def num_shown_scores(self) -> int:
        """The number of log probabilities in the response for each token of a prompt."""
        return self.n * sum(count + 1 for count in (self.prompt_logprobs, self.num_echoed) if count is not None)


class ChatCompletionRequest(SamplingFields, frozen=True, kw_only=True):
    """POST /v1/chat/completions. Special tokens come from the template, so encoding adds none by default."""

    messages: Messages
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = False
    chat_template_kwargs: dict[str, Any] = {}
    documents: Annotated[list[dict[str, Any]], Meta(max_length=MAX_DOCUMENTS)] = []
    tools: Tools = []
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool = True
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    enable_thinking: bool | None = None
    thinking_token_budget: Annotated[int, Meta(ge=0)] | None = None
    include_reasoning: bool = True
    separate_reasoning: bool = True
    max_completion_tokens: Count | None = None
    logprobs: bool = False
    top_logprobs: NumLogprobs | None = None

    @property
    def num_drawn(self) -> int:
        """The number of sequences to generate."""
        return self.n

    @property
    def num_logprobs(self) -> int | None:
        """The number of top log probabilities per output token; None for none at all."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def num_scored(self) -> int | None:
        """The number of top log probabilities that the engine computes per prompt token; None without any."""
        return self.prompt_logprobs

    @property
    def num_shown_scores(self) -> int:
        """The number of log probabilities in the response for each token of the prompt."""
        return 0 if self.prompt_logprobs is None else self.prompt_logprobs + 1


class TokenizeRequest(Struct, frozen=True, kw_only=True):
    """POST /tokenize with a text; with messages it is a `TokenizeChatRequest`."""

    prompt: str
    model: str | None = None
    add_special_tokens: bool = True
    return_token_strs: bool = False


class TokenizeChatRequest(Struct, frozen=True, kw_only=True):
    """POST /tokenize with messages: how the same fields of a `ChatCompletionRequest` would be tokenized."""

    messages: Messages
    model: str | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = False
    chat_template_kwargs: dict[str, Any] = {}
    tools: Tools = []
    return_token_strs: bool = False


class DetokenizeRequest(Struct, frozen=True, kw_only=True):
    """POST /detokenize."""

    tokens: list[Any]
    model: str | None = None


ALIASES = {
    "rid": "request_id",
    "json_schema": "guided_json",
    "regex": "guided_regex",
    "ebnf": "guided_grammar",
    "thinking_budget": "thinking_token_budget",
}
LABELS = frozenset({"user", "metadata", "safety_identifier", "prompt_cache_key"})
"""Labels of a client's own traffic. They have no effect, so they are accepted without a warning."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    # sampling
    "length_penalty": (1,),
    "best_of": (1,),
    "use_beam_search": (False,),
    "early_stopping": (False,),
    "logits_processors": ([],),
    # input
    "prompt_embeds": (),
    "input_ids": (),
    "chat_template": (),
    "lora_path": (),
    "mm_processor_kwargs": ({},),
    # output
    "echo": (False,),
    "spaces_between_special_tokens": (True,),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "verbosity": ("medium",),
    # tools and reasoning: chat completions have the rest
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "reasoning_effort": (),
    "enable_thinking": (),
    "thinking_token_budget": (),
    "include_reasoning": (True,),
    "separate_reasoning": (True,),
    "web_search_options": (),
    # service
    "store": (False,),
    "service_tier": ("auto", "default"),
    "kv_transfer_params": (),
    "vllm_xargs": ({},),
}
"""Known fields that are not supported, and their values without effect. null has no effect for any field."""


@dataclass(frozen=True)
class FieldRules:
    """How an API treats the names of fields beyond its schema. `aliases`: other spellings. `neutral`: the known fields that are
    not supported. `labels`: of a client's own traffic."""

    aliases: Mapping[str, str] = field(default_factory=dict)
    labels: frozenset[str] = frozenset()
    neutral: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)


OPENAI_RULES = FieldRules(ALIASES, LABELS, NEUTRAL)
