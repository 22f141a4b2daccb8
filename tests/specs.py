"""A small decoder for tests that need some `ModelSpec`: they say what matters to them, the rest is here."""

from typing import Any

from tpserve.types.model_spec import CacheGroup, ExpertsSpec, ModelSpec, RopeSpec

EXPERTS = ExpertsSpec(count=5, num_active=2, size=44, renormalise=True, layers=(0, 2, 3), shared_size=100)
"""For a model of four layers: experts in some, beside a shared one, in numbers that no two ranks share evenly."""


def small(**fields: Any) -> ModelSpec:
    """A Llama of four layers in float32, with `fields` of its own. All layers keep every position."""
    own = {
        "family": "llama", "vocab_size": 517, "hidden_size": 64, "intermediate_size": 172, "num_layers": 4, "num_heads": 8,
        "num_kv_heads": 2, "head_dim": 8, "norm_eps": 1e-5, "rope": RopeSpec(), "max_position": 2048, "tie_embeddings": False,
        "qkv_bias": False, "out_bias": False, "mlp_bias": False, "activation": "silu", "dtype": "float32",
        "bos_id": None, "eos_ids": (), **fields,
    }  # fmt: skip
    return ModelSpec(**own, cache=(CacheGroup("full", tuple(range(own["num_layers"]))),))
