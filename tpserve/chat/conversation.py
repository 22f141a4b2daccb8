"""The state of a chat: messages, system prompt and request fields. Pure.

A conversation alternates between "user" and "assistant"; an answer that was stopped stays in it as far as it came.
"""

import json
from dataclasses import dataclass, field
from typing import Any

from tpserve.errors import UserError

RESERVED = ("messages", "model", "n", "stream", "stream_options", "background")
"""Fields of a request that `/set` does not change."""


@dataclass
class Conversation:
    """What the next request is made of. `fields`: fields of a chat completion, such as "temperature"."""

    model: str
    system: str = ""
    fields: dict[str, Any] = field(default_factory=dict)
    messages: list[dict[str, str]] = field(default_factory=list)

    def body(self) -> dict[str, Any]:
        """The next request."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return {"model": self.model, "messages": [*system, *self.messages], **self.fields}

    def ask(self, text: str) -> None:
        """Append a question."""
        self.messages.append({"role": "user", "content": text})

    def answered(self, text: str) -> None:
        """Append an answer; one without text takes the question away, too, so that the next one follows an answer."""
        if text:
            self.messages.append({"role": "assistant", "content": text})
        else:
            self.messages.pop()

    def undo(self) -> str:
        """Take the last question and its answer away; the question. UserError when there is none."""
        while self.messages:
            message = self.messages.pop()
            if message["role"] == "user":
                return message["content"]
        raise UserError("there is no question yet")

    def set(self, name: str, text: str) -> None:
        """Set a field to JSON or else to a text; an empty one removes it. UserError for a field that is not the user's."""
        if name in RESERVED:
            raise UserError(f"{name} is not set by hand")
        if not text:
            self.fields.pop(name, None)
            return
        try:
            self.fields[name] = json.loads(text)
        except ValueError:
            self.fields[name] = text

    def dump(self) -> str:
        """The conversation as JSON."""
        state = {"model": self.model, "system": self.system, "fields": self.fields, "messages": self.messages}
        return json.dumps(state, indent=2, ensure_ascii=False) + "\n"

    def load(self, text: str) -> None:
        """Take over what `dump` made, but for the model. UserError for anything else."""
        try:
            state = json.loads(text)
            messages = [{"role": str(each["role"]), "content": str(each["content"])} for each in state["messages"]]
            system, fields = str(state["system"]), dict(state["fields"])
        except (ValueError, KeyError, TypeError):
            raise UserError("this file is no conversation that /save has written") from None
        self.messages, self.system, self.fields = messages, system, fields
