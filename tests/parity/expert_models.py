"""Mixtures of experts, small and random: in all layers; in some, renormalised; in some, beside a shared one."""

from functools import partial
from pathlib import Path

from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from tests.parity.random_models import randomised

SIZES = {"vocab_size": 517, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 4,
         "max_position_embeddings": 400}  # fmt: skip
QWEN = {"num_experts": 7, "num_experts_per_tok": 3, "moe_intermediate_size": 44, "intermediate_size": 172}
CONFIGS: dict[str, tuple[type[PreTrainedModel], PreTrainedConfig]] = {
    "mixtral": (MixtralForCausalLM, MixtralConfig(**SIZES, num_local_experts=5, num_experts_per_tok=2, intermediate_size=172)),
    "qwen3-moe": (Qwen3MoeForCausalLM, Qwen3MoeConfig(**SIZES, **QWEN, head_dim=16, norm_topk_prob=True, mlp_only_layers=[1])),
    "qwen2-moe": (
        Qwen2MoeForCausalLM,
        Qwen2MoeConfig(**SIZES, **QWEN, shared_expert_intermediate_size=100, decoder_sparse_step=2),
    ),
}


def make(name: str, directory: Path) -> PreTrainedModel:
    """Experts stored one by one, but Mixtral's as transformers keeps them in memory, stacked."""
    kind, config = CONFIGS[name]
    model = randomised(kind(config))
    model.save_pretrained(directory, save_original_format=name != "mixtral")
    return model


EXPERTS = {name: partial(make, name) for name in CONFIGS}
