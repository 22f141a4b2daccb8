"""The request body of /v1/responses, and the known fields that are refused. Source: OpenAI's API reference, responses/create."""

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from tpserve.frontend.openai.schema import NEUTRAL, FieldRules, GenerationFields, NumLogprobs, Tools
from tpserve.types.sampling import Count

MAX_ITEMS = 8192
LOGPROBS = "message.output_text.logprobs"
INCLUDABLE = (LOGPROBS, "reasoning.encrypted_content")
"""Values of `include`. Reasoning is in `content` as it is, so that nothing is encrypted."""

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
Metadata = Annotated[dict[str, Annotated[str, Meta(max_length=512)]], Meta(max_length=16)]
Items = Annotated[list[dict[str, Any]], Meta(max_length=MAX_ITEMS)]


class TextConfig(Struct, frozen=True):
    """`text`: the form of the output."""

    format: dict[str, Any] | None = None
    verbosity: Literal["medium"] | None = None


class ReasoningConfig(Struct, frozen=True):
    """`reasoning`. There are no summaries: reasoning is shown as it is."""

    effort: Effort | None = None
    summary: Literal["auto"] | None = None
    generate_summary: Literal["auto"] | None = None


class ResponseStreamOptions(Struct, frozen=True):
    """`stream_options`. Nothing is obfuscated, so either value is taken."""

    include_obfuscation: bool = False


class InputFields(GenerationFields, frozen=True, kw_only=True):
    """What the prompt is made of: the body of /v1/responses/input_tokens."""

    input: str | Items = []
    instructions: str | None = None
    previous_response_id: str | None = None
    parallel_tool_calls: bool = True
    reasoning: ReasoningConfig = ReasoningConfig()
    text: TextConfig = TextConfig()
    tool_choice: str | dict[str, Any] | None = None
    tools: Tools = []
    truncation: Literal["auto", "disabled"] = "disabled"
    chat_template_kwargs: dict[str, Any] = {}
    enable_thinking: bool | None = None
    thinking_token_budget: Annotated[int, Meta(ge=0)] | None = None


class ResponseRequest(InputFields, frozen=True, kw_only=True):
    """POST /v1/responses. `store` null is true where the server keeps answers."""

    include: list[Literal["message.output_text.logprobs", "reasoning.encrypted_content"]] = []
    max_output_tokens: Count | None = None
    max_tool_calls: Count | None = None
    metadata: Metadata = {}
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    safety_identifier: str | None = None
    service_tier: Literal["auto", "default"] | None = None
    store: bool | None = None
    stream_options: ResponseStreamOptions = ResponseStreamOptions()
    top_logprobs: NumLogprobs | None = None
    user: str | None = None


RULES = FieldRules(
    aliases={"rid": "request_id", "thinking_budget": "thinking_token_budget"},
    neutral={
        **NEUTRAL,
        "access_programs": (),
        "background_options": ({},),
        "context_management": ([],),
        "conversation": (),
        "image": (),
        "max_completion_tokens": (),
        "max_tokens": (),
        "moderation": (),
        "n": (1,),
        "prompt": (),
        "prompt_cache_options": ({},),
        "prompt_logprobs": (),
        "response_format": (),
    },
)
