"""A message and its stream of events. Source: Anthropic's API reference, messages and streaming.

message_start ping
content_block_start content_block_delta ... content_block_stop      of each block: thinking, text, tool_use
message_delta message_stop                                          or error
"""

from collections.abc import Sequence

import msgspec

from tpserve.engine_client.requests import RequestState
from tpserve.errors import UserError
from tpserve.frontend.anthropic.errors import anthropic_error
from tpserve.frontend.openai.encoder import Output
from tpserve.frontend.openai.errors import Json
from tpserve.frontend.openai.response_builder import ChatResponseBuilder, UsageCounter
from tpserve.text.assembler import OutputDelta

DELTAS = {
    "thinking": ("thinking_delta", "thinking"),
    "text": ("text_delta", "text"),
    "tool_use": ("input_json_delta", "partial_json"),
}
"""By the type of a block, the type of its deltas and their member."""


class MessageEncoder:
    """One message. `builder`: of the chat answer that it is made of. `max_tokens`: asked for; less may be left of the context."""

    def __init__(self, builder: ChatResponseBuilder, request_id: str, max_tokens: int) -> None:
        self._builder, self._reader, self._request_id = builder, builder.readers[0], request_id
        self._max_tokens = max_tokens
        self._counter = UsageCounter([builder.prompt], builder)
        self._blocks: list[Json] = []
        self._pieces: list[str] = []
        """Of the last block, while it is open."""
        self._is_open = False
        self._ending: Json = {"stop_reason": None, "stop_sequence": None}

    @property
    def output_tokens(self) -> int:
        return self._counter.output_tokens

    def opening(self) -> list[bytes]:
        return [sent("message_start", message=self._message()), sent("ping")]

    def deltas(self, sequence: RequestState, delta: OutputDelta) -> list[bytes]:
        self._counter.add(sequence, delta)
        events = list[bytes]()
        for part in self._reader.deltas(delta):
            if "reasoning" in part:
                events += self._add("thinking", part["reasoning"])
            elif "content" in part:
                events += self._add("text", part["content"])
            for call in part.get("tool_calls", ()):
                if "id" in call:
                    events += self._close()
                    events += self._open({"type": "tool_use", "id": call["id"], "name": call["function"]["name"], "input": {}})
                else:
                    events += self._add("tool_use", call["function"]["arguments"])
        if delta.finish is not None:
            events += self._close()
            self._ending = self._end_of(delta)
        return events

    def closing(self) -> list[bytes]:
        return [sent("message_delta", delta=self._ending, usage=self._usage()), sent("message_stop")]

    def failed(self, error: UserError, num_events: int | None = None) -> list[bytes]:
        return [b"event: error\ndata: " + msgspec.json.encode(anthropic_error(error, self._request_id)) + b"\n\n"]

    def whole(self, outputs: Sequence[Output]) -> bytes:
        for sequence, delta in outputs:
            self.deltas(sequence, delta)
        return msgspec.json.encode(self._message())

    def body(self) -> bytes:
        return b""

    def _add(self, kind: str, text: str) -> list[bytes]:
        """What a piece of a block adds; of text and thinking perhaps the block itself."""
        events = []
        if not self._is_open or self._blocks[-1]["type"] != kind:
            events += self._close()
            events += self._open({"type": kind, kind: ""} | ({"signature": ""} if kind == "thinking" else {}))
        self._pieces.append(text)
        delta, member = DELTAS[kind]
        return [*events, sent("content_block_delta", index=len(self._blocks) - 1, delta={"type": delta, member: text})]

    def _open(self, block: Json) -> list[bytes]:
        self._blocks.append(block)
        self._is_open = True
        return [sent("content_block_start", index=len(self._blocks) - 1, content_block=block)]

    def _close(self) -> list[bytes]:
        """The end of the last block, if it is open."""
        if not self._is_open:
            return []
        block, text = self._blocks[-1], "".join(self._pieces)
        self._is_open, self._pieces = False, []
        if block["type"] == "tool_use":
            block["input"] = arguments(text)
        else:
            block[block["type"]] = text
        return [sent("content_block_stop", index=len(self._blocks) - 1)]

    def _end_of(self, delta: OutputDelta) -> Json:
        if delta.finish == "length":
            is_full = self.output_tokens < self._max_tokens
            return {"stop_reason": "model_context_window_exceeded" if is_full else "max_tokens", "stop_sequence": None}
        if isinstance(delta.stop_reason, str):
            return {"stop_reason": "stop_sequence", "stop_sequence": delta.stop_reason}
        return {"stop_reason": "tool_use" if self._reader.num_calls else "end_turn", "stop_sequence": None}

    def _message(self) -> Json:
        meta = self._builder.meta
        message = {
            "id": f"msg_{self._request_id}",
            "type": "message",
            "role": "assistant",
            "model": meta.model,
            "content": self._blocks,
            **self._ending,
            "usage": self._usage(),
        }
        return message | ({"warnings": meta.warnings} if meta.warnings else {})

    def _usage(self) -> Json:
        """Tokens so far. What was found in the prefix cache counts apart."""
        usage = self._counter.usage()
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        return {
            "input_tokens": usage["prompt_tokens"] - cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": cached,
            "output_tokens": usage["completion_tokens"],
        }


def sent(kind: str, **fields: object) -> bytes:
    """An event."""
    return b"event: " + kind.encode() + b"\ndata: " + msgspec.json.encode({"type": kind, **fields}) + b"\n\n"


def arguments(text: str) -> Json:
    """The object that a call's arguments are; an empty one for those that were cut off or are none."""
    try:
        value = msgspec.json.decode(text)
    except msgspec.DecodeError:
        return {}
    return value if isinstance(value, dict) else {}
