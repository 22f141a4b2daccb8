"""The grammars of sequences: their numbers, whether the ranks have compiled them, and who waits for that. Rank 0 only.

A grammar keeps its number while a sequence needs it, and after that until `MAX_UNUSED` others came that nobody needs. Sequences
with the same text share it. Pure; the scheduler owns it.
"""

from collections import OrderedDict
from dataclasses import dataclass, field

from tpserve.scheduling.sequence import Sequence
from tpserve.types.plan import NEW_GRAMMAR_BYTES, GrammarOrders

MAX_UNUSED = 64


@dataclass
class _Grammar:
    number: int
    text: str
    ready: bool = False
    users: int = 0
    held: dict[int, Sequence] = field(default_factory=dict)
    """By request id: sequences that wait until it is compiled."""


class GrammarTable:
    """All grammars that the ranks know or will know."""

    def __init__(self) -> None:
        self._by_text: dict[str, _Grammar] = {}
        self._by_number: dict[int, _Grammar] = {}
        self._unused: OrderedDict[int, _Grammar] = OrderedDict()
        self._new: list[_Grammar] = []
        self._compiling: dict[int, _Grammar] = {}
        """Sent to the ranks, which have not answered."""
        self._dropped: list[int] = []
        self._held: dict[int, Sequence] = {}
        self._next = 0

    def __len__(self) -> int:
        """The number of sequences that wait for a grammar."""
        return len(self._held)

    def get(self, id: int) -> Sequence | None:
        """The sequence of a request that waits for its grammar, or None."""
        return self._held.get(id)

    def hold(self, sequence: Sequence) -> bool:
        """Register a new sequence; whether it must wait for its grammar."""
        text = sequence.request.params.grammar
        if not text:
            return False
        if (grammar := self._by_text.get(text)) is None:
            grammar = self._by_text[text] = self._by_number[self._next] = _Grammar(self._next, text)
            self._next += 1
            self._new.append(grammar)
        self._unused.pop(grammar.number, None)
        grammar.users += 1
        sequence.grammar = grammar.number
        if not grammar.ready:
            grammar.held[sequence.request.id] = self._held[sequence.request.id] = sequence
        return not grammar.ready

    def release(self, sequence: Sequence) -> None:
        """A sequence has ended."""
        if sequence.grammar < 0:
            return
        grammar, id = self._by_number.get(sequence.grammar), sequence.request.id
        if grammar is None:  # it could not be compiled
            return
        self._held.pop(id, None)
        grammar.held.pop(id, None)
        grammar.users -= 1
        self._drop_unused(grammar)

    def waits(self) -> bool:
        """Whether a plan is needed to send grammars, or to ask about them."""
        return bool(self._new or self._compiling)

    def orders(self) -> GrammarOrders:
        """What the next plan tells the ranks."""
        sent_bytes, count = 0, 0
        for grammar in self._new:
            sent_bytes += len(grammar.text.encode())
            if count and sent_bytes > NEW_GRAMMAR_BYTES:
                break
            count += 1
        new, self._new = self._new[:count], self._new[count:]
        self._compiling |= {grammar.number: grammar for grammar in new}
        dropped, self._dropped = tuple(self._dropped), []
        return GrammarOrders(tuple((each.number, each.text) for each in new), tuple(self._compiling), dropped)

    def compiled(self, number: int) -> list[Sequence]:
        """All ranks have compiled a grammar: the sequences that waited for it."""
        grammar = self._compiling.pop(number, None)
        if grammar is None:  # of an earlier answer
            return []
        grammar.ready = True
        return self._take_held(grammar)

    def failed(self, number: int) -> list[Sequence]:
        """A rank could not compile a grammar: the sequences that waited for it. The next one with its text tries again."""
        grammar = self._compiling.pop(number, None)
        if grammar is None:
            return []
        del self._by_text[grammar.text], self._by_number[number]
        self._dropped.append(number)
        return self._take_held(grammar)

    def _take_held(self, grammar: _Grammar) -> list[Sequence]:
        held, grammar.held = list(grammar.held.values()), {}
        for sequence in held:
            del self._held[sequence.request.id]
        self._drop_unused(grammar)
        return held

    def _drop_unused(self, grammar: _Grammar) -> None:
        if grammar.users or not grammar.ready:
            return
        self._unused[grammar.number] = grammar
        if len(self._unused) > MAX_UNUSED:
            number, oldest = self._unused.popitem(last=False)
            del self._by_text[oldest.text], self._by_number[number]
            self._dropped.append(number)
