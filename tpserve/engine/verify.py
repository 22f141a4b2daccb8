"""`--verify-weights`: before loading, whether all nodes have the same bytes in their weight files.

The ranks of a node deal its files among themselves, so a node reads every byte once; the digests meet at the epoch's store.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

from msgspec import Struct, json
from torch._C._distributed_c10d import PrefixStore, Store  # torch.distributed has them without their types

from tpserve.config.env import RankEnv
from tpserve.errors import UserError
from tpserve.parallel.store import gather
from tpserve.weights.content import digests, slices

WAIT_S = 86400.0
"""For the slowest disk. The coordinator ends ranks that wait for a rank that has died or hangs."""


class Told(Struct, frozen=True, array_like=True):
    """By a rank: its node, and file name, first byte and digest of each slice it has read."""

    node: int
    slices: list[tuple[str, int, str]]


def check(
    env: RankEnv,
    directory: Path,
    names: Sequence[str],
    store: Store,
    threads: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """All ranks of an epoch call this with their node's weight files; `threads` read at a time.

    `progress(bytes_done, bytes_total)` follows what this rank reads. UserError on all ranks when two nodes differ.
    """
    mine = slices(directory, names)[env.local_rank :: env.local_world_size]
    found = zip(mine, digests(mine, threads, progress), strict=True)
    told = Told(env.node_rank, [(each.name, each.start, digest) for each, digest in found])
    ranks = range(env.world_size)
    all_told = gather(PrefixStore("weights", store), "rank", env.rank, ranks, json.encode(told), WAIT_S)
    if why := difference([json.decode(each, type=Told) for each in all_told]):
        raise UserError(f"--verify-weights: {why}: put the same files on every node")


def difference(told: Sequence[Told]) -> str:
    """The first bytes in which a node differs from the first one; empty when none does."""
    nodes: dict[int, dict[tuple[str, int], str]] = defaultdict(dict)
    for each in told:
        nodes[each.node].update({(name, start): digest for name, start, digest in each.slices})
    (first, theirs), *others = sorted(nodes.items())
    for node, own in others:
        for name, start in sorted({*theirs, *own}):
            if own.get((name, start)) != theirs.get((name, start)):
                return f"{name} of node {node} is not that of node {first}, from byte {start:,} on"
    return ""
