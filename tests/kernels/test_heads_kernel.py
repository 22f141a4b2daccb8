"""What stands between the projections and attention: each kernel against its reference, and against torch's own rotation."""

from typing import Any

import pytest
import torch

from tests.kernels.device import DEVICE
from tpserve_kernels import heads
from tpserve_kernels.cpu.qkv_heads import HeadNorms, Rotation

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
UNWRITTEN = 7.0


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, rtol=TOLERANCE[actual.dtype], atol=TOLERANCE[actual.dtype])


def rotation(angles: int, *, interleaved: bool = False, rows: int = 5) -> Rotation:
    angle = random(9, angles)
    return Rotation(torch.tensor([0, 8, 3, 3, 1], device=DEVICE)[:rows], 1.2 * angle.cos(), 1.2 * angle.sin(), interleaved)


def qkv(num_heads: int, num_kv: int, dim: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Queries, keys and values of five rows, in a packed projection."""
    packed = random(5, (num_heads + 2 * num_kv) * dim, dtype=dtype).view(5, -1, dim)
    return packed.tensor_split((num_heads, num_heads + num_kv), dim=1)


def placed(place: Any, rows: tuple[torch.Tensor, ...], **options: Any) -> tuple[torch.Tensor, ...]:
    """The queries and both caches."""
    caches = [torch.full((48, *rows[1].shape[1:]), UNWRITTEN, dtype=rows[1].dtype, device=DEVICE) for _ in range(2)]
    slots = torch.tensor([47, -1, 0, 16, 5], device=DEVICE)[: len(rows[0])]
    return place(*rows, *caches, slots, **options), *caches


CASES: dict[str, tuple[tuple[int, int, int], torch.dtype, int, bool]] = {
    "all channels rotate": ((4, 2, 16), torch.float32, 8, False),
    "three blocks of heads": ((17, 9, 16), torch.float16, 8, False),
    "some channels rotate": ((3, 1, 80), torch.float16, 20, False),
    "neighbours rotate": ((4, 4, 24), torch.float32, 12, True),
    "neighbours rotate, bfloat16": ((4, 2, 16), torch.bfloat16, 8, True),
    "none rotates": ((2, 2, 48), torch.bfloat16, 0, False),
}


@pytest.mark.parametrize(("sizes", "dtype", "angles", "interleaved"), CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("extra", ["", "bias", "norm", "bias and norm"])
def test_place_heads(sizes: tuple[int, int, int], dtype: torch.dtype, angles: int, interleaved: bool, extra: str) -> None:
    (num_heads, num_kv, dim), rows = sizes, qkv(*sizes, dtype)
    norms = HeadNorms(random(dim, dtype=dtype, seed=2), random(dim, dtype=dtype, seed=3), 1e-5, 0.5)
    options = {
        "norms": norms if "norm" in extra else None,
        "rotation": rotation(angles, interleaved=interleaved) if angles else None,
        "bias_AD": random((num_heads + 2 * num_kv) * dim, dtype=dtype, seed=4) if "bias" in extra else None,
    }
    actual, expected = placed(heads.place_heads, rows, **options), placed(heads.place_heads_reference, rows, **options)
    for got, wanted in zip(actual, expected, strict=True):
        assert_close(got, wanted)
    for cache in actual[1:]:
        assert (cache == UNWRITTEN).flatten(1).all(1).sum() == 44 and not (cache[47] == UNWRITTEN).all()


def test_the_reference_rotates_the_complex_plane() -> None:
    q, k, v = qkv(2, 1, 12, torch.float32)
    turn = rotation(5)
    turned, k_cache, v_cache = placed(heads.place_heads_reference, (q, k, v), rotation=turn)
    wave = torch.complex(turn.cos_PE, turn.sin_PE)[turn.positions_T].unsqueeze(1)
    expected = torch.complex(q[..., :5], q[..., 5:10]) * wave
    assert_close(turned, torch.cat([expected.real, expected.imag, q[..., 10:]], dim=-1))
    expected = torch.complex(k[0, :, :5], k[0, :, 5:10]) * wave[0]
    assert_close(k_cache[47], torch.cat([expected.real, expected.imag, k[0, :, 10:]], dim=-1))
    assert torch.equal(v_cache[16], v[3])


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_row_alone_has_the_same_bits(dtype: torch.dtype) -> None:
    rows, turn = qkv(9, 2, 16, dtype), rotation(8)
    options = {"norms": HeadNorms(rows[1][0, 0], rows[1][1, 1], 1e-5), "bias_AD": random(13 * 16, dtype=dtype)}
    together = placed(heads.place_heads, rows, rotation=turn, **options)
    alone = placed(
        heads.place_heads, tuple(x[:1] for x in rows), rotation=turn._replace(positions_T=turn.positions_T[:1]), **options
    )
    assert torch.equal(alone[0][0], together[0][0]) and all(torch.equal(alone[i][47], together[i][47]) for i in (1, 2))


@pytest.mark.parametrize(("dtype", "num_heads", "latent", "angles", "interleaved"), [
    (torch.float32, 3, 40, 8, True), (torch.float16, 9, 64, 12, False), (torch.bfloat16, 16, 32, 8, True),
])  # fmt: skip
def test_place_latents(dtype: torch.dtype, num_heads: int, latent: int, angles: int, interleaved: bool) -> None:
    down, q = random(5, latent + 2 * angles + 8, dtype=dtype), random(5, num_heads, 16 + 2 * angles, dtype=dtype, seed=1)
    inputs = down[:, :latent], down[:, latent : latent + 2 * angles], q[..., 16:]
    slots = torch.tensor([47, -1, 0, 16, 5], device=DEVICE)
    results = []
    for place in (heads.place_latents, heads.place_latents_reference):
        out = torch.full((5, num_heads, latent + 2 * angles), UNWRITTEN, dtype=dtype, device=DEVICE)
        cache = torch.full((48, latent + 2 * angles), UNWRITTEN, dtype=dtype, device=DEVICE)
        weight = random(latent, dtype=dtype, seed=2)
        place(*inputs, out[..., latent:], cache, slots, weight, 1e-5, 0.5, rotation(angles, interleaved=interleaved))
        results.append((out, cache))
    for actual, expected in zip(*results, strict=True):
        assert_close(actual, expected)
    assert (results[0][0][..., :latent] == UNWRITTEN).all() and (results[0][1] == UNWRITTEN).all(1).sum() == 44


def test_layouts_outside_the_contract_are_refused() -> None:
    q, k, v = qkv(4, 2, 16, torch.float32)
    refused: list[tuple[tuple[torch.Tensor, ...], dict[str, Any]]] = [
        ((q, k.half(), v), {}),
        ((q[..., ::2], k[..., ::2], v[..., ::2]), {}),
        ((q, k, v[:, :1]), {}),
        ((q, k, v), {"rotation": rotation(9)}),
        ((q, k, v), {"rotation": rotation(4, interleaved=True)}),
        ((q, k, v), {"rotation": rotation(8)._replace(positions_T=torch.zeros(4, dtype=torch.int64, device=DEVICE))}),
        ((q, k, v), {"norms": HeadNorms(q[0, 0, :8], q[0, 0], 1e-5)}),
        ((q, k, v), {"bias_AD": q[0].flatten()}),
    ]
    for rows, options in refused:
        with pytest.raises(AssertionError):
            placed(heads.place_heads, rows, **options)
