"""A rank's grammars: compiled in threads, and followed token by token for each constrained sequence.

Ranks of the last stage have equal grammars and draw equal tokens, so their matchers agree without messages. Only whether all of
them have compiled a grammar is agreed upon (`SamplerStage`), before a sequence that needs it is admitted.
"""

import logging
from collections.abc import Callable
from concurrent.futures import Future, wait
from enum import IntEnum
from functools import partial

import torch
from llguidance import LLMatcher, LLTokenizer

from tpserve.structured_output.compiler import CompileThreads, compile_grammar, error_of

log = logging.getLogger(__name__)


class GrammarState(IntEnum):
    """Of a grammar on a rank."""

    COMPILING = 0
    READY = 1
    FAILED = 2


class CompiledGrammars:
    """Grammars by the number that rank 0 gave them, compiled in threads."""

    def __init__(self, make_vocabulary: Callable[[], LLTokenizer]) -> None:
        """`make_vocabulary` runs in the thread, at once."""
        self._threads = CompileThreads()
        self._vocabulary = self._threads.submit("", make_vocabulary)
        self._compiled: dict[int, Future[LLMatcher]] = {}

    def wait_for_vocabulary(self) -> None:
        """Wait until the vocabulary is built. For a rank that does not serve yet: the build holds the interpreter lock."""
        self._vocabulary.result()

    def start(self, number: int, grammar: str) -> None:
        """Begin to compile a grammar."""
        self._compiled[number] = self._threads.submit(grammar, partial(self._compile, grammar))

    def drop(self, number: int) -> None:
        """Forget a grammar."""
        self._compiled.pop(number).cancel()

    def clear(self) -> None:
        """Forget all grammars, and keep the vocabulary: rank 0 begins to number anew."""
        for number in list(self._compiled):
            self.drop(number)

    def state(self, number: int) -> GrammarState:
        """How far a grammar is."""
        compiled = self._compiled[number]
        if not compiled.done():
            return GrammarState.COMPILING
        return GrammarState.FAILED if compiled.exception() is not None else GrammarState.READY

    def error(self, number: int) -> str:
        """Why a grammar has failed; empty when it has not."""
        error = self._compiled[number].exception()
        return "" if error is None else str(error) or type(error).__name__

    def wait_for_any(self, numbers: tuple[int, ...], seconds: float) -> None:
        """Wait until one of the grammars is compiled, or for so long."""
        wait([self._compiled[number] for number in numbers], seconds, return_when="FIRST_COMPLETED")

    def begin(self, number: int, output: list[int]) -> "SlotGrammar":
        """A sequence with a grammar that is ready, after the tokens `output`."""
        num_words = -(-self._vocabulary.result().vocab_size // 32)
        return SlotGrammar(self._compiled[number].result().deep_copy(), num_words, output)

    def _compile(self, grammar: str) -> LLMatcher:
        try:
            matcher = compile_grammar(self._vocabulary.result(), grammar)
            matcher.compute_bitmask()  # here, not in a step: it may cost as much as compiling, and copies share what it found
            return matcher
        except Exception as error:
            log.warning("a grammar cannot be compiled: %s", error)
            raise


class GrammarDraw:
    """A token that was drawn under a grammar: element `index` of the host tensor `tokens_S`, there once `event` has passed.

    `end`: None while the grammar goes on, else the error with which it ended, mostly empty; known when the grammar has followed.
    """

    def __init__(self, tokens_S: torch.Tensor, index: int, event: torch.Event | None) -> None:
        self._tokens_S, self._index, self._event = tokens_S, index, event
        self.end: str | None = None

    def token(self) -> int:
        """Wait for the token."""
        if self._event is not None:
            self._event.synchronize()
        return int(self._tokens_S[self._index])


class SlotGrammar:
    """The grammar of one sequence, between its tokens.

    A draw is followed when the next mask is needed or the step's result is, whichever comes first: on a card the next forward is
    queued by then. So are the tokens that the sequence brought along, of which some may be drawn again.
    """

    def __init__(self, matcher: LLMatcher, num_words: int, output: list[int]) -> None:
        """`num_words`: W of a mask. `output`: the tokens that the sequence has already."""
        self._matcher, self.num_words = matcher, num_words
        self._output, self._followed = output, 0
        self._draw: GrammarDraw | None = None
        self.ended = False
        """No token can follow, or the matcher has failed."""
        self.error = ""

    def write_mask(self, row_W: torch.Tensor, num_output: int) -> None:
        """Write the bits of the ids that may follow `num_output` output tokens; the number never falls.

        `row_W`: int32 [W], id 32 w + i is bit i of word w. All, once the grammar has ended.
        """
        known, self._followed = self._output[self._followed : num_output], max(self._followed, num_output)
        if known and not self.ended and not self._matcher.consume_tokens(known):
            self._fail()
        self.follow()
        if not self.ended:
            self._matcher.unsafe_compute_mask_ptr(row_W.data_ptr(), row_W.numel() * 4)
            if self._matcher.is_error():
                self._fail()
        if self.ended:  # a plan that was under way; its token is dropped
            row_W.fill_(-1)

    def drawn(self, draw: GrammarDraw) -> None:
        """The next token."""
        self._draw = draw

    def follow(self) -> None:
        """Advance by the token that was drawn last."""
        draw, self._draw = self._draw, None
        if draw is None:
            return
        if not self.ended:
            if not self._matcher.consume_token(draw.token()):
                self._fail()
            elif self._matcher.is_stopped():
                self.ended = True
        if self.ended:
            draw.end = self.error

    def _fail(self) -> None:
        self.ended, self.error = True, error_of(self._matcher)
