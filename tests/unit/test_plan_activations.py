"""The planner's bound on activations, against what a stage's layers keep alive when their kernels allocate nothing but results.

Runs the real decoder on the CPU with the GPU's kernels replaced by functions that return memory of the right shape, and counts
what the allocator hands out.
"""

from functools import partial
from typing import Any

import pytest
import torch
from msgspec.structs import replace
from torch.profiler import ProfilerActivity, profile

from tests.specs import ROUTING, small
from tests.unit.test_weights import Seat
from tpserve.attention.metadata import AttentionMetadata, ModelInput
from tpserve.layers import activation, attention, mla, mlp, moe, norm, row_parallel
from tpserve.models import decoder as decoders
from tpserve.models.decoder import Decoder
from tpserve.planner.activations import ROUTER_SEGMENT, STATE_BYTES, WORKSPACE_BYTES, activation_bytes
from tpserve.types.layout import ParallelLayout
from tpserve.types.model_spec import ExpertsSpec, LatentSpec, RopeSpec

ROWS = 256
LLAMA: dict[str, Any] = {
    "vocab_size": 1024, "hidden_size": 1024, "intermediate_size": 3584, "num_layers": 3, "num_heads": 8, "num_kv_heads": 2,
    "head_dim": 128, "dtype": "bfloat16",
}  # fmt: skip
EXPERTS = ExpertsSpec(count=8, size=1024, routing=ROUTING, layers=(0, 1, 2))
LATENT = LatentSpec(kv_rank=512, rope_dim=64, nope_dim=128, v_dim=128, q_rank=768)


class Alone(Seat):
    """Hears nothing from the others."""

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return x


def result(rows: torch.Tensor, width: int) -> torch.Tensor:
    return rows.new_empty((len(rows), width))


def attended(width: int, q_TND: torch.Tensor, *_: Any) -> torch.Tensor:
    return q_TND.new_empty((*q_TND.shape[:2], width))


def queries_placed(layer: attention.Attention, q_TND: torch.Tensor, k_TKD: torch.Tensor, *_: Any) -> torch.Tensor:
    if isinstance(layer.qk_norm, norm.AllHeadsNorm):
        q_TND, k_TKD = layer.qk_norm(q_TND, k_TKD)
    return q_TND.new_empty(q_TND.shape)


def by_head(x_TNK: torch.Tensor, weight_NMK: torch.Tensor) -> torch.Tensor:
    return x_TNK.new_empty((*x_TNK.shape[:2], weight_NMK.shape[1]))


@pytest.fixture(autouse=True)
def kernels_allocate_their_results(monkeypatch: pytest.MonkeyPatch) -> None:
    def product(x: torch.Tensor, weight: torch.Tensor, *_: Any) -> torch.Tensor:
        return result(x, weight.shape[-2])

    for room in (attention, mla, mlp, moe, row_parallel, decoders):
        monkeypatch.setattr(room, "matmul", product)
    for room, width in ((attention, 128), (mla, LATENT.kv_rank)):
        monkeypatch.setattr(room, "attend", partial(attended, width))
    monkeypatch.setattr(attention.Attention, "_place", queries_placed)
    cached = LATENT.kv_rank + LATENT.rope_dim
    monkeypatch.setattr(mla.LatentAttention, "_place", lambda self, q_TNP, *_: q_TNP.new_empty((*q_TNP.shape[:2], cached)))
    monkeypatch.setattr(activation, "is_native", lambda x: False)  # nothing of the CPU kernels
    monkeypatch.setattr(mla, "per_head", by_head)
    mixtures_allocate_their_results(monkeypatch)
    monkeypatch.setattr(norm, "rms_norm", lambda x, *_: torch.empty_like(x))
    monkeypatch.setattr(norm, "add_rms_norm", lambda x, *_: (torch.empty_like(x), torch.empty_like(x)))
    halve = lambda x, num_rows=None: result(x, x.shape[1] // 2)  # noqa: E731
    for name in activation.GATED_ACTIVATIONS:
        monkeypatch.setitem(activation.GATED_ACTIVATIONS, name, halve)
    monkeypatch.setattr(decoders, "build_metadata", lambda group, *_: group)


def mixtures_allocate_their_results(monkeypatch: pytest.MonkeyPatch) -> None:
    from tpserve_kernels import combination, permutation, router, routing

    def terms(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        segments = -(-x.shape[1] // router.SEGMENT)
        assert router.SEGMENT == ROUTER_SEGMENT
        return torch.empty(segments, len(x), len(weight))

    def route(terms: torch.Tensor, num_experts: int, num_active: int, **_: Any) -> tuple[torch.Tensor, ...]:
        rows = terms.shape[1]
        return torch.empty(rows, num_active), torch.empty(rows, num_active, dtype=torch.int32), torch.empty(rows)

    def permute(experts: torch.Tensor, local: range, load: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.empty_like(experts.flatten()), torch.empty_like(experts), torch.empty(len(local), dtype=torch.int32)

    def grouped(x: torch.Tensor, stack: torch.Tensor, ends: object, bias: object, tokens: Any = None) -> torch.Tensor:
        return x.new_empty(len(x if tokens is None else tokens), stack.shape[1])

    monkeypatch.setattr(router, "router_logits", terms)
    monkeypatch.setattr(routing, "route", route)
    monkeypatch.setattr(permutation, "permute", permute)
    monkeypatch.setattr(moe, "grouped_matmul", grouped)
    monkeypatch.setattr(combination, "combine", lambda out, rows, *_: out.new_empty(len(rows), out.shape[1]))
    monkeypatch.setattr(moe.MoE, "__call__", lambda layer, x, slots_T: layer.kernels_sum(x, slots_T))


def batch() -> ModelInput:
    some = torch.arange(ROWS)
    group = AttentionMetadata(some, some, some.view(1, -1), some, (ROWS,), (ROWS,))
    return ModelInput(some, some, (group,))


def peak(decoder: Decoder, hidden_size: int) -> int:
    """Bytes that a step adds at most to what is there before it, its input included."""
    with torch.inference_mode(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        hidden_TH = torch.zeros((ROWS, hidden_size), dtype=decoder.dtype)
        decoder.forward(batch(), hidden_TH, [None] * 3)  # type: ignore[list-item]
    taken = most = 0
    for event in watched.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            taken += event.nbytes()
            most = max(most, taken)
    return most


@pytest.mark.parametrize(
    ("fields", "least"),
    [
        ({}, 0.998),
        ({"num_heads": 32, "num_kv_heads": 8, "intermediate_size": 512}, 0.998),
        ({"family": "qwen3", "qk_norm": "head", "num_heads": 32, "intermediate_size": 512}, 0.998),
        ({"family": "olmo2", "qk_norm": "all", "norm_place": "output", "num_heads": 32, "intermediate_size": 512}, 0.94),
        ({"family": "gpt2", "norm": "layer", "rope": None, "gated": False, "mlp_bias": True, "activation": "gelu_tanh"}, 0.89),
        ({"family": "mixtral", "experts": EXPERTS}, 0.9),
        (
            {
                "family": "deepseek_v3",
                "latent": LATENT,
                "num_heads": 16,
                "num_kv_heads": 16,
                "head_dim": 192,
                "attention_scale": 0.1,
                "rope": RopeSpec(interleaved=True),
            },
            0.998,
        ),
        ({"family": "gemma2", "norm_place": "around", "activation": "gelu_tanh", "norm_offset": 1.0}, 0.998),
        ({"family": "qwen2_moe", "experts": replace(EXPERTS, shared_size=4096)}, 0.998),
    ],
    ids=["llama", "wide attention", "qwen3", "olmo2", "gpt2", "mixtral", "deepseek", "gemma", "qwen2_moe"],
)
@pytest.mark.parametrize("tp", [1, 2])
def test_the_bound_holds_and_is_close(fields: dict[str, Any], least: float, tp: int) -> None:
    spec = small(**LLAMA | {"rope": RopeSpec()} | fields)
    layout = ParallelLayout(tp, 1, (3,))
    decoder = Decoder(spec, layout, 0, Alone(0, tp), torch.bfloat16, torch.device("cpu"), ROWS)
    for parameter in decoder.parameters():
        parameter.tensor.zero_()
    measured, bound = peak(decoder, spec.hidden_size), activation_bytes(spec, layout, 0, ROWS, 2) - WORKSPACE_BYTES - STATE_BYTES
    assert least * bound <= measured <= bound
