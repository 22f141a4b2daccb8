"""Whether the ranks that say Hello can work together, and how they differ. Pure; decides nothing.

A Hello's `fingerprint` must be equal on all ranks: a difference would give wrong tokens or a hang. What its `traits` and its
place's `settings` say may differ, and is shown when it does.
"""

from collections.abc import Iterable, Mapping, Sequence

from tpserve.observe.table import of_ranks, table
from tpserve.types.messages import WEIGHTS, Hello

WAY_OUT = "start every node with the same version and arguments"
_NONE = "none"
_FILES = 4


def disagreement(known: Iterable[Hello], hello: Hello) -> str:
    """Why this rank cannot take part beside those already known, in a sentence; nothing when it can."""
    others = list(known)
    return (_difference(others[0], hello) if others else "") or _clash(others, hello)


def refused(hellos: Sequence[Hello]) -> list[str]:
    """Who has what of the facts that must agree and do not, as a table; empty when all agree."""
    return _compare(hellos, [hello.fingerprint for hello in hellos])


def noted(hellos: Sequence[Hello]) -> list[str]:
    """The same of what may differ: drivers, cards, what users have told NCCL and gloo."""
    return _compare(hellos, [hello.traits | hello.place.settings for hello in hellos])


def everything(hellos: Sequence[Hello]) -> list[str]:
    """The same of all that was told, differing or not."""
    facts = [hello.fingerprint | hello.traits | hello.place.settings for hello in hellos]
    return _table(hellos, facts, _few_files(_names(facts)))


def _compare(hellos: Sequence[Hello], facts: Sequence[Mapping[str, str]]) -> list[str]:
    """A row a difference."""
    names = [name for name in _names(facts) if len({each.get(name) for each in facts}) > 1]
    return _table(hellos, facts, _few_files(names)) if names else []


def _names(facts: Sequence[Mapping[str, str]]) -> list[str]:
    """In the order in which they are told."""
    return list(dict.fromkeys(name for each in facts for name in each))


def _few_files(names: Sequence[str]) -> list[str]:
    """The same, with only the first of many weight files."""
    others = [name for name in names if name.startswith(WEIGHTS)][_FILES:]
    return [name for name in names if name not in others]


def _table(hellos: Sequence[Hello], facts: Sequence[Mapping[str, str]], names: Sequence[str]) -> list[str]:
    """A row a name, a column for the ranks that are alike in all of them."""
    alike: dict[tuple[str, ...], list[Hello]] = {}
    for hello, each in zip(hellos, facts, strict=True):
        alike.setdefault(tuple(each.get(name, _NONE) for name in names), []).append(hello)
    heads = [f"{of_ranks(sorted(h.rank for h in group))} on {', '.join(dict.fromkeys(h.host for h in group))}"
             for group in alike.values()]  # fmt: skip
    return table([["", *heads], *([name, *values] for name, *values in zip(names, *alike, strict=True))])


def _difference(first: Hello, hello: Hello) -> str:
    """The first rank known stands for those that came after it."""
    for key in sorted({*hello.fingerprint, *first.fingerprint}):
        mine, theirs = hello.fingerprint.get(key, _NONE), first.fingerprint.get(key, _NONE)
        if mine != theirs:
            have = f"rank {first.rank} on {first.host} has {key} {theirs}, rank {hello.rank} on {hello.host} has {key} {mine}"
            return f"{have}: {'put the same files on every node' if key.startswith(WEIGHTS) else WAY_OUT}"
    return ""


def _clash(others: Iterable[Hello], hello: Hello) -> str:
    """Two machines that other nodes could not tell apart."""
    for other in others:
        if other.place.address == hello.place.address and other.place.machine != hello.place.machine:
            return (
                f"rank {other.rank} on {other.host} and rank {hello.rank} on {hello.host} both call themselves "
                f"{hello.place.address}: pass --interface with a network that the nodes share, such as --interface 10.0.0.0/24"
            )
    return ""
