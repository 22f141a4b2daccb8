"""The request bodies of /v1/messages and /v1/messages/count_tokens. Source: Anthropic's API reference, messages/create."""

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from tpserve.frontend.openai.schema import NEUTRAL, FieldRules, GenerationFields, Messages, Tools
from tpserve.types.sampling import Count


class ThinkingConfig(Struct, frozen=True):
    """`thinking`: whether the model reasons before it answers, and for how many tokens. `display` omitted: it is not shown."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Annotated[int, Meta(ge=0)] | None = None
    display: Literal["summarized", "omitted"] | None = None


class OutputConfig(Struct, frozen=True):
    """`output_config`: how much effort goes into an answer, and the form of its text."""

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: dict[str, Any] | None = None


class MessageInput(GenerationFields, frozen=True, kw_only=True):
    """What the prompt is made of: the body of /v1/messages/count_tokens."""

    messages: Messages
    system: str | list[dict[str, Any]] = ""
    thinking: ThinkingConfig | None = None
    tools: Tools = []
    tool_choice: dict[str, Any] = {}
    output_config: OutputConfig = OutputConfig()
    chat_template_kwargs: dict[str, Any] = {}


class MessageRequest(MessageInput, frozen=True, kw_only=True):
    """POST /v1/messages. `metadata` has no effect."""

    max_tokens: Count
    metadata: dict[str, Any] = {}
    service_tier: Literal["auto", "standard_only"] = "auto"


RULES = FieldRules(
    aliases={"stop_sequences": "stop"},
    labels=frozenset({"cache_control", "user_profile_id", "workspace_id"}),
    neutral={
        **NEUTRAL,
        "container": (),
        "context_management": ({"edits": []}, {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]}),
        "diagnostics": (),
        "inference_geo": (),
        "max_completion_tokens": (),
        "mcp_servers": ([],),
        "n": (1,),
        "output_format": (),
        "prompt_logprobs": (),
        "response_format": (),
        "speed": ("standard",),
    },
)
