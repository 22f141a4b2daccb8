"""Whether the ranks can work together, and how they differ, by the facts in their Hellos. Pure; owns no state.

fingerprint                 must be equal on all ranks: a difference would give wrong tokens or a hang
processor                   must be equal on the ranks of a pipeline stage, for the same reason
traits and node.settings    may differ; a difference is a warning
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

from tpserve.observe.table import of_ranks, table
from tpserve.types.messages import KERNELS, WEIGHTS, Hello

REMEDY = "start every node with the same version and arguments"
REMEDY_PROCESSOR = (
    "tensor parallel ranks must compute alike to the last bit: put unlike processors in different pipeline stages "
    "(--pipeline-parallel-size)"
)
REMEDY_WEIGHTS = "put the same files on every node"
REMEDY_KERNELS = (
    "tensor parallel ranks need the library of CPU kernels all or none: install the same tpserve where a C++ compiler is, or set "
    "TPSERVE_ISA=off everywhere"
)
_NONE = "none"
_MAX_FILES = 4


def mismatch(known: Iterable[Hello], hello: Hello) -> str:
    """A sentence that says why `hello`'s rank cannot work with the known ones, which can work together; empty when it can."""
    first, of_stage, of_address = _representatives(known, hello)
    return (
        (_difference(first, hello, _fingerprint, REMEDY) if first is not None else "")
        or (_difference(of_stage, hello, _processor, REMEDY_PROCESSOR) if of_stage is not None else "")
        or (_address_conflict(of_address, hello) if of_address is not None else "")
    )


def _representatives(known: Iterable[Hello], hello: Hello) -> tuple[Hello | None, Hello | None, Hello | None]:
    """Of the known ranks the first, the first of `hello`'s stage and the first with its address: the others equal them."""
    first = of_stage = of_address = None
    for other in known:
        first = other if first is None else first
        of_stage = other if of_stage is None and other.stage == hello.stage else of_stage
        of_address = other if of_address is None and other.node.address == hello.node.address else of_address
        if of_stage is not None and of_address is not None:
            break
    return first, of_stage, of_address


def required_mismatches(hellos: Sequence[Hello]) -> list[str]:
    """A table of the facts that must be equal and differ, one column per group of equal ranks; empty when none differ."""
    stages = {hello.stage: [other.processor for other in hellos if other.stage == hello.stage] for hello in hellos}
    names = _differing([hello.fingerprint for hello in hellos])
    names += dict.fromkeys(name for facts in stages.values() for name in _differing(facts))
    return _table(hellos, [hello.fingerprint | hello.processor for hello in hellos], names) if names else []


def optional_mismatches(hellos: Sequence[Hello]) -> list[str]:
    """The same table of facts that may differ: drivers, GPU models, the user's NCCL and gloo settings."""
    facts = [hello.processor | hello.traits | hello.node.settings for hello in hellos]
    names = _differing(facts)
    return _table(hellos, facts, names) if names else []


def all_facts(hellos: Sequence[Hello]) -> list[str]:
    """The same table of all facts."""
    facts = [hello.fingerprint | hello.processor | hello.traits | hello.node.settings for hello in hellos]
    return _table(hellos, facts, _names(facts))


def _differing(facts: Sequence[Mapping[str, str]]) -> list[str]:
    return [name for name in _names(facts) if len({each.get(name) for each in facts}) > 1]


def _fingerprint(hello: Hello) -> Mapping[str, str]:
    return hello.fingerprint


def _processor(hello: Hello) -> Mapping[str, str]:
    return hello.processor


def _names(facts: Sequence[Mapping[str, str]]) -> list[str]:
    """The names of all facts, in the order of the Hellos."""
    return list(dict.fromkeys(name for each in facts for name in each))


def _limit_files(names: Sequence[str]) -> list[str]:
    """`names` with at most `_MAX_FILES` weight files."""
    others = [name for name in names if name.startswith(WEIGHTS)][_MAX_FILES:]
    return [name for name in names if name not in others]


def _table(hellos: Sequence[Hello], facts: Sequence[Mapping[str, str]], names: Sequence[str]) -> list[str]:
    """One row per name, one column per group of ranks that are equal in all of them."""
    names = _limit_files(names)
    groups: dict[tuple[str, ...], list[Hello]] = {}
    for hello, each in zip(hellos, facts, strict=True):
        groups.setdefault(tuple(each.get(name, _NONE) for name in names), []).append(hello)
    headings = [f"{of_ranks(sorted(h.rank for h in group))} on {', '.join(dict.fromkeys(h.host for h in group))}"
             for group in groups.values()]  # fmt: skip
    return table([["", *headings], *([name, *values] for name, *values in zip(names, *groups, strict=True))])


def _difference(first: Hello, hello: Hello, facts: Callable[[Hello], Mapping[str, str]], remedy: str) -> str:
    """A sentence about the first fact that differs; empty when none does. All known ranks are equal to `first`."""
    for key in sorted({*facts(hello), *facts(first)}):
        value, expected = facts(hello).get(key, _NONE), facts(first).get(key, _NONE)
        if value != expected:
            both = f"rank {first.rank} on {first.host} has {key} {expected}, rank {hello.rank} on {hello.host} has {key} {value}"
            return f"{both}: {REMEDY_KERNELS if key == KERNELS else REMEDY_WEIGHTS if key.startswith(WEIGHTS) else remedy}"
    return ""


def _address_conflict(other: Hello, hello: Hello) -> str:
    """A sentence about two machines with the same address; empty when they are one."""
    if other.node.machine == hello.node.machine:
        return ""
    return (
        f"rank {other.rank} on {other.host} and rank {hello.rank} on {hello.host} both call themselves "
        f"{hello.node.address}: pass --interface with a network that the nodes share, such as --interface 10.0.0.0/24"
    )
