"""Compiles grammars of structured output with llguidance for a model's tokenizer.

All limits are counts, never seconds, so every rank decides alike. The library releases the interpreter lock while it compiles,
but not while it builds a vocabulary: a second or more for 128,000 tokens. So a process builds its vocabulary at start, before it
serves: a rank before its Hello, the frontend before ranks and clients can reach it, `LLM` before it is made.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from typing import TypeVar

from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance import TokenizerWrapper as Wrapper

from tpserve.text.tokenizer import Tokenizer

T = TypeVar("T")
MAX_GRAMMAR_BYTES = 2 << 20
"""A longer grammar is refused: one plan carries it to all ranks."""
LIMITS = LLParserLimits(
    max_items_in_row=2_000,
    initial_lexer_fuel=1_000_000,
    step_lexer_fuel=200_000,
    step_max_items=50_000,
    max_lexer_states=50_000,
    max_grammar_size=500_000,
    verbose_errors=False,
)


LARGE_BYTES = 16 << 10
"""A grammar of this size or more is large: it may take seconds to compile."""


class CompileThreads:
    """Two threads in which grammars are compiled in order: one for small grammars, so that none of them waits for a large one."""

    def __init__(self) -> None:
        self._small, self._large = (ThreadPoolExecutor(1, thread_name_prefix=name) for name in ("grammars", "large grammars"))

    def submit(self, grammar: str, work: Callable[[], T]) -> "Future[T]":
        """Run `work`, which compiles `grammar`; empty: it is quick."""
        return (self._large if len(grammar) >= LARGE_BYTES else self._small).submit(work)


class GrammarError(ValueError):
    """A grammar cannot be compiled; the text is llguidance's."""


class _Tokens:
    """A tokenizer as llguidance reads it: the bytes of each token. Special tokens match no text."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_ids: Sequence[int]) -> None:
        known = min(tokenizer.vocab_size, vocab_size)
        special = [id for id in range(known) if tokenizer.is_special(id)]
        self.tokens = [tokenizer.token_bytes(id) for id in range(known)]
        for id in special:
            self.tokens[id] = tokenizer.piece(id).encode()
        # ids of the model without a token, and the end of a model that has no EOS
        self.tokens += [b""] * (max(vocab_size, max(eos_ids) + 1) - known)
        self.special_token_ids = sorted({*special, *eos_ids})
        self.eos_token_id = eos_ids[0]
        self.bos_token_id = None
        self._tokenizer = tokenizer

    def __call__(self, text: bytes | str) -> list[int]:
        ids = self._tokenizer.encode(text if isinstance(text, str) else text.decode(errors="replace"), add_special_tokens=False)
        return ids if max(ids, default=0) < len(self.tokens) else self._longest(text.encode() if isinstance(text, str) else text)

    def _longest(self, data: bytes) -> list[int]:
        """The longest token at each place, when the tokenizer has tokens that the model lacks. Other bytes are left out."""
        ids, at = [], 0
        while at < len(data):
            ends = range(min(len(data), at + self._longest_bytes), at, -1)
            end, id = next(((end, id) for end in ends if (id := self._id_of.get(data[at:end])) is not None), (at + 1, None))
            ids += [] if id is None else [id]
            at = end
        return ids

    @cached_property
    def _id_of(self) -> dict[bytes, int]:
        special = set(self.special_token_ids)
        return {token: id for id, token in enumerate(self.tokens) if token and id not in special}

    @cached_property
    def _longest_bytes(self) -> int:
        return max(map(len, self.tokens))


def vocabulary(tokenizer: Tokenizer, vocab_size: int, eos_ids: Sequence[int]) -> LLTokenizer:
    """The model's `vocab_size` token ids for `compile_grammar`. Holds the interpreter lock while it is built.

    A model without EOS gets an id of its own past the vocabulary, which is never drawn.
    """
    ends = list(eos_ids) or [vocab_size]
    tokens = _Tokens(tokenizer, vocab_size, ends)
    return LLTokenizer(Wrapper(tokens), n_vocab=len(tokens.tokens), eos_token=ends)


def compile_grammar(vocabulary: LLTokenizer, grammar: str) -> LLMatcher:
    """The matcher of a grammar at its beginning; copies of it follow sequences. GrammarError when there is none."""
    matcher = LLMatcher(vocabulary, grammar, log_level=0, limits=LIMITS)
    if matcher.is_error():
        raise GrammarError(error_of(matcher))
    return matcher


def error_of(matcher: LLMatcher) -> str:
    """What llguidance says about a failed matcher, without its stack."""
    return matcher.get_error().split("\n<", 1)[0].strip() or "llguidance gives no reason"
