"""The split: every thing held, by the right rank, in order."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tpserve.errors import UserError
from tpserve.parallel.split import HeadShare, imbalance, split, split_heads
from tpserve.types.layout import even_layers

quick = settings(max_examples=150, deadline=None)


@quick
@given(st.integers(1, 3000), st.integers(1, 40), st.sampled_from([1, 2, 64, 128]))
def test_ranges_touch_cover_and_are_even(total: int, parts: int, unit: int) -> None:
    if total < parts:
        with pytest.raises(UserError, match="rows"):
            split(total, parts, unit, what="rows")
        return
    shares = split(total, parts, unit, what="rows")
    assert [i for share in shares for i in share] == list(range(total))
    effective = unit if total >= parts * unit else 1
    assert all(len(share) > 0 and share.start % effective == 0 for share in shares)
    units = [-(-len(share) // effective) for share in shares]
    assert max(units) - min(units) <= 1


def test_units_stay_whole_when_they_can() -> None:
    assert split(517, 3, 128, what="tokens") == (range(256), range(256, 512), range(512, 517))
    assert split(172, 3, 64, what="rows") == (range(58), range(58, 115), range(115, 172))


@quick
@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 40))
def test_each_rank_has_one_ratio_and_the_keys_of_its_queries(kv: int, ratio: int, parts: int) -> None:
    heads = kv * ratio
    if parts > heads:
        with pytest.raises(UserError):
            split_heads(heads, kv, parts)
        return
    shares = split_heads(heads, kv, parts)
    assert len(shares) == parts
    assert [q for share in shares for q in share.q] == list(range(heads))
    for share in shares:
        own_ratio, rest = divmod(len(share.q), len(share.kv))
        assert rest == 0
        assert [q // ratio for q in share.q] == [share.kv[i // own_ratio] for i in range(len(share.q))]


def test_ranks_are_dealt_to_few_key_value_heads() -> None:
    assert split_heads(8, 2, 3) == (
        HeadShare(range(2), range(1)),
        HeadShare(range(2, 4), range(1)),
        HeadShare(range(4, 8), range(1, 2)),
    )


def test_layers_and_imbalance() -> None:
    assert even_layers(5, 2) == (3, 2)
    assert even_layers(7, 3) == (3, 2, 2)
    assert imbalance(split(8, 3, what="heads"), "heads") == "slowest rank holds 3 of 8 heads"
    assert imbalance(split(8, 2, what="heads"), "heads") is None
