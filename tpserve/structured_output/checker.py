"""Checks grammars for the frontend before a request is admitted: compiles each once, in a thread, and remembers the result."""

import asyncio
import hashlib
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future
from functools import partial

from llguidance import LLMatcher, LLTokenizer

from tpserve.errors import UserError
from tpserve.structured_output.compiler import (
    MAX_GRAMMAR_BYTES,
    CompileThreads,
    GrammarError,
    compile_grammar,
    error_of,
    vocabulary,
)
from tpserve.text.tokenizer import Tokenizer

MAX_REMEMBERED = 1024
"""Results, each a text that is mostly empty."""
MAX_WAITING = 256
"""Grammars that are being checked or wait for it. A check takes milliseconds, of the largest ones seconds."""
TRIED_TOKENS = 16
ADVICE = {
    "panic: assertion failed: grammar.symbols.len()": "it has too many parts; send fewer or smaller schemas",
    "oneOf constraints are not supported": "an instance may be valid for two schemas of oneOf; tell them apart, or use anyOf",
    "NoExtension": "no answer is in its language",
    "Unknown format": "leave it out; known are date, time, date-time, duration, email, hostname, ipv4, ipv6, uuid and uri",
}
"""The way out, by how llguidance's words begin."""


class GrammarChecker:
    """Compiles with the tokenizer's own vocabulary: no grammar depends on ids of the model that have no token."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._threads = CompileThreads()
        self._waiting = 0
        self._lock = threading.Lock()
        self._built: LLTokenizer | None = None
        self._results: OrderedDict[bytes, asyncio.Future[str]] = OrderedDict()

    def prepare(self) -> "Future[LLTokenizer]":
        """Build the vocabulary now, in a thread, instead of with the first grammar.

        That holds the interpreter lock for seconds: wait for the result before anything is served in this process.
        """
        return self._threads.submit("", lambda: self._vocabulary)

    async def check(self, grammar: str, param: str | None = None) -> None:
        """UserError with llguidance's words when a grammar cannot be compiled, 429 when too many wait for that. Requests with the
        same grammar share the work.

        `param`: the field of the request that the grammar comes from.
        """
        if len(data := grammar.encode()) > MAX_GRAMMAR_BYTES:
            text = f"the grammar has {len(data)} bytes, this server takes {MAX_GRAMMAR_BYTES}; make it smaller"
            raise UserError(text, param=param, code="invalid_grammar")
        key = hashlib.sha256(data).digest()
        if (result := self._results.get(key)) is None:
            if self._waiting == MAX_WAITING:
                raise UserError(f"{MAX_WAITING} grammars wait to be checked; try again", status=429)
            self._waiting += 1
            result = asyncio.wrap_future(self._threads.submit(grammar, partial(self._error_of, grammar)))
            self._results[key] = result
            result.add_done_callback(partial(self._end, key))
            if len(self._results) > MAX_REMEMBERED:
                self._results.popitem(last=False)
        self._results.move_to_end(key)
        if error := await asyncio.shield(result):
            raise UserError(f"the grammar is refused: {error}", param=param, code="invalid_grammar")

    def _end(self, key: bytes, result: "asyncio.Future[str]") -> None:
        """Forget a check that failed itself: it says nothing about its grammar."""
        self._waiting -= 1
        if (result.cancelled() or result.exception() is not None) and self._results.get(key) is result:
            del self._results[key]

    def _error_of(self, grammar: str) -> str:
        try:
            matcher = compile_grammar(self._vocabulary, grammar)
        except GrammarError as error:
            return _advised(str(error))
        _follow(matcher, self._vocabulary.eos_tokens)
        return _advised(error_of(matcher)) if matcher.is_error() else ""

    @property
    def _vocabulary(self) -> LLTokenizer:
        with self._lock:
            self._built = self._built or vocabulary(self._tokenizer, self._tokenizer.vocab_size, ())
            return self._built


def _follow(matcher: LLMatcher, ends: Sequence[int]) -> None:
    """Some tokens of one text: a grammar may compile and have no text at all, or be too complex from its first tokens on."""
    for _ in range(TRIED_TOKENS):
        allowed = int.from_bytes(matcher.compute_bitmask(), "little")
        for end in ends:
            allowed &= ~(1 << end)
        if not allowed or not matcher.consume_token(allowed.bit_length() - 1):
            return


def _advised(error: str) -> str:
    advice = next((text for begin, text in ADVICE.items() if error.startswith(begin)), "")
    return f"{error}: {advice}" if advice else error
