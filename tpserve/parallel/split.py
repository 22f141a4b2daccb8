"""Shards: `total` things split into contiguous ranges for `parts` ranks. Plain integers, no torch.

Invariants: the ranges are in rank order, adjacent, and cover everything; none is empty; sizes differ by at most one unit (the
last unit may be partial). Key/value heads are the exception: with fewer heads than ranks, several ranks have the same head.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from tpserve.errors import UserError


def split(total: int, parts: int, unit: int = 1, *, what: str) -> tuple[range, ...]:
    """The range of each part, in whole units. `unit` becomes 1 when there are fewer units than parts.

    `what` names the things in errors. UserError when a part would be empty.
    """
    if total < parts:
        raise UserError(f"{total} {what} cannot be split {parts} ways: a share would be empty; at most {total} ways are possible")
    if total < parts * unit:
        unit = 1
    num_units = -(-total // unit)
    base, extra = divmod(num_units, parts)
    bounds = [(i * base + min(i, extra)) * unit for i in range(parts)] + [total]
    return tuple(range(a, b) for a, b in itertools.pairwise(bounds))


@dataclass(frozen=True)
class HeadShare:
    """The attention heads of one rank. Query head `q[i]` uses key/value head `kv[i // ratio]`, ratio = len(q) / len(kv)."""

    q: range
    kv: range


def split_heads(num_heads: int, num_kv_heads: int, parts: int) -> tuple[HeadShare, ...]:
    """Split attention heads so that all heads of a rank have one query/key-value ratio (GQA).

    With at least `parts` key/value heads, the unit is such a head with its query heads. With fewer, each key/value head is on
    several ranks, which split its query heads. UserError when a rank would have no query head.
    """
    assert num_heads % num_kv_heads == 0, "query heads are a multiple of key/value heads"
    ratio = num_heads // num_kv_heads
    if num_kv_heads >= parts:
        shares = split(num_kv_heads, parts, what="key/value heads")
        return tuple(HeadShare(range(kv.start * ratio, kv.stop * ratio), kv) for kv in shares)
    split(num_heads, parts, what="attention heads")  # refuses a rank without query heads
    result = []
    for head, ranks in enumerate(split(parts, num_kv_heads, what="ranks")):
        for q in split(ratio, len(ranks), what="queries of a key/value head"):
            result.append(HeadShare(range(head * ratio + q.start, head * ratio + q.stop), range(head, head + 1)))
    return tuple(result)


def imbalance(shares: Sequence[range], what: str) -> str | None:
    """A phrase for the log about the largest share; None when all shares are equal. `what` names the things."""
    sizes = [len(share) for share in shares]
    if min(sizes) == max(sizes):
        return None
    return f"slowest rank holds {max(sizes)} of {sum(sizes)} {what}"
