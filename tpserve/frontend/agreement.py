"""Whether the ranks that say Hello can work together, and how their nodes differ. Pure; decides nothing."""

from collections.abc import Iterable, Sequence

from tpserve.types.messages import Hello


def disagreement(known: Iterable[Hello], hello: Hello) -> str:
    """Why this rank cannot take part beside those already known; nothing when it can."""
    others = list(known)
    return (_difference(others[0], hello) if others else "") or _clash(others, hello)


def differences(hellos: Sequence[Hello]) -> list[str]:
    """What users have told NCCL and gloo on some nodes and not on others: a line for each variable, with who has what."""
    nodes = {hello.place.node: hello for hello in hellos}
    lines = []
    for name in sorted({name for hello in nodes.values() for name in hello.place.settings}):
        values = {node: hello.place.settings.get(name) for node, hello in sorted(nodes.items())}
        if len({*values.values()}) > 1:
            told = ", ".join(f"node {node} ({nodes[node].host}): {value or 'not set'}" for node, value in values.items())
            lines.append(f"{name} differs between nodes: {told}")
    return lines


def _difference(first: Hello, hello: Hello) -> str:
    """Facts that must agree on all ranks; the first rank known stands for those that came after it."""
    for key in sorted({*hello.fingerprint, *first.fingerprint}):
        mine, theirs = hello.fingerprint.get(key, "none"), first.fingerprint.get(key, "none")
        if mine != theirs:
            return (
                f"rank {first.rank} on {first.host} has {key} {theirs}, rank {hello.rank} on {hello.host} has {key} {mine}: "
                "start every node with the same version and arguments"
            )
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
