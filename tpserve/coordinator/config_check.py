"""Whether the ranks that say Hello can work together, and how they differ. Pure; decides nothing.

A Hello's `fingerprint` must be equal on all ranks, and its `processor` on the ranks of a stage: a difference would give wrong
tokens or a hang. What its `traits` and its place's `settings` say may differ, and is shown when it does.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

from tpserve.observe.table import of_ranks, table
from tpserve.types.messages import WEIGHTS, Hello

WAY_OUT = "start every node with the same version and arguments"
WAY_OUT_PROCESSOR = (
    "tensor parallel ranks must compute alike to the last bit: put unlike processors in different pipeline stages "
    "(--pipeline-parallel-size)"
)
_NONE = "none"
_FILES = 4


def mismatch(known: Iterable[Hello], hello: Hello) -> str:
    """Why this rank cannot take part beside those already known, in a sentence; nothing when it can."""
    others = list(known)
    beside = [other for other in others if other.stage == hello.stage]
    return (
        (_difference(others[0], hello, _fingerprint, WAY_OUT) if others else "")
        or (_difference(beside[0], hello, _processor, WAY_OUT_PROCESSOR) if beside else "")
        or _clash(others, hello)
    )


def required_mismatches(hellos: Sequence[Hello]) -> list[str]:
    """Who has what of the facts that must agree and do not, as a table; empty when all agree."""
    stages = {hello.stage: [other.processor for other in hellos if other.stage == hello.stage] for hello in hellos}
    names = _differing([hello.fingerprint for hello in hellos])
    names += dict.fromkeys(name for facts in stages.values() for name in _differing(facts))
    return _table(hellos, [hello.fingerprint | hello.processor for hello in hellos], names) if names else []


def optional_mismatches(hellos: Sequence[Hello]) -> list[str]:
    """The same of what may differ: drivers, cards, what users have told NCCL and gloo."""
    facts = [hello.processor | hello.traits | hello.node.settings for hello in hellos]
    names = _differing(facts)
    return _table(hellos, facts, names) if names else []


def all_facts(hellos: Sequence[Hello]) -> list[str]:
    """The same of all that was told, differing or not."""
    facts = [hello.fingerprint | hello.processor | hello.traits | hello.node.settings for hello in hellos]
    return _table(hellos, facts, _names(facts))


def _differing(facts: Sequence[Mapping[str, str]]) -> list[str]:
    return [name for name in _names(facts) if len({each.get(name) for each in facts}) > 1]


def _fingerprint(hello: Hello) -> Mapping[str, str]:
    return hello.fingerprint


def _processor(hello: Hello) -> Mapping[str, str]:
    return hello.processor


def _names(facts: Sequence[Mapping[str, str]]) -> list[str]:
    """In the order in which they are told."""
    return list(dict.fromkeys(name for each in facts for name in each))


def _few_files(names: Sequence[str]) -> list[str]:
    """The same, with only the first of many weight files."""
    others = [name for name in names if name.startswith(WEIGHTS)][_FILES:]
    return [name for name in names if name not in others]


def _table(hellos: Sequence[Hello], facts: Sequence[Mapping[str, str]], names: Sequence[str]) -> list[str]:
    """A row a name, a column for the ranks that are alike in all of them."""
    names = _few_files(names)
    alike: dict[tuple[str, ...], list[Hello]] = {}
    for hello, each in zip(hellos, facts, strict=True):
        alike.setdefault(tuple(each.get(name, _NONE) for name in names), []).append(hello)
    heads = [f"{of_ranks(sorted(h.rank for h in group))} on {', '.join(dict.fromkeys(h.host for h in group))}"
             for group in alike.values()]  # fmt: skip
    return table([["", *heads], *([name, *values] for name, *values in zip(names, *alike, strict=True))])


def _difference(first: Hello, hello: Hello, facts: Callable[[Hello], Mapping[str, str]], way_out: str) -> str:
    """`first` stands for those that came after it and are like it."""
    for key in sorted({*facts(hello), *facts(first)}):
        mine, theirs = facts(hello).get(key, _NONE), facts(first).get(key, _NONE)
        if mine != theirs:
            have = f"rank {first.rank} on {first.host} has {key} {theirs}, rank {hello.rank} on {hello.host} has {key} {mine}"
            return f"{have}: {'put the same files on every node' if key.startswith(WEIGHTS) else way_out}"
    return ""


def _clash(others: Iterable[Hello], hello: Hello) -> str:
    """Two machines that other nodes could not tell apart."""
    for other in others:
        if other.node.address == hello.node.address and other.node.machine != hello.node.machine:
            return (
                f"rank {other.rank} on {other.host} and rank {hello.rank} on {hello.host} both call themselves "
                f"{hello.node.address}: pass --interface with a network that the nodes share, such as --interface 10.0.0.0/24"
            )
    return ""
