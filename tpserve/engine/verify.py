"""`--verify-weights`: check, before loading, that all nodes have the same bytes in their weight files.

The ranks of a node share the slices of its files, so a node reads every byte once. The epoch's store gathers the digests.
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
"""Long enough for the slowest disk. If a rank dies or hangs meanwhile, the coordinator ends the others."""


class SliceDigests(Struct, frozen=True, array_like=True):
    """What one rank has read: its node, and (file name, first byte, digest) of each slice."""

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
    """All ranks of an epoch call this with their node's weight files; `threads` threads read.

    Calls `progress(bytes_done, bytes_total)` for this rank's slices. Raises UserError on all ranks when two nodes differ.
    """
    own_slices = slices(directory, names)[env.local_rank :: env.local_world_size]
    read = zip(own_slices, digests(own_slices, threads, progress), strict=True)
    own = SliceDigests(env.node_rank, [(each.name, each.start, digest) for each, digest in read])
    gathered = gather(PrefixStore("weights", store), "rank", env.rank, range(env.world_size), json.encode(own), WAIT_S)
    if why := difference([json.decode(data, type=SliceDigests) for data in gathered]):
        raise UserError(f"--verify-weights: {why}: put the same files on every node")


def difference(ranks: Sequence[SliceDigests]) -> str:
    """The first slice in which a node differs from the first node, in words; "" when no node differs."""
    nodes: dict[int, dict[tuple[str, int], str]] = defaultdict(dict)
    for rank in ranks:
        nodes[rank.node].update({(name, start): digest for name, start, digest in rank.slices})
    (first, reference), *others = sorted(nodes.items())
    for node, found in others:
        for name, start in sorted({*reference, *found}):
            if found.get((name, start)) != reference.get((name, start)):
                return f"{name} of node {node} is not that of node {first}, from byte {start:,} on"
    return ""
