"""The state that all handlers share: the served model names, the engine's status, and admission.

Its only mutable state is the set of logged field names and the lock for large bodies. The errors 404 (model), 429 and 503 come
from here.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from tpserve.engine_client.requests import RequestHandle, RequestTable
from tpserve.engine_client.status import EngineStatus
from tpserve.errors import UserError
from tpserve.frontend.open_requests import OpenRequests
from tpserve.frontend.openai.chat_answer import ChatAnswers
from tpserve.frontend.streams import StreamTable
from tpserve.journal.journal import Journal
from tpserve.observe.spans import SpanExporter
from tpserve.structured_output.checker import GrammarChecker
from tpserve.text.assembler import Assembler
from tpserve.text.chat import ChatTemplate
from tpserve.text.tokenizer import Tokenizer
from tpserve.types.request import Request
from tpserve.types.sampling import SamplingDefaults


@dataclass(frozen=True)
class ModelLimits:
    """Limits of a request, known once the engine runs: tokens of a sequence, and the number of token ids."""

    max_model_len: int
    vocab_size: int


@dataclass(frozen=True)
class OpenAIServing:
    """`max_open`: sequences that may run or wait at once. `defaults`: sampling parameters that a request may leave out.
    `request_timeout_s`: how long a request may take that does not say. `forces_usage`: in every chunk of every stream.
    `shows_times`: of answers with one choice. `tokens_as_ids`: how log probabilities name tokens where a request does not say."""

    names: tuple[str, ...]
    root: str
    created_s: int
    max_open: int
    request_table: RequestTable
    status: Callable[[], EngineStatus]
    tokenizer: Tokenizer
    chat_template: ChatTemplate
    defaults: SamplingDefaults
    grammars: GrammarChecker
    open_requests: OpenRequests
    request_timeout_s: float | None = None
    spans: SpanExporter | None = None
    forces_usage: bool = False
    shows_times: bool = False
    tokens_as_ids: bool = False
    answers: ChatAnswers = field(default_factory=ChatAnswers)
    streams: StreamTable = field(default_factory=lambda: StreamTable(0))
    journal: Journal | None = None
    logged_fields: set[str] = field(default_factory=set)
    large_bodies: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held while a large body is decoded."""

    def served_name(self, model: str | None) -> str:
        """The served name of a request's model; None is the default. UserError 404 for any other."""
        if model is None:
            return self.names[0]
        if model not in self.names:
            known = ", ".join(self.names)
            raise UserError(
                f"the model {model[:128]!r} does not exist; served: {known}",
                param="model",
                code="model_not_found",
                status=404,
            )
        return model

    def sampling(self) -> dict[str, Any]:
        """The default of each field of a body, without `max_tokens`, which is cut to the context instead."""
        found = {name: value for name, value in self.defaults.specified().items() if name != "max_tokens"}
        return found | ({"return_tokens_as_token_ids": True} if self.tokens_as_ids else {})

    def limits(self) -> ModelLimits:
        """The limits of the engine. UserError 503 unless it runs, recovers from a fault or is paused."""
        status = self.status()
        if (
            status.state in ("running", "recovering", "paused")
            and status.max_model_len is not None
            and status.vocab_size is not None
        ):
            return ModelLimits(status.max_model_len, status.vocab_size)
        raise not_ready(status)

    def refuse_too_many(self, count: int, field: str) -> None:
        """UserError 400 for more sequences than `max_open`. `field` names the number of choices per prompt."""
        if count > self.max_open:
            raise UserError(
                f"the request asks for {count} sequences (prompts times {field}), this server holds {self.max_open}; split it",
                param=field,
            )

    def open(self, requests: Sequence[tuple[Request, Assembler]], *, streaming: bool, stepwise: bool = False) -> RequestHandle:
        """Admit a client's request. UserError 429 when the queue is full, 503 when the engine does not run."""
        num_open = self.request_table.num_open + (self.journal.num_waiting if self.journal is not None else 0)
        if num_open + len(requests) > self.max_open:
            raise UserError(f"the queue is full: {num_open} of {self.max_open} sequences are open; try again", status=429)
        self.limits()  # the engine may have stopped while the prompt was tokenized
        return self.request_table.open(requests, streaming=streaming, stepwise=stepwise)


def not_ready(status: EngineStatus) -> UserError:
    """The error 503 of an engine that does not run."""
    if status.state == "recovering":
        return UserError(f"the server recovers from a fault: {status.phase}", code="recovering", status=503)
    if status.state == "paused":
        return UserError(f"the server is {status.phase}", code="paused", status=503)
    if status.state in ("starting", "running"):
        where = f": {status.phase}" if status.phase else ""
        return UserError(f"the server is starting{where} ({status.percent}%); try again", code="starting", status=503)
    if status.state == "draining":
        return UserError("the server is shutting down and takes no new requests", code="draining", status=503)
    return UserError(f"the server has stopped: {status.reason or 'no reason given'}", code="stopped", status=503)


SERVICE = web.AppKey("service", OpenAIServing)
