"""What the handlers share: the names served, the engine's state as seen from here, and admission.

Owns nothing that changes but the set of names already logged and the turn of large bodies. Admission is where 404, 429 and 503
come from.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from tpserve.coordinator.status import EngineStatus
from tpserve.engine_client.requests import RequestHandle, RequestTable
from tpserve.errors import UserError
from tpserve.text.assembler import Assembler
from tpserve.text.chat import ChatTemplate
from tpserve.text.tokenizer import Tokenizer
from tpserve.types.request import Request
from tpserve.types.sampling import SamplingDefaults


@dataclass(frozen=True)
class ModelLimits:
    """Facts of a running engine that bound a request."""

    max_model_len: int
    vocab_size: int


@dataclass(frozen=True)
class OpenAIServing:
    """`max_open`: sequences that may run or wait at once. `defaults`: sampling parameters of requests that do not say them."""

    names: tuple[str, ...]
    root: str
    created_s: int
    max_open: int
    request_table: RequestTable
    status: Callable[[], EngineStatus]
    tokenizer: Tokenizer
    chat_template: ChatTemplate
    defaults: SamplingDefaults
    logged_fields: set[str] = field(default_factory=set)
    large_bodies: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held while a large body is decoded."""

    def served(self, model: str | None) -> str:
        """The served name of a request's model; None is the default. UserError 404 for any other."""
        if model is None:
            return self.names[0]
        if model not in self.names:
            known = ", ".join(self.names)
            raise UserError(
                f"the model {model[:128]!r} does not exist; served: {known}", param="model", code="model_not_found", status=404
            )
        return model

    def sampling(self) -> dict[str, Any]:
        """Fields of a call that does not say them. How much to generate is not among them: it is cut to what fits."""
        return {name: value for name, value in self.defaults.specified().items() if name != "max_tokens"}

    def limits(self) -> ModelLimits:
        """UserError 503 unless requests are taken."""
        status = self.status()
        if status.state == "running" and status.max_model_len is not None and status.vocab_size is not None:
            return ModelLimits(status.max_model_len, status.vocab_size)
        raise not_ready(status)

    def refuse_too_many(self, count: int, field: str) -> None:
        """UserError 400 for more sequences than could ever be open; `field` multiplies the prompts."""
        if count > self.max_open:
            raise UserError(
                f"the request asks for {count} sequences (prompts times {field}), this server holds {self.max_open}; split it",
                param=field,
            )

    def open(self, requests: Sequence[tuple[Request, Assembler]], *, streaming: bool) -> RequestHandle:
        """Admit what a client asked for. UserError 429 when the queue is full."""
        if self.request_table.num_open + len(requests) > self.max_open:
            raise UserError(
                f"the queue is full: {self.request_table.num_open} of {self.max_open} sequences are open; try again", status=429
            )
        self.limits()  # the engine may have left while the prompt was tokenized
        return self.request_table.open(requests, streaming=streaming)


def not_ready(status: EngineStatus) -> UserError:
    """503, in the words of the state."""
    if status.state in ("starting", "running"):
        where = f": {status.phase}" if status.phase else ""
        return UserError(f"the server is starting{where} ({status.percent}%); try again", code="starting", status=503)
    if status.state == "draining":
        return UserError("the server is shutting down and takes no new requests", code="draining", status=503)
    return UserError(f"the server has stopped: {status.reason or 'no reason given'}", code="stopped", status=503)


SERVICE = web.AppKey("service", OpenAIServing)
