"""A response object and its stream of events. Source: OpenAI's API reference, responses/object and responses/streaming.

    created [queued] in_progress                      the opening
    output_item.added                                 of each item: reasoning, a message, a call
        content_part.added  X.delta ...  X.done  content_part.done      of reasoning and messages
        function_call_arguments.delta ...  .done                        of calls
    output_item.done
    completed | incomplete | failed

`sequence_number` counts the events from 0 on. What a token adds is an event of its own in a stepwise stream, so that the numbers
of an answer that is made again are the same.
"""

import threading
from collections.abc import Sequence

import msgspec

from tpserve.engine_client.requests import RequestState
from tpserve.errors import UserError
from tpserve.frontend.openai.encoder import Output
from tpserve.frontend.openai.errors import Json
from tpserve.frontend.openai.response_builder import ChatResponseBuilder, UsageCounter
from tpserve.text.assembler import OutputDelta
from tpserve.text.logprobs import chat_logprobs

CANCELLED = "response_cancelled"
"""The code of the error with which a response ends that its client has cancelled."""
TEXT_PARTS = {"message": "output_text", "reasoning": "reasoning_text"}
PREFIXES = {"message": "msg", "reasoning": "rs", "function_call": "fc"}


class ResponseEncoder:
    """One response. `fields`: what of its object does not change. `builder`: of the chat answer that it is made of."""

    def __init__(self, builder: ChatResponseBuilder, fields: Json, answer_id: str, *, background: bool) -> None:
        self._builder, self._reader = builder, builder.readers[0]
        self._fields, self._answer_id, self._background = fields, answer_id, background
        self._counter = UsageCounter([builder.prompt], builder)
        self._status = "queued" if background else "in_progress"
        self._error: Json | None = None
        self._usage: Json | None = None
        self._items: list[Json] = []
        self._pieces: list[str] = []
        """Of the text of the last item, while it is open."""
        self._logprobs: list[Json] = []
        self._is_open = False
        self._num_events = 0
        self._lock = threading.Lock()
        """A large delta is encoded in a thread, meanwhile the response may be cancelled."""

    @property
    def output_tokens(self) -> int:
        return self._counter.output_tokens

    def opening(self) -> list[bytes]:
        kinds = ["created", "queued"] if self._background else ["created"]
        events = [self._event(f"response.{kind}", response=self._object()) for kind in kinds]
        self._status = "in_progress"
        return [*events, self._event("response.in_progress", response=self._object())]

    def deltas(self, sequence: RequestState, delta: OutputDelta) -> list[bytes]:
        with self._lock:
            return self._deltas(sequence, delta) if self._status == "in_progress" else []

    def _deltas(self, sequence: RequestState, delta: OutputDelta) -> list[bytes]:
        self._counter.add(sequence, delta)
        events, parts = list[bytes](), list(self._reader.deltas(delta))
        logprobs = self._logprobs_of(delta, parts)
        for part in parts:
            if "reasoning" in part:
                events += self._text("reasoning", part["reasoning"], [])
            elif "content" in part:
                events += self._text("message", part["content"], logprobs)
                logprobs = []
            for call in part.get("tool_calls", ()):
                events += self._call(call)
        if delta.finish is not None:
            self._status = "incomplete" if delta.finish == "length" else "completed"
            self._usage = self._shown_usage()
            events += self._close(self._status)
        return events

    def closing(self) -> list[bytes]:
        return [self._event(f"response.{self._status}", response=self._object())]

    def failed(self, error: UserError, num_events: int | None = None) -> list[bytes]:
        with self._lock:
            return self._failed(error, self._num_events if num_events is None else num_events)

    def _failed(self, error: UserError, num_events: int) -> list[bytes]:
        self._num_events = num_events
        events, kind = self._close("incomplete"), "response.failed"
        self._usage = self._shown_usage()
        if error.code == CANCELLED:
            self._status, kind = "cancelled", "response.incomplete"
        else:
            self._status = "failed"
            self._error = {"code": "invalid_prompt" if error.status == 400 else "server_error", "message": str(error)}
        return [*events, self._event(kind, response=self._object())]

    def whole(self, outputs: Sequence[Output]) -> bytes:
        for sequence, delta in outputs:
            self.deltas(sequence, delta)
        return self.body()

    def body(self) -> bytes:
        return msgspec.json.encode(self._object())

    def _logprobs_of(self, delta: OutputDelta, parts: Sequence[Json]) -> list[Json]:
        """Those of the content of a delta, and of tokens before it that have shown nothing."""
        entries = [*self._reader.entries, *delta.entries]
        self._reader.entries = [] if parts else entries
        said = [entry for entry in entries if not self._reader.is_reasoning(entry.offset)]
        if not said or not any("content" in part for part in parts):
            return []
        shown: list[Json] = chat_logprobs(said, self._builder.tokenizer)["content"]
        return shown

    def _text(self, kind: str, text: str, logprobs: list[Json]) -> list[bytes]:
        """What a piece of text adds to a message or to reasoning."""
        events = []
        if not self._is_open or self._items[-1]["type"] != kind:
            events += self._close("completed")
            extra: Json = {"role": "assistant"} if kind == "message" else {"summary": []}
            events += self._open(kind, {**extra, "content": []})
            part: Json = {"type": TEXT_PARTS[kind], "text": ""}
            if kind == "message":
                part |= {"annotations": [], "logprobs": []}
            events.append(self._part_event("response.content_part.added", part=part))
            self._items[-1]["content"].append(part)
        self._pieces.append(text)
        self._logprobs += logprobs
        more: Json = {"logprobs": logprobs} if kind == "message" else {}
        return [*events, self._part_event(f"response.{TEXT_PARTS[kind]}.delta", delta=text, **more)]

    def _call(self, call: Json) -> list[bytes]:
        """What a delta of a call adds."""
        if "id" in call:
            events = self._close("completed")
            return events + self._open(
                "function_call", {"call_id": call["id"], "name": call["function"]["name"], "arguments": ""}
            )
        text = call["function"]["arguments"]
        self._pieces.append(text)
        return [self._item_event("response.function_call_arguments.delta", delta=text)]

    def _open(self, kind: str, fields: Json) -> list[bytes]:
        id = f"{PREFIXES[kind]}_{self._answer_id}_{len(self._items)}"
        self._items.append({"id": id, "type": kind, "status": "in_progress", **fields})
        self._is_open = True
        return [self._event("response.output_item.added", output_index=len(self._items) - 1, item=self._items[-1])]

    def _close(self, status: str) -> list[bytes]:
        """The end of the last item, if it is open."""
        if not self._is_open:
            return []
        self._items[-1] = item = self._filled() | {"status": status}
        self._is_open = False
        if item["type"] == "function_call":
            events = [self._item_event("response.function_call_arguments.done", name=item["name"], arguments=item["arguments"])]
        else:
            (part,) = item["content"]
            more: Json = {"logprobs": part["logprobs"]} if "logprobs" in part else {}
            events = [
                self._part_event(f"response.{part['type']}.done", text=part["text"], **more),
                self._part_event("response.content_part.done", part=part),
            ]
        self._pieces, self._logprobs = [], []
        return [*events, self._event("response.output_item.done", output_index=len(self._items) - 1, item=item)]

    def _filled(self) -> Json:
        """The open item with what has come of it."""
        item, text = self._items[-1], "".join(self._pieces)
        if item["type"] == "function_call":
            return item | {"arguments": text}
        more: Json = {"logprobs": list(self._logprobs)} if item["type"] == "message" else {}
        return item | {"content": [part | {"text": text} | more for part in item["content"]]}

    def _event(self, kind: str, **fields: object) -> bytes:
        data = msgspec.json.encode({"type": kind, "sequence_number": self._num_events, **fields})
        self._num_events += 1
        return b"event: " + kind.encode() + b"\ndata: " + data + b"\n\n"

    def _item_event(self, kind: str, **fields: object) -> bytes:
        place = {"item_id": self._items[-1]["id"], "output_index": len(self._items) - 1}
        return self._event(kind, **place, **fields)

    def _part_event(self, kind: str, **fields: object) -> bytes:
        return self._item_event(kind, content_index=0, **fields)

    def _object(self) -> Json:
        incomplete = {"reason": "max_output_tokens"} if self._status == "incomplete" else None
        return {
            **self._fields,
            "status": self._status,
            "error": self._error,
            "incomplete_details": incomplete,
            "output": [*self._items[:-1], self._filled()] if self._is_open else self._items,
            "usage": self._usage,
        }

    def _shown_usage(self) -> Json:
        usage = self._counter.usage()
        return {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": {**usage["prompt_tokens_details"], "cache_write_tokens": 0},
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": usage["completion_tokens_details"],
            "total_tokens": usage["total_tokens"],
        }
