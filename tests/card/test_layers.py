"""What a step launches on the simulated card: the plan of attention once, and at most ten kernels a dense layer."""

from typing import Any

import pytest
import torch

from tests.card.engine import CARD
from tests.card.simulated import SimulatedCard
from tests.specs import LATENTS, small
from tpserve.attention.metadata import AttentionMetadata, ModelInput
from tpserve.models.decoder import Decoder
from tpserve.parallel.group import Group
from tpserve.types.layout import ParallelLayout
from tpserve.types.model_spec import CacheGroup, LatentSpec, RopeSpec
from tpserve.weights.dummy import dummy

SHAPE: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2,
    "head_dim": 16, "max_position": 4096,
}  # fmt: skip
BIASES = {"qkv_bias": True, "out_bias": True, "mlp_bias": True}
ATTEND = ["attention_kernel", "merge_kernel"]
DENSE = ["_norm_kernel", "mm", "_place_heads_kernel", *ATTEND, "mm", "_norm_kernel", "mm", "_gated_kernel", "mm"]
LATENT = ["_norm_kernel", "mm", "_norm_kernel", "mm", "bmm", "_place_latents_kernel", *ATTEND, "bmm", "mm", *DENSE[-4:]]
"""Ten of attention, of which two compress the query."""
WIDTH = 40
"""Blocks of 16 positions in a row of the tables: a context may be split."""


def launches(query_lens: tuple[int, ...], **fields: Any) -> list[str]:
    """The launches of a step of a model with two layers, from the embedding to the residual stream."""
    with SimulatedCard() as card:
        spec = small(**SHAPE | fields)
        decoder = Decoder(spec, ParallelLayout(1, 1, (2,)), 0, Group(), torch.float32, CARD, 640)
        dummy(decoder.parameters())
        rows, starts = sum(query_lens), [sum(query_lens[:r]) for r in range(len(query_lens) + 1)]
        integers = torch.tensor([*starts, *query_lens, *range(len(query_lens))], dtype=torch.int32).pin_memory().to(CARD)
        query_starts, context_lens, table_rows = integers.split((len(starts), len(query_lens), len(query_lens)))
        slots, tables = torch.arange(rows, device=CARD), torch.zeros(8, WIDTH, dtype=torch.int32, device=CARD)
        groups = tuple(
            AttentionMetadata(query_starts, context_lens, tables, slots, query_lens, query_lens, group.window, table_rows)
            for group in spec.cache
        )
        caches = [decoder.kv_layout.empty(8, 16, torch.float32, CARD) for _ in range(2)]
        with card.recording() as record:
            decoder.forward(ModelInput(slots, slots, groups), None, caches)
        assert not record.waits and not record.to_device and not record.to_host
        return record.launches


FAMILIES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "llama": ({}, DENSE),
    "qwen3": ({"family": "qwen3", "qk_norm": "head"}, DENSE),
    "biases": (BIASES, [{"mm": "addmm"}.get(name, name) if i > 1 else name for i, name in enumerate(DENSE)]),
    "gpt2": (
        {**BIASES, "family": "gpt2", "norm": "layer", "rope": None, "gated": False, "activation": "relu"},
        ["_norm_kernel", "mm", "_place_heads_kernel", *ATTEND, "addmm", "_norm_kernel", "addmm", "relu", "addmm"],
    ),
    "deepseek": (
        {
            **LATENTS, "family": "deepseek_v3", "num_kv_heads": 4, "head_dim": 28, "rope": RopeSpec(interleaved=True),
            "experts": None,
            "latent": LatentSpec(kv_rank=32, rope_dim=16, nope_dim=12, v_dim=20, q_rank=28),
        },
        LATENT,
    ),
}  # fmt: skip


@pytest.mark.parametrize(("fields", "layer"), FAMILIES.values(), ids=FAMILIES.keys())
def test_launches_of_a_layer(fields: dict[str, Any], layer: list[str]) -> None:
    found = launches((1, 1), **fields)
    plan = found.index("plan_kernel")
    assert found[plan + 1 :] == [*layer, *layer, "add"] and found.count("plan_kernel") == 1
    assert len(layer) <= (10 if layer is not LATENT else 14)


def test_prefill_launches_what_decode_does_and_a_group_has_one_plan() -> None:
    cache = (CacheGroup((0,), window=20), CacheGroup((1,)))
    found = launches((1, 5, 1), cache=cache)
    assert found == launches((1, 1, 1), cache=cache) and found.count("plan_kernel") == 2
