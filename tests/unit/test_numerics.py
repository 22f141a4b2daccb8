"""The CPU numerics contract, op by op: a row's bits are those of the row alone, for any rows beside it and any thread count."""

from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from tpserve.layers.activation import PLAIN, clamped_swiglu, gelu_tanh_mul, silu_mul
from tpserve.layers.latent import per_head
from tpserve.layers.mlp import MLP
from tpserve.layers.moe import Experts, MoE
from tpserve.layers.norm import AllHeadsNorm, LayerNorm, add_rms_norm, rms_norm
from tpserve.layers.rope import tables
from tpserve.layers.routing import Routing
from tpserve.parallel.group import Group
from tpserve.quant.matmul import matmul, pad_rows
from tpserve.quant.packed import PackedWeight, pack, packs
from tpserve.types.model_spec import RopeSpec, RoutingSpec

ROWS = (1, 2, 3, 4, 5, 16, 17, 256, 257, 600)
OFFSETS = (0, 1, 6)
DTYPES = (torch.float32, torch.bfloat16)
Op = Callable[[torch.Tensor], torch.Tensor]
ORACLES: dict[str, Op] = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh"), "relu": F.relu}


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


def assert_rows_stand_alone(op: Op, width: int, dtype: torch.dtype) -> None:
    """`op` maps rows to rows; each must come out as it does alone on one thread."""
    x_TH = (torch.randn(max(ROWS) + max(OFFSETS), width) * 2).to(dtype)
    torch.set_num_threads(1)
    alone = torch.cat([op(row.unsqueeze(0)) for row in x_TH])
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for rows in ROWS:
            for offset in OFFSETS:
                got = op(x_TH[offset : offset + rows])
                assert torch.equal(got, alone[offset : offset + rows]), f"{rows} rows from {offset}, {threads} threads"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape_NK", [(64, 64), (517, 64), (59, 96), (64, 58), (2, 16), (300, 171), (1024, 256), (512, 1408)], ids=str
)
def test_matmul(shape_NK: tuple[int, int], dtype: torch.dtype) -> None:
    weight_NK = (torch.randn(shape_NK) / shape_NK[1] ** 0.5).to(dtype)
    assert_rows_stand_alone(lambda x: matmul(x, weight_NK), shape_NK[1], dtype)


@pytest.mark.skipif(not packs(), reason="weights are packed on AVX-512 only")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape_NK", [(59, 96), (300, 171), (512, 1408), (192, 3000), (96, 8192)], ids=str)
def test_packed_matmul(shape_NK: tuple[int, int], dtype: torch.dtype) -> None:
    weight_NK = (torch.randn(shape_NK) / shape_NK[1] ** 0.5).to(dtype)
    packed = pack(weight_NK)
    assert isinstance(packed, PackedWeight)
    assert_rows_stand_alone(lambda x: matmul(x, packed), shape_NK[1], dtype)
    x_TK = torch.randn(7, shape_NK[1]).to(dtype)
    torch.testing.assert_close(matmul(x_TK, packed), matmul(x_TK, weight_NK))


def test_float16_stays_plain() -> None:
    weight_NK = torch.randn(8, 8).half()
    assert pack(weight_NK) is weight_NK


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [8, 64, 171, 1000, 4096])
def test_norms(width: int, dtype: torch.dtype) -> None:
    weight_H = torch.randn(width).to(dtype)
    assert_rows_stand_alone(lambda x: rms_norm(x, weight_H, 1e-6), width, dtype)
    assert_rows_stand_alone(lambda x: torch.cat(add_rms_norm(x, x.flip(1), weight_H, 1e-6), dim=1), width, dtype)
    assert_rows_stand_alone(lambda x: rms_norm(x, weight_H, 1e-6, offset=1.0), width, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("count", "num_active", "mine", "channels", "shared"),
    [(5, 2, range(5), 58, 0), (8, 2, range(2, 5), 64, 0), (60, 8, range(60), 20, 0), (7, 3, range(3, 7), 171, 100)],
    ids=str,
)
def test_experts(count: int, num_active: int, mine: range, channels: int, shared: int, dtype: torch.dtype) -> None:
    """Whichever experts the other rows go to; the rest of a step's rows is padding, which counts for no expert."""
    hidden, group = 96, Group()

    def weight(*shape: int) -> torch.Tensor:
        return (torch.randn(shape) * 2 / shape[-1] ** 0.5).to(dtype)

    experts = Experts(count, mine, weight(len(mine), 2 * channels, hidden), silu_mul, weight(len(mine), hidden, channels))
    beside = MLP(weight(2 * shared, hidden), None, silu_mul, weight(hidden, shared), None, group) if shared else None
    router, tally = weight(count + bool(shared), hidden).float(), torch.zeros(count, dtype=torch.int64)
    routing = Routing(RoutingSpec(num_active, renormalise=count % 2 == 0))
    layer = MoE(router, routing, experts, beside, tally, group).packed()

    def op(x_TH: torch.Tensor) -> torch.Tensor:
        before = tally.sum()
        out_TH = layer(pad_rows(x_TH), len(x_TH))
        assert tally.sum() - before == num_active * len(x_TH) and not out_TH[len(x_TH) :].any()
        return out_TH[: len(x_TH)]

    assert_rows_stand_alone(op, hidden, dtype)
    x_TH = torch.randn(9, hidden).to(dtype)
    tolerance = 4e-2 if dtype == torch.bfloat16 else 1e-5
    tally.zero_()
    op(x_TH)
    chosen = (x_TH.float() @ router.T)[:, :count].topk(num_active).indices
    assert torch.equal(tally, chosen.flatten().bincount(minlength=count)), "other ranks' experts are counted here too"
    torch.testing.assert_close(op(x_TH).float(), one_by_one(layer, x_TH.float()), atol=tolerance, rtol=tolerance)


def one_by_one(layer: MoE, x_TH: torch.Tensor) -> torch.Tensor:
    """The same in float32, token by token and expert by expert."""
    experts, out_TH = layer.experts, torch.zeros_like(x_TH)
    logits_TE = x_TH @ layer.router.T
    chosen = logits_TE[:, : experts.count].softmax(1).topk(layer.routing.spec.num_active)
    for t, (weights, ids) in enumerate(zip(chosen.values, chosen.indices, strict=True)):
        total = weights.sum() if layer.routing.spec.renormalise else 1.0
        for probability, e in zip(weights, ids.tolist(), strict=True):
            if e in experts.mine:
                gate, up = (experts.gate_up_EI2H[e - experts.mine.start].float() @ x_TH[t]).chunk(2)
                down = experts.down_EHI[e - experts.mine.start].float()[:, : len(gate)]
                out_TH[t] += probability / total * (down @ (torch.nn.functional.silu(gate) * up))
    if layer.shared is None:
        return out_TH
    return out_TH + layer.shared.part(x_TH.to(experts.down_EHI.dtype)).float() * logits_TE[:, -1:].sigmoid()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [8, 64, 171, 1000, 4096])
def test_layer_norm(width: int, dtype: torch.dtype) -> None:
    weight_H, bias_H = torch.randn(2, width).to(dtype)
    for norm in (LayerNorm(weight_H, bias_H, 1e-5), LayerNorm(None, None, 1e-5)):
        assert_rows_stand_alone(lambda x, norm=norm: torch.cat(norm.add(x, x.flip(1)), dim=1), width, dtype)  # type: ignore[misc]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(3, 1, 8), (6, 2, 80), (32, 32, 128)])
def test_norm_over_all_heads(heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> None:
    q_Q, k_K = torch.randn(heads * dim).to(dtype), torch.randn(kv_heads * dim).to(dtype)
    norm = AllHeadsNorm(q_Q, k_K, 1e-6, heads * dim, kv_heads * dim, True, Group())

    def op(x: torch.Tensor) -> torch.Tensor:
        return torch.cat(norm(*x.view(len(x), -1, dim).tensor_split((heads,), dim=1)), dim=1).flatten(1)

    assert_rows_stand_alone(op, (heads + kv_heads) * dim, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 3, 58, 171, 1000, 4096])
@pytest.mark.parametrize("name", PLAIN)
def test_activations(name: str, width: int, dtype: torch.dtype) -> None:
    assert_rows_stand_alone(PLAIN[name], width, dtype)


@pytest.mark.parametrize("name", PLAIN)
def test_activations_are_those_of_torch(name: str) -> None:
    x = torch.cat([torch.linspace(-30, 30, 10001), torch.tensor([-1e4, -100.0, -0.0, 0.0, 100.0, 1e4])])
    torch.testing.assert_close(PLAIN[name](x), ORACLES[name](x), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [2, 116, 342, 2000, 8192])
def test_gated_activations(width: int, dtype: torch.dtype) -> None:
    assert_rows_stand_alone(silu_mul, width, dtype)
    assert_rows_stand_alone(gelu_tanh_mul, width, dtype)
    assert_rows_stand_alone(partial(clamped_swiglu, alpha=1.702, limit=0.8), width, dtype)


def test_gated_activations_are_those_of_torch() -> None:
    gate, up = torch.linspace(-30, 30, 10001), torch.linspace(12, -12, 10001)
    beside = torch.cat((gate, up)).unsqueeze(0)
    assert_close = partial(torch.testing.assert_close, atol=1e-6, rtol=1e-6)
    assert_close(silu_mul(beside)[0], F.silu(gate) * up)
    assert_close(gelu_tanh_mul(beside)[0], F.gelu(gate, approximate="tanh") * up)
    limited = gate.clamp(max=7.0)
    assert_close(clamped_swiglu(beside, 1.702, 7.0)[0], limited * torch.sigmoid(1.702 * limited) * (up.clamp(-7.0, 7.0) + 1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [517, 1000])
def test_capped_logits(width: int, dtype: torch.dtype) -> None:
    assert_rows_stand_alone(lambda x: (x.float() * 9).div_(30.0).tanh_().mul_(30.0), width, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "dim", "turning"), [(3, 8, None), (6, 80, None), (12, 128, None), (6, 80, 54)])
def test_rope(heads: int, dim: int, turning: int | None, dtype: torch.dtype) -> None:
    rope = tables(RopeSpec(num_channels=turning), dim, 1000, torch.device("cpu"))

    def op(x: torch.Tensor) -> torch.Tensor:
        """The first column says which position a row has."""
        q_TND = x[:, 1:].reshape(len(x), heads, dim)
        positions_T = (x[:, 0].float().abs() * 200).long().clamp(max=999)
        return torch.cat(rope.to(positions_T)(q_TND, q_TND[:, :1]), dim=1).flatten(1)

    assert_rows_stand_alone(op, 1 + heads * dim, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "inner", "outer"), [(1, 12, 32), (5, 20, 32), (43, 32, 20), (6, 128, 512), (6, 512, 128)])
def test_products_of_heads(heads: int, inner: int, outer: int, dtype: torch.dtype) -> None:
    weight_NKM = torch.randn(heads, inner, outer).to(dtype)

    def op(x: torch.Tensor) -> torch.Tensor:
        return per_head(pad_rows(x).view(-1, heads, inner), weight_NKM)[: len(x)].flatten(1)

    assert_rows_stand_alone(op, heads * inner, dtype)


def test_neighbours_turn_together() -> None:
    """Scores, which know no order of channels, are those of pairs (2 c, 2 c + 1) rotated as complex numbers."""
    rope = tables(RopeSpec(interleaved=True), 16, 50, torch.device("cpu"))
    q_TND, k_TKD, positions_T = torch.randn(9, 3, 16), torch.randn(9, 1, 16), torch.randint(50, (9,))

    def turned(x: torch.Tensor) -> torch.Tensor:
        waves_TE = torch.polar(torch.ones(9, 8), positions_T.unsqueeze(1) / 10000 ** (torch.arange(8) / 8))
        return torch.view_as_real(torch.view_as_complex(x.unflatten(2, (8, 2))) * waves_TE.unsqueeze(1)).flatten(2)

    got_q, got_k = rope.to(positions_T)(q_TND, k_TKD)
    expected = torch.einsum("tnd,skd->nts", turned(q_TND), turned(k_TKD))
    torch.testing.assert_close(torch.einsum("tnd,skd->nts", got_q, got_k), expected, atol=1e-4, rtol=0)
