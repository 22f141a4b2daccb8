"""Norms and gated activations: each kernel against its reference, the references against torch's own."""

import math
from functools import partial

import pytest
import torch

from tests.kernels.device import DEVICE
from tpserve_kernels import across_heads, activation, norm

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
FLOATS = list(TOLERANCE)


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, rtol=TOLERANCE[actual.dtype], atol=TOLERANCE[actual.dtype])


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize(
    ("dtype", "hidden"), [(torch.float32, 100), (torch.float16, 64), (torch.bfloat16, 1), (torch.bfloat16, 513)]
)
def test_norms(dtype: torch.dtype, hidden: int, offset: float) -> None:
    wide = random(5, 2 * hidden, dtype=dtype)
    x, residual, weight = wide[:, :hidden], random(5, hidden, dtype=dtype, seed=1), random(hidden, dtype=dtype, seed=2)
    y = norm.rms_norm(x, weight, 1e-5, offset)
    assert_close(y, norm.rms_norm_reference(x, weight, 1e-5, offset))
    assert_close(y, torch.nn.functional.rms_norm(x.float(), (hidden,), weight.float() + offset, 1e-5).to(dtype))
    fused, total = norm.add_rms_norm(x, residual, weight, 1e-5, offset)
    reference, reference_total = norm.add_rms_norm_reference(x, residual, weight, 1e-5, offset)
    assert_close(total, reference_total)
    assert_close(fused, reference)
    assert torch.equal(fused, norm.rms_norm(total, weight, 1e-5, offset))
    if dtype != torch.bfloat16 or DEVICE == "cuda":  # the interpreter truncates to bfloat16 where a card rounds
        assert torch.equal(total, reference_total)
    first = random(hidden, dtype=dtype, seed=3)
    both, total = norm.norm_add_rms_norm(x, first, residual, weight, 1e-5, offset)
    apart = norm.add_rms_norm(norm.rms_norm(x, first, 1e-5, offset), residual, weight, 1e-5, offset)
    assert torch.equal(both, apart[0]) and torch.equal(total, apart[1]), "one launch has the bits of two"
    if dtype != torch.bfloat16 or DEVICE == "cuda":
        assert_close(total, norm.norm_add_rms_norm_reference(x, first, residual, weight, 1e-5, offset)[1])


@pytest.mark.parametrize(
    ("dtype", "hidden", "affine"), [(torch.float32, 100, "wb"), (torch.float16, 64, "w"), (torch.bfloat16, 513, "")]
)
def test_layer_norms(dtype: torch.dtype, hidden: int, affine: str) -> None:
    x, residual = random(5, 2 * hidden, dtype=dtype)[:, :hidden] + 3, random(5, hidden, dtype=dtype, seed=1)
    weight, bias = (random(hidden, dtype=dtype, seed=2) if name in affine else None for name in "wb")
    y = norm.layer_norm(x, weight, bias, 1e-5)
    assert_close(y, norm.layer_norm_reference(x, weight, bias, 1e-5))
    fused, total = norm.add_layer_norm(x, residual, weight, bias, 1e-5)
    reference, reference_total = norm.add_layer_norm_reference(x, residual, weight, bias, 1e-5)
    assert_close(total, reference_total)
    assert_close(fused, reference)
    assert torch.equal(fused, norm.layer_norm(total, weight, bias, 1e-5))


@pytest.mark.parametrize(("dtype", "intermediate"), [(torch.float32, 1025), (torch.float16, 24), (torch.bfloat16, 1024)])
def test_gated_activations(dtype: torch.dtype, intermediate: int) -> None:
    gate_up = random(3, 2 * intermediate + 8, dtype=dtype)[:, : 2 * intermediate] * 4
    assert_close(activation.silu_mul(gate_up), activation.silu_mul_reference(gate_up))
    assert_close(activation.gelu_tanh_mul(gate_up), activation.gelu_tanh_mul_reference(gate_up))
    clamped = activation.clamped_swiglu(gate_up, 1.7, 2.5)
    assert_close(clamped, activation.clamped_swiglu_reference(gate_up, 1.7, 2.5))
    assert not torch.equal(clamped, activation.clamped_swiglu(gate_up, 1.7, 7.0)), "some were beyond the limit"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_across_heads(dtype: torch.dtype) -> None:
    qkv = random(5, 200, dtype=dtype, seed=3)
    q, k, weight, counts = qkv[:, :96], qkv[:, 96:130], random(130, seed=5), (192, 68)
    sums = across_heads.squares(q, k)
    assert_close(sums, across_heads.squares_reference(q, k))
    normed = across_heads.scale(q, k, sums, weight[:96], weight[96:], counts, 1e-5)
    for actual, expected in zip(
        normed, across_heads.scale_reference(q, k, sums, weight[:96], weight[96:], counts, 1e-5), strict=True
    ):
        assert_close(actual, expected)
    assert torch.equal(across_heads.squares(q[2:3], k[2:3]), sums[2:3]), "a row's bits are its own"


@pytest.mark.parametrize("kind", ["silu", "gelu", "gelu_tanh", "relu"])
def test_plain_activations(kind: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x = random(3, 1030, dtype=dtype, seed=4)
        assert_close(activation.plain(x, kind), activation.plain_reference(x, kind))


def test_a_gated_activation_of_the_rows_that_count() -> None:
    gate_up, count = random(5, 48), torch.tensor([3], dtype=torch.int32, device=DEVICE)
    gate_up[3:] = torch.nan
    for op in (activation.silu_mul, activation.gelu_tanh_mul, partial(activation.clamped_swiglu, alpha=1.7, limit=2.5)):
        assert torch.equal(op(gate_up, num_rows=count)[:3], op(gate_up[:3]))
    with pytest.raises(AssertionError):
        activation.silu_mul(gate_up, count.long())


def test_the_clamped_reference_is_what_it_says() -> None:
    gate, up = [1.0, 9.0, -20.0, 0.5], [0.25, -8.0, 8.0, 0.0]
    limited = [(min(g, 7.0), max(-7.0, min(u, 7.0))) for g, u in zip(gate, up, strict=True)]
    expected = [g / (1 + math.exp(-1.702 * g)) * (u + 1) for g, u in limited]
    beside = torch.tensor([[*gate, *up]], device=DEVICE)
    assert_close(activation.clamped_swiglu_reference(beside, 1.702, 7.0), torch.tensor([expected], device=DEVICE))


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_row_alone_has_the_same_bits(dtype: torch.dtype) -> None:
    x, weight = random(17, 96, dtype=dtype), random(96, dtype=dtype, seed=1)

    def outputs(rows: slice) -> list[torch.Tensor]:
        fused = norm.add_rms_norm(x[rows], x[rows], weight, 1e-5)
        gated = [activation.silu_mul(x[rows]), activation.gelu_tanh_mul(x[rows]), activation.clamped_swiglu(x[rows], 1.7, 2.0)]
        return [norm.rms_norm(x[rows], weight, 1e-5), norm.layer_norm(x[rows], weight, weight, 1e-5), *fused, *gated]

    together = outputs(slice(None))
    for row in range(17):
        for alone, batch in zip(outputs(slice(row, row + 1)), together, strict=True):
            assert torch.equal(alone[0], batch[row])


def test_layouts_outside_the_contract_are_refused() -> None:
    x = random(4, 8)
    refused = [
        lambda: norm.rms_norm(x.t(), x[:, 0].contiguous(), 1e-5),
        lambda: norm.add_rms_norm(x, x.half(), x[0], 1e-5),
        lambda: activation.silu_mul(x[:, :7]),
        lambda: activation.clamped_swiglu(x.t(), 1.7, 7.0),
        lambda: norm.layer_norm(x, x[0], x[0, :7], 1e-5),
    ]
    for call in refused:
        with pytest.raises(AssertionError):
            call()
