"""The CPU numerics contract, op by op: a row's bits are those of the row alone, for any rows beside it and any thread count.

Products are taken as the engine takes them, packed where the processor can: on no processor may a test here fail.
"""

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from tpserve.layers.activation import ACTIVATIONS, clamped_swiglu, gelu_tanh_mul, silu_mul
from tpserve.layers.mlp import MLP
from tpserve.layers.moe import Experts, MoE
from tpserve.layers.norm import AllHeadsNorm, LayerNorm, add_rms_norm, rms_norm
from tpserve.layers.packing import Packer
from tpserve.layers.rope import tables
from tpserve.layers.routing import Routing
from tpserve.parallel.group import Group
from tpserve.quant import onednn, packed
from tpserve.quant.grouped import per_head
from tpserve.quant.matmul import matmul, pad_rows
from tpserve.quant.onednn import OneDNNWeight
from tpserve.quant.packed import can_pack, pack, pack_stack
from tpserve.types.model_spec import RopeSpec, RoutingSpec

ROWS = (1, 2, 3, 4, 5, 32, 33, 64, 257, 600)
"""Some libraries take other paths below four rows, above 32, or for the rows left over of a multiple of four."""
OFFSETS = (0, 1)
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
    """`op` maps rows to rows; each must come out as it does alone on one thread.

    All numbers of rows must give what the most rows give; of those the first, the last and some between must be what they are
    alone, which does not depend on where a row stands.
    """
    x_TH = (torch.randn(max(ROWS) + max(OFFSETS), width) * 2).to(dtype)
    torch.set_num_threads(1)
    together = op(x_TH)
    for i in (0, 1, 2, 3, 4, 31, 32, 33, 299, len(x_TH) - 2, len(x_TH) - 1):
        assert torch.equal(op(x_TH[i : i + 1]), together[i : i + 1]), f"row {i} alone"
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for rows in ROWS:
            for offset in OFFSETS:
                got = op(x_TH[offset : offset + rows])
                assert torch.equal(got, together[offset : offset + rows]), f"{rows} rows from {offset}, {threads} threads"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape_NK", [(2, 16), (59, 96), (64, 58), (300, 171), (64, 2048), (64, 5632)], ids=str)
def test_matmul(shape_NK: tuple[int, int], dtype: torch.dtype) -> None:
    """From an inner size of about 1,000 on the libraries' paths differ most."""
    weight_NK = (torch.randn(shape_NK) / shape_NK[1] ** 0.5).to(dtype)
    weight = pack(weight_NK)
    assert weight.shape == weight_NK.shape
    assert_rows_stand_alone(lambda x: matmul(x, weight), shape_NK[1], dtype)
    x_TK = torch.randn(7, shape_NK[1]).to(dtype)
    torch.testing.assert_close(matmul(x_TK, weight), matmul(x_TK, weight_NK))
    strided = torch.cat((x_TK, x_TK), dim=1)[:, : shape_NK[1]]
    assert torch.equal(matmul(strided, weight), matmul(x_TK, weight)), "nor on how rows lie in memory"


def test_what_cannot_be_packed_stays_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    for dtype in (torch.float16, torch.int8):
        weight_NK = torch.zeros(8, 8, dtype=dtype)
        assert pack(weight_NK) is weight_NK
    monkeypatch.setattr(packed, "is_native", lambda x: False)
    monkeypatch.setattr(onednn, "PACKABLE", ())
    onednn.can_pack.cache_clear()
    plain = torch.randn(8, 8)
    assert pack(plain) is plain
    onednn.can_pack.cache_clear()


def test_few_rows_at_once_where_the_processor_asks_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with AMX and bfloat16, forced here: no call of the library has more than 32 rows, and each row gets what is its own."""
    called: list[int] = []

    def product(x_TK: torch.Tensor, weight_NK: torch.Tensor) -> torch.Tensor:
        called.append(len(x_TK))
        return F.linear(x_TK, weight_NK)

    monkeypatch.setattr(onednn, "has_amx", lambda: True)
    assert onednn.max_rows(torch.bfloat16) == 32 and onednn.max_rows(torch.float32) is None
    monkeypatch.setattr(onednn, "_product", product)
    weight_NK, x_TK = torch.randn(24, 64), torch.randn(601, 64)
    sliced = OneDNNWeight(weight_NK, weight_NK.shape, onednn.max_rows(torch.bfloat16))
    torch.testing.assert_close(matmul(x_TK, sliced), x_TK @ weight_NK.T, atol=1e-4, rtol=0)
    assert called == [32] * 18 + [28], "in multiples of four"
    assert matmul(x_TK[:0], sliced).shape == (0, 24)
    monkeypatch.setattr(onednn, "has_amx", lambda: False)
    assert onednn.max_rows(torch.bfloat16) is None


def test_a_packed_stack_gives_its_memory_back() -> None:
    """A layer's experts are held twice one parameter at a time."""
    stack_ENK = torch.randn(3, 8, 16)
    parts = [weight_NK.clone() for weight_NK in stack_ENK]
    view_ENK = torch.randn(3, 2, 8, 16)[:, 1]
    for stack, plain in ((pack_stack(stack_ENK), parts), (pack_stack(view_ENK), list(view_ENK))):
        x_TEK = torch.randn(5, 3, 16)
        torch.testing.assert_close(per_head(x_TEK, stack), torch.einsum("tek,enk->ten", x_TEK, torch.stack(plain)))
    assert stack_ENK.untyped_storage().nbytes() == (0 if can_pack(torch.randn(2, 2)) else 3 * 8 * 16 * 4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [8, 64, 171, 1000, 4096])
def test_norms(width: int, dtype: torch.dtype) -> None:
    weight_H = torch.randn(width).to(dtype)
    assert_rows_stand_alone(lambda x: rms_norm(x, weight_H, 1e-6), width, dtype)
    assert_rows_stand_alone(lambda x: torch.cat(add_rms_norm(x, x.flip(1), weight_H, 1e-6), dim=1), width, dtype)
    assert_rows_stand_alone(lambda x: rms_norm(x, weight_H, 1e-6, offset=1.0), width, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("count", "num_active", "mine", "hidden", "channels", "shared"),
    [
        (8, 2, range(2, 5), 2048, 32, 0),
        (5, 2, range(5), 64, 2048, 0),
        (24, 6, range(24), 96, 20, 0),
        (7, 3, range(3, 7), 96, 171, 100),
    ],
    ids=str,
)
def test_experts(count: int, num_active: int, mine: range, hidden: int, channels: int, shared: int, dtype: torch.dtype) -> None:
    """Whichever experts the other rows go to; the rest of a step's rows is padding, which counts for no expert."""
    group = Group()

    def weight(*shape: int) -> torch.Tensor:
        return (torch.randn(shape) * 2 / shape[-1] ** 0.5).to(dtype)

    gate_up, down = weight(len(mine), 2 * channels, hidden), weight(len(mine), hidden, channels)
    biases = (weight(len(mine), 2 * channels), weight(len(mine), hidden)) if count == 5 else (None, None)
    beside = MLP(weight(2 * shared, hidden), None, silu_mul, weight(hidden, shared), None, group) if shared else None
    router, expert_load = weight(count + bool(shared), hidden).float(), torch.zeros(count, dtype=torch.int64)
    routing = Routing(RoutingSpec(num_active, renormalise=count % 2 == 0))
    plain = MoE(router, routing, Experts(count, mine, gate_up, silu_mul, down, *biases), beside, expert_load, group)
    layer = replace(deepcopy(plain), expert_load=expert_load).packed(Packer())  # which lets go of its plain weights

    def op(x_TH: torch.Tensor) -> torch.Tensor:
        before = expert_load.sum()
        out_TH = layer(pad_rows(x_TH), torch.arange(len(x_TH)))
        assert expert_load.sum() - before == num_active * len(x_TH) and not out_TH[len(x_TH) :].any()
        return out_TH[: len(x_TH)]

    assert_rows_stand_alone(op, hidden, dtype)
    x_TH = torch.randn(9, hidden).to(dtype)
    tolerance = 8e-2 if dtype == torch.bfloat16 else 5e-5
    expert_load.zero_()
    op(x_TH)
    chosen = (x_TH.float() @ router.T)[:, :count].topk(num_active).indices
    assert torch.equal(expert_load, chosen.flatten().bincount(minlength=count)), "other ranks' experts are counted here too"
    torch.testing.assert_close(op(x_TH).float(), one_by_one(plain, x_TH.float()), atol=tolerance, rtol=tolerance)


def one_by_one(layer: MoE, x_TH: torch.Tensor) -> torch.Tensor:
    """The same in float32, token by token and expert by expert, of plain weights."""
    experts, router, out_TH = layer.experts, layer.router, torch.zeros_like(x_TH)
    assert isinstance(router, torch.Tensor) and isinstance(experts.gate_up_EI2H, torch.Tensor)
    assert isinstance(experts.down_EHI, torch.Tensor)
    up_bias, down_bias = experts.gate_up_bias_EI2, experts.down_bias_EH
    logits_TE = x_TH @ router.T
    chosen = logits_TE[:, : experts.count].softmax(1).topk(layer.routing.spec.num_active)
    for t, (weights, ids) in enumerate(zip(chosen.values, chosen.indices, strict=True)):
        total = weights.sum() if layer.routing.spec.renormalise else 1.0
        for probability, expert in zip(weights, ids.tolist(), strict=True):
            if expert in experts.local_experts:
                e = expert - experts.local_experts.start
                gate_up = experts.gate_up_EI2H[e].float() @ x_TH[t] + (0 if up_bias is None else up_bias[e].float())
                gate, up = gate_up.chunk(2)
                down = experts.down_EHI[e].float() @ (F.silu(gate) * up) + (0 if down_bias is None else down_bias[e].float())
                out_TH[t] += probability / total * down
    if layer.shared is None:
        return out_TH
    return out_TH + layer.shared.partial_sum(x_TH.to(experts.down_EHI.dtype)).float() * logits_TE[:, -1:].sigmoid()


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
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name: str, width: int, dtype: torch.dtype) -> None:
    assert_rows_stand_alone(ACTIVATIONS[name], width, dtype)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_those_of_torch(name: str) -> None:
    x = torch.cat([torch.linspace(-30, 30, 10001), torch.tensor([-1e4, -100.0, -0.0, 0.0, 100.0, 1e4])])
    torch.testing.assert_close(ACTIVATIONS[name](x), ORACLES[name](x), atol=1e-6, rtol=1e-6)


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
        return torch.cat(rope.at(positions_T)(q_TND, q_TND[:, :1]), dim=1).flatten(1)

    assert_rows_stand_alone(op, 1 + heads * dim, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "inner", "outer"), [(1, 12, 32), (5, 20, 32), (2, 512, 16)])
def test_products_of_heads(heads: int, inner: int, outer: int, dtype: torch.dtype) -> None:
    weight_NMK = torch.randn(heads, outer, inner).to(dtype)
    stack = pack_stack(weight_NMK.clone())

    def op(x: torch.Tensor) -> torch.Tensor:
        return per_head(x.view(-1, heads, inner), stack).flatten(1)

    assert_rows_stand_alone(op, heads * inner, dtype)
    x_TNK = torch.randn(6, heads, inner).to(dtype)
    expected = torch.einsum("tnk,nmk->tnm", x_TNK.float(), weight_NMK.float()).to(dtype)
    torch.testing.assert_close(per_head(x_TNK, stack), expected, atol=1e-3, rtol=2e-2)


def test_neighbours_turn_together() -> None:
    """Scores, which know no order of channels, are those of pairs (2 c, 2 c + 1) rotated as complex numbers."""
    rope = tables(RopeSpec(interleaved=True), 16, 50, torch.device("cpu"))
    q_TND, k_TKD, positions_T = torch.randn(9, 3, 16), torch.randn(9, 1, 16), torch.randint(50, (9,))

    def turned(x: torch.Tensor) -> torch.Tensor:
        waves_TE = torch.polar(torch.ones(9, 8), positions_T.unsqueeze(1) / 10000 ** (torch.arange(8) / 8))
        return torch.view_as_real(torch.view_as_complex(x.unflatten(2, (8, 2))) * waves_TE.unsqueeze(1)).flatten(2)

    got_q, got_k = rope.at(positions_T)(q_TND, k_TKD)
    expected = torch.einsum("tnd,skd->nts", turned(q_TND), turned(k_TKD))
    torch.testing.assert_close(torch.einsum("tnd,skd->nts", got_q, got_k), expected, atol=1e-4, rtol=0)
