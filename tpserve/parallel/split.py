"""Who holds what: a whole of `total` things dealt to `parts` ranks as contiguous ranges. Plain integers, no torch.

Invariants: the ranges are in rank order, touch each other and cover the whole; none is empty; sizes differ by at most
one unit (the last unit of the whole may be a partial one). Key and value heads are the exception: with fewer of them
than ranks they are held several times.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from tpserve.errors import UserError


def split(total: int, parts: int, unit: int = 1, *, what: str) -> tuple[range, ...]:
    """Deal `total` things in whole units; `unit` falls to 1 when there is no unit for each. `what` names them in errors."""
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
    """The attention heads of one rank. Query head `q[i]` reads key/value head `kv[i // ratio]`, ratio = len(q) / len(kv)."""

    q: range
    kv: range


def split_heads(num_heads: int, num_kv_heads: int, parts: int) -> tuple[HeadShare, ...]:
    """Deal attention heads so that each rank has one query/key-value ratio.

    With enough key/value heads the unit is such a head with its queries. With fewer than ranks, the ranks are dealt to
    key/value heads, each held by several ranks, and its queries are split among those.
    """
    assert num_heads % num_kv_heads == 0, "query heads are a multiple of key/value heads"
    ratio = num_heads // num_kv_heads
    if num_kv_heads >= parts:
        shares = split(num_kv_heads, parts, what="key/value heads")
        return tuple(HeadShare(range(kv.start * ratio, kv.stop * ratio), kv) for kv in shares)
    split(num_heads, parts, what="attention heads")  # refuses ranks without a query
    result = []
    for head, ranks in enumerate(split(parts, num_kv_heads, what="ranks")):
        for q in split(ratio, len(ranks), what="queries of a key/value head"):
            result.append(HeadShare(range(head * ratio + q.start, head * ratio + q.stop), range(head, head + 1)))
    return tuple(result)


def imbalance(shares: Sequence[range], what: str) -> str | None:
    """Say how much more than its part the slowest rank holds; None when the shares are even."""
    sizes = [len(share) for share in shares]
    if min(sizes) == max(sizes):
        return None
    return f"slowest rank holds {max(sizes)} of {sum(sizes)} {what}"
