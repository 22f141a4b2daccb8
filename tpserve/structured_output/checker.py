"""Checks grammars for the frontend before a request is admitted: compiles each once, in a thread, and remembers the result."""

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property, partial

from llguidance import LLMatcher, LLTokenizer

from tpserve.errors import UserError
from tpserve.structured_output.compiler import MAX_GRAMMAR_BYTES, GrammarError, compile_grammar, error_of, vocabulary
from tpserve.text.tokenizer import Tokenizer

MAX_REMEMBERED = 1024
"""Results, each a text that is mostly empty."""
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
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="grammars")
        self._results: OrderedDict[bytes, asyncio.Future[str]] = OrderedDict()

    def prepare(self) -> "Future[LLTokenizer]":
        """Build the vocabulary now, in the thread, instead of with the first grammar.

        That holds the interpreter lock for seconds: wait for the result before anything is served in this process.
        """
        return self._thread.submit(lambda: self._vocabulary)

    async def check(self, grammar: str, param: str | None = None) -> None:
        """UserError with llguidance's words when a grammar cannot be compiled. Requests with the same grammar share the work.

        `param`: the field of the request that the grammar comes from.
        """
        if len(data := grammar.encode()) > MAX_GRAMMAR_BYTES:
            text = f"the grammar has {len(data)} bytes, this server takes {MAX_GRAMMAR_BYTES}; make it smaller"
            raise UserError(text, param=param, code="invalid_grammar")
        key = hashlib.sha256(data).digest()
        if (result := self._results.get(key)) is None:
            loop = asyncio.get_running_loop()
            result = self._results[key] = loop.run_in_executor(self._thread, partial(self._error_of, grammar))
            result.add_done_callback(partial(self._forget_failed, key))
            if len(self._results) > MAX_REMEMBERED:
                self._results.popitem(last=False)
        self._results.move_to_end(key)
        if error := await asyncio.shield(result):
            raise UserError(f"the grammar is refused: {error}", param=param, code="invalid_grammar")

    def _forget_failed(self, key: bytes, result: "asyncio.Future[str]") -> None:
        """A check that failed itself says nothing about its grammar."""
        if (result.cancelled() or result.exception() is not None) and self._results.get(key) is result:
            del self._results[key]

    def _error_of(self, grammar: str) -> str:
        try:
            matcher = compile_grammar(self._vocabulary, grammar)
        except GrammarError as error:
            return _advised(str(error))
        _follow(matcher, self._vocabulary.eos_tokens)
        return _advised(error_of(matcher)) if matcher.is_error() else ""

    @cached_property
    def _vocabulary(self) -> LLTokenizer:
        return vocabulary(self._tokenizer, self._tokenizer.vocab_size, ())


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
