"""A small decoder for tests that need some `ModelSpec`: they say what matters to them, the rest is here."""

from typing import Any

from tpserve.types.model_spec import CacheGroup, ExpertsSpec, LatentSpec, ModelSpec, RopeSpec, RoutingSpec

ROUTING = RoutingSpec(num_active=2, renormalise=True)
EXPERTS = ExpertsSpec(count=5, size=44, routing=ROUTING, layers=(0, 2, 3), shared_size=100, shared_gate=True)
"""For a model of four layers: experts in some, beside a shared one, in numbers that no two ranks share evenly."""
GROUPED = RoutingSpec(3, "sigmoid", "choice", num_groups=4, num_top_groups=2, group_best=2, renormalise=True, scale=2.5)
LATENTS: dict[str, Any] = {
    "family": "deepseek_v3", "num_heads": 12, "num_kv_heads": 12, "head_dim": 20, "attention_scale": 0.3,
    "rope": RopeSpec(interleaved=True), "latent": LatentSpec(kv_rank=32, rope_dim=8, nope_dim=12, v_dim=20, q_rank=28),
    "experts": ExpertsSpec(count=12, size=44, routing=GROUPED, layers=(1, 2, 3), shared_size=88),
}  # fmt: skip
"""Fields of a DeepSeek V3 of four layers."""


def small(**fields: Any) -> ModelSpec:
    """A Llama of four layers in float32, with `fields` of its own. Layers keep every position unless `cache` is given."""
    own = {
        "family": "llama", "vocab_size": 517, "hidden_size": 64, "intermediate_size": 172, "num_layers": 4, "num_heads": 8,
        "num_kv_heads": 2, "head_dim": 8, "norm_eps": 1e-5, "rope": RopeSpec(), "max_position": 2048, "tie_embeddings": False,
        "qkv_bias": False, "out_bias": False, "mlp_bias": False, "activation": "silu", "dtype": "float32",
        "bos_id": None, "eos_ids": (), **fields,
    }  # fmt: skip
    own.setdefault("cache", (CacheGroup(tuple(range(own["num_layers"]))),))
    return ModelSpec(**own)
