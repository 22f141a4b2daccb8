"""What the ranks of the last epoch that ran have agreed on: facts of the loaded model, and the memory of each rank. Pure."""

from collections.abc import Iterable, Sequence

from tpserve.types.messages import Hello, MemoryLedger, Ready


class Agreement:
    """`facts`: from rank 0's Ready, or of a coordinator before this one; empty before the first epoch has run."""

    def __init__(self, facts: dict[str, int]) -> None:
        self.facts = facts
        self._ledgers: list[MemoryLedger] = []
        self._before: tuple[dict[str, int], list[MemoryLedger]] = facts, []

    def note(self, readies: Sequence[Ready]) -> None:
        """An epoch runs with these ranks."""
        self.facts, self._ledgers = dict(readies[0].facts), [ready.ledger for ready in readies]

    def begin_trial(self) -> None:
        """Ranks measure again, with other flags."""
        self._before, self._ledgers = (self.facts, self._ledgers), []

    def take_back(self) -> None:
        """What was agreed before the trial holds again."""
        self.facts, self._ledgers = self._before

    def shorter(self, first: Ready) -> str:
        """How much shorter sequences would be with rank 0's Ready; empty if they are as long as before."""
        length, before = (facts.get("max_model_len", 0) for facts in (first.facts, self.facts))
        return f"sequences could have {length:,} tokens, before {before:,}" if length < before else ""

    def ledger(self, rank: int, survivors: Iterable[Hello | None]) -> MemoryLedger | None:
        """What an earlier epoch agreed on: as it is known here, or to the first of `survivors` that was part of it."""
        if self._ledgers:
            return self._ledgers[rank]
        return next((hello.ledger for hello in survivors if hello is not None and hello.ledger is not None), None)
