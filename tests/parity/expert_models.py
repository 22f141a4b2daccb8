"""Mixtures of experts, small and random: in all layers; in some, renormalised; in some, beside shared ones; over latents."""

from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from tests.parity.random_models import randomised, rewrite
from tests.parity.stored_models import as_torch_file, in_block_fp8
from tests.quantized import mxfp4

SIZES = {"vocab_size": 517, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 4,
         "max_position_embeddings": 400}  # fmt: skip
QWEN = {"num_experts": 7, "num_experts_per_tok": 3, "moe_intermediate_size": 44, "intermediate_size": 172}
LATENTS = {
    **SIZES, "num_attention_heads": 5, "num_key_value_heads": 5, "hidden_size": 80, "kv_lora_rank": 32, "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8, "v_head_dim": 20, "first_k_dense_replace": 1, "n_routed_experts": 12, "num_experts_per_tok": 3,
    "moe_intermediate_size": 44, "intermediate_size": 172, "n_shared_experts": 2,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "rope_theta": 5000.0, "factor": 8.0, "original_max_position_embeddings": 50, "beta_fast": 32.0,
    "beta_slow": 1.0, "mscale": 0.5, "mscale_all_dim": 0.8,
}  # fmt: skip
WINDOWS = {"use_sliding_window": True, "sliding_window": 35, "max_window_layers": 2}
"""In all layers of Qwen3-MoE; in every other one of Qwen2-MoE, as far as that."""
GPT_OSS = {
    "num_local_experts": 5, "num_experts_per_tok": 2, "head_dim": 16, "intermediate_size": 160, "sliding_window": 21,
    "swiglu_alpha": 1.3, "swiglu_limit": 0.7,
}  # fmt: skip
LIMITED = {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2}
CONFIGS: dict[str, tuple[type[PreTrainedModel], PreTrainedConfig]] = {
    "mixtral": (MixtralForCausalLM, MixtralConfig(**SIZES, num_local_experts=5, num_experts_per_tok=2, intermediate_size=172)),
    "qwen3-moe": (
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig(**SIZES, **QWEN, **WINDOWS, head_dim=16, norm_topk_prob=True, mlp_only_layers=[1]),
    ),
    "qwen2-moe": (
        Qwen2MoeForCausalLM,
        Qwen2MoeConfig(**SIZES, **QWEN, **WINDOWS, shared_expert_intermediate_size=100, decoder_sparse_step=2),
    ),
    "gpt-oss": (
        GptOssForCausalLM,
        GptOssConfig(**{**SIZES, "num_key_value_heads": 2}, **GPT_OSS, rope_parameters={**YARN, "truncate": False}),
    ),
    "deepseek-v2-lite": (
        DeepseekV2ForCausalLM,
        DeepseekV2Config(**LATENTS, q_lora_rank=None, rope_parameters=YARN, tie_word_embeddings=True),
    ),
    "deepseek-v2": (DeepseekV2ForCausalLM, DeepseekV2Config(**LATENTS, **LIMITED, q_lora_rank=28, routed_scaling_factor=1.5)),
    "deepseek-v3": (
        DeepseekV3ForCausalLM,
        DeepseekV3Config(**LATENTS, n_group=4, topk_group=2, q_lora_rank=28, rope_parameters=YARN),
    ),
}


def make(name: str, directory: Path) -> PreTrainedModel:
    """Experts stored one by one, but Mixtral's as transformers keeps them in memory, stacked; in 8 bits; in torch's file."""
    kind, config = CONFIGS[name]
    model = randomised(kind(config))
    if name == "qwen3-moe":
        return in_block_fp8(model, directory)
    model.save_pretrained(directory, save_original_format=name != "mixtral")
    if name == "qwen2-moe":
        as_torch_file(directory)
    return model


def make_deepseek_v3(directory: Path) -> PreTrainedModel:
    """As published, in block FP8. A bias for the choice that bfloat16 holds; a layer for guessing ahead, which is not read."""
    kind, config = CONFIGS["deepseek-v3"]
    model = randomised(kind(config))
    generator = torch.Generator().manual_seed(9)
    for name, bias in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            bias.copy_(torch.randint(-8, 8, bias.shape, generator=generator) / 32)
    oracle = in_block_fp8(model, directory)
    file = directory / "model.safetensors"
    save_file(load_file(file) | {"model.layers.3.eh_proj.weight": torch.full((80, 160), torch.nan)}, file)
    return oracle


def make_gpt_oss(directory: Path) -> PreTrainedModel:
    """As published: experts in MXFP4, of which the model has what they stand for."""
    kind, config = CONFIGS["gpt-oss"]
    model = randomised(kind(config))
    packed = {}
    for name, weight in model.named_parameters():
        if name.endswith(("gate_up_proj", "down_proj")):
            packed[f"{name}_blocks"], packed[f"{name}_scales"] = pair = mxfp4(weight.data)
            weight.data.copy_(convert_moe_packed_tensors(*pair, dtype=torch.float32))
    model.save_pretrained(directory)
    file = directory / "model.safetensors"
    plain = {name: tensor for name, tensor in load_file(file).items() if f"{name}_blocks" not in packed}
    save_file(plain | packed, file)
    rewrite(directory, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
    return model


EXPERTS = {name: partial(make, name) for name in CONFIGS} | {
    "deepseek-v3": make_deepseek_v3,
    "gpt-oss": make_gpt_oss,
}
