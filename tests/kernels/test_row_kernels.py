"""Norms, rope, gated activation and KV write: each kernel against its reference, the references against torch's own."""

import math
from functools import partial

import pytest
import torch

from tests.kernels.device import DEVICE
from tpserve_kernels import activation, kv, norm, rope

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


@pytest.mark.parametrize(("dtype", "intermediate"), [(torch.float32, 1025), (torch.float16, 24), (torch.bfloat16, 1024)])
def test_gated_activations(dtype: torch.dtype, intermediate: int) -> None:
    gate_up = random(3, 2 * intermediate + 8, dtype=dtype)[:, : 2 * intermediate] * 4
    assert_close(activation.silu_mul(gate_up), activation.silu_mul_reference(gate_up))
    assert_close(activation.gelu_tanh_mul(gate_up), activation.gelu_tanh_mul_reference(gate_up))
    clamped = activation.clamped_swiglu(gate_up, 1.7, 2.5)
    assert_close(clamped, activation.clamped_swiglu_reference(gate_up, 1.7, 2.5))
    assert not torch.equal(clamped, activation.clamped_swiglu(gate_up, 1.7, 7.0)), "some were beyond the limit"


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


@pytest.mark.parametrize(
    ("dtype", "q_heads", "k_heads", "head_dim", "angles"),
    [(torch.float32, 4, 2, 16, 8), (torch.float16, 3, 1, 80, 40), (torch.bfloat16, 7, 1, 16, 8), (torch.float32, 2, 2, 32, 4)],
)
def test_rope(dtype: torch.dtype, q_heads: int, k_heads: int, head_dim: int, angles: int) -> None:
    packed = random(5, (q_heads + 2 * k_heads) * head_dim, dtype=dtype)
    q, k, _ = packed.split([q_heads * head_dim, k_heads * head_dim, k_heads * head_dim], dim=1)
    q, k = q.view(5, q_heads, head_dim), k.view(5, k_heads, head_dim)
    angle = random(9, angles)
    positions = torch.tensor([0, 8, 3, 3, 1], device=DEVICE)
    arguments = (q, k, angle.cos(), angle.sin(), positions)
    for actual, expected in zip(rope.apply_rope(*arguments), rope.apply_rope_reference(*arguments), strict=True):
        assert_close(actual, expected)


def test_rope_reference_is_a_rotation_of_the_complex_plane() -> None:
    q, angle, positions = random(3, 2, 12), random(4, 5), torch.tensor([3, 0, 2], device=DEVICE)
    turned, _ = rope.apply_rope_reference(q, q, angle.cos(), angle.sin(), positions)
    expected = torch.complex(q[..., :5], q[..., 5:10]) * torch.polar(torch.ones_like(angle), angle)[positions].unsqueeze(1)
    assert_close(turned, torch.cat([expected.real, expected.imag, q[..., 10:]], dim=-1))


@pytest.mark.parametrize(("dtype", "heads", "head_dim", "page"), [(torch.float32, 3, 80, 16), (torch.bfloat16, 2, 16, 32)])
def test_write_kv(dtype: torch.dtype, heads: int, head_dim: int, page: int) -> None:
    packed = random(4, 2, heads, head_dim, dtype=dtype)
    k, v = packed[:, 0], packed[:, 1]
    slots = torch.tensor([3 * page - 1, -1, 0, page], device=DEVICE)
    written = [torch.full((3, page, heads, head_dim), 7.0, dtype=dtype, device=DEVICE) for _ in range(2)]
    expected = [torch.full_like(cache, 7.0) for cache in written]
    kv.write_kv(k, v, written[0], written[1], slots)
    kv.write_kv_reference(k, v, expected[0], expected[1], slots)
    assert torch.equal(written[0], expected[0]) and torch.equal(written[1], expected[1])
    assert torch.equal(written[1][2, page - 1], v[0]) and torch.equal(written[0][1, 0], k[3])
    assert (written[0] == 7.0).sum() == (3 * page - 3) * heads * head_dim


def test_write_kv_of_two_widths_and_of_latents() -> None:
    slots = torch.tensor([33, 0, -1], device=DEVICE)
    keys, values = random(3, 2, 48), random(3, 2, 16, seed=1)
    k_cache, v_cache = (torch.full((3, 16, 2, width), 7.0, device=DEVICE) for width in (48, 16))
    kv.write_kv(keys, values, k_cache, v_cache, slots)
    assert torch.equal(k_cache[2, 1], keys[0]) and torch.equal(v_cache[2, 1], values[0]) and torch.equal(v_cache[0, 0], values[1])
    assert (k_cache == 7.0).sum() == 46 * 96 and (v_cache == 7.0).sum() == 46 * 32
    alone = torch.full_like(k_cache, 7.0)
    kv.write_kv(keys, None, alone, alone[..., :16], slots)
    expected = torch.full_like(k_cache, 7.0)
    kv.write_kv_reference(keys, None, expected, expected[..., :16], slots)
    assert torch.equal(alone, expected) and torch.equal(alone, k_cache)


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_row_alone_has_the_same_bits(dtype: torch.dtype) -> None:
    x, weight = random(17, 96, dtype=dtype), random(96, dtype=dtype, seed=1)
    heads, angle, positions = x.view(17, 6, 16), random(20, 8), torch.arange(17, device=DEVICE)

    def outputs(rows: slice) -> list[torch.Tensor]:
        turned = rope.apply_rope(heads[rows], heads[rows], angle.cos(), angle.sin(), positions[rows])
        fused = norm.add_rms_norm(x[rows], x[rows], weight, 1e-5)
        gated = [activation.silu_mul(x[rows]), activation.gelu_tanh_mul(x[rows]), activation.clamped_swiglu(x[rows], 1.7, 2.0)]
        return [norm.rms_norm(x[rows], weight, 1e-5), *fused, *gated, *turned]

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
        lambda: rope.apply_rope(x.view(4, 1, 8), x.view(4, 1, 8), x, x, torch.zeros(4, dtype=torch.int64, device=DEVICE)),
        lambda: kv.write_kv(x.view(4, 1, 8), x.view(4, 1, 8), x.half().view(1, 4, 1, 8), x.half().view(1, 4, 1, 8), x[:, 0]),
    ]
    for call in refused:
        with pytest.raises(AssertionError):
            call()
