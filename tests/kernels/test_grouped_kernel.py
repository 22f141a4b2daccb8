"""The experts' product: parity with the reference for any deal of rows, and bits that depend on the row and its expert only."""

import pytest
import torch

from tests.kernels.device import DEVICE
from tpserve_kernels import grouped

pytestmark = pytest.mark.usefixtures("every_row_alike")
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
DEALS = {
    "one row": [0, 1, 0],
    "nobody": [0, 0, 0],
    "all to the last": [0, 0, 70],
    "around a tile": [15, 16, 17, 0, 63, 64, 65],
    "each alone": [1] * 9,
}


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def ends_of(counts: list[int]) -> torch.Tensor:
    return torch.tensor(counts, device=DEVICE).cumsum(0).int()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("counts", DEALS.values(), ids=DEALS.keys())
def test_parity(counts: list[int], dtype: torch.dtype) -> None:
    foreign, inner, outputs = 5, 70, 140
    ends = ends_of(counts)
    x = random(sum(counts) + foreign, 2 * inner, dtype=dtype)[:, :inner]
    x[sum(counts) :] = torch.nan
    weight = random(len(counts), outputs, inner, dtype=dtype, seed=1) / inner**0.5
    for bias in (None, random(len(counts), outputs, dtype=dtype, seed=2)):
        actual = grouped.grouped_matmul(x, weight, ends, bias)[: sum(counts)]
        expected = grouped.grouped_matmul_reference(x, weight, ends, bias)[: sum(counts)]
        assert actual.dtype == dtype
        torch.testing.assert_close(actual, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_the_reference_is_a_product_an_expert() -> None:
    x, weight = random(5, 8, dtype=torch.float32), random(2, 6, 8, dtype=torch.float32, seed=1)
    expected = torch.cat([x[:3] @ weight[0].T, x[3:] @ weight[1].T])
    torch.testing.assert_close(grouped.grouped_matmul_reference(x, weight, ends_of([3, 2])), expected)
    bias = random(2, 6, dtype=torch.float32, seed=2)
    expected += torch.cat([bias[:1].expand(3, 6), bias[1:].expand(2, 6)])
    torch.testing.assert_close(grouped.grouped_matmul_reference(x, weight, ends_of([3, 2]), bias), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_row_does_not_depend_on_the_deal(dtype: torch.dtype) -> None:
    x, weight = random(70, 96, dtype=dtype), random(3, 40, 96, dtype=dtype, seed=1)
    together = grouped.grouped_matmul(x, weight, ends_of([1, 66, 3]))
    for row, expert in ((0, 0), (1, 1), (40, 1), (66, 1), (67, 2), (69, 2)):
        counts = [0, 0, 0]
        counts[expert] = 1
        assert torch.equal(grouped.grouped_matmul(x[row : row + 1], weight, ends_of(counts))[0], together[row])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_rows_by_token(dtype: torch.dtype) -> None:
    """A token may have several experts, some none here; no copy of its row is made."""
    x, weight = random(6, 40, dtype=dtype), random(3, 24, 40, dtype=dtype, seed=1) / 6
    tokens = torch.tensor([5, 0, 3, 3, 2, 5, 99, -7], dtype=torch.int32, device=DEVICE)  # the last two are of no expert
    ends = ends_of([3, 0, 3])
    actual = grouped.grouped_matmul(x, weight, ends, None, tokens)[:6]
    assert torch.equal(actual, grouped.grouped_matmul(x[tokens[:6]], weight, ends))
    expected = grouped.grouped_matmul_reference(x, weight, ends, None, tokens)
    assert expected.shape == (8, 24) and not expected[6:].any()
    torch.testing.assert_close(actual, expected[:6], rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_what_does_not_fit_is_refused() -> None:
    x, weight = random(4, 8, dtype=torch.float32), random(2, 6, 8, dtype=torch.float32)
    ends = ends_of([2, 2])
    for arguments in ((x.half(), weight, ends), (x[:, :7], weight, ends), (x, weight.mT, ends), (x, weight, ends.long())):
        with pytest.raises(AssertionError):
            grouped.grouped_matmul(*arguments)
    with pytest.raises(AssertionError):
        grouped.grouped_matmul(x, weight, ends, weight[:, 0])
    with pytest.raises(AssertionError):
        grouped.grouped_matmul(x, weight, ends, None, ends.long())
