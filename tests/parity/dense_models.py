"""Small models of the families that are not Llama's shape to the letter: what is their own is there, and not neutral."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
)

from tests.parity.random_models import randomised
from tests.parity.stored_models import make_llama_fp8

SIZES = {"vocab_size": 517, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 6, "max_position_embeddings": 400}
ENDS: dict[str, Any] = {"pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2}


def save(model: PreTrainedModel, directory: Path, **how: Any) -> PreTrainedModel:
    randomised(model).save_pretrained(directory, **how)
    return model


def make_gpt2(directory: Path) -> PreTrainedModel:
    """Tied; five heads, so that no layout of ranks divides them."""
    config = GPT2Config(vocab_size=517, n_embd=40, n_layer=3, n_head=5, n_positions=400, n_inner=100, **ENDS)
    return save(GPT2LMHeadModel(config), directory)


def make_gpt2_bare(directory: Path) -> PreTrainedModel:
    """As published: names without the prefix, the masks of old, torch's own format."""
    config = GPT2Config(vocab_size=517, n_embd=48, n_layer=3, n_head=6, n_positions=400, activation_function="gelu", **ENDS)
    model = randomised(GPT2LMHeadModel(config))
    model.config.architectures = ["GPT2LMHeadModel"]
    model.config.save_pretrained(directory)
    bare = {name: tensor.clone() for name, tensor in model.transformer.state_dict().items()}
    masks = {f"h.{layer}.attn.bias": torch.ones(1, 1, 400, 400).tril() for layer in range(3)}
    torch.save(bare | masks, directory / "pytorch_model.bin")
    return model


def opt(**own: Any) -> OPTForCausalLM:
    sizes = {**SIZES, "ffn_dim": 100, **ENDS}
    return OPTForCausalLM(OPTConfig(**sizes, **own))


def make_opt(directory: Path) -> PreTrainedModel:
    return save(opt(), directory)


def make_opt_narrow(directory: Path) -> PreTrainedModel:
    """OPT-350m: norms after, none at the end, an embedding of its own width; untied."""
    own = {"do_layer_norm_before": False, "word_embed_proj_dim": 32, "tie_word_embeddings": False}
    return save(opt(**own), directory)


def make_galactica(directory: Path) -> PreTrainedModel:
    """OPT without biases, norms without weights, GELU."""
    return save(opt(enable_bias=False, layer_norm_elementwise_affine=False, activation_function="gelu"), directory)


def make_mistral(directory: Path) -> PreTrainedModel:
    """YaRN; a window that no block size divides; heads wider than hidden / heads."""
    rope = {"rope_type": "yarn", "rope_theta": 5000.0, "factor": 4.0, "original_max_position_embeddings": 64}
    own = {"num_key_value_heads": 2, "head_dim": 16, "sliding_window": 25, "rope_parameters": rope}
    return save(MistralForCausalLM(MistralConfig(**SIZES, **ENDS, **own, intermediate_size=100)), directory)


def make_granite(directory: Path) -> PreTrainedModel:
    """All multipliers, all biases, linear rope."""
    scales = {"embedding_multiplier": 3.0, "attention_multiplier": 0.2, "residual_multiplier": 0.4, "logits_scaling": 0.5}
    rope = {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0}
    own = {"num_key_value_heads": 3, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}
    config = GraniteConfig(**SIZES, **ENDS, **own, **scales, rope_parameters=rope, intermediate_size=100)
    return save(GraniteForCausalLM(config), directory)


def make_olmo2(directory: Path) -> PreTrainedModel:
    """Fewer key/value heads than ranks at TP 3, whose squares count once; dynamic rope."""
    rope = {"rope_type": "dynamic", "rope_theta": 5000.0, "factor": 2.0}
    own = {"num_key_value_heads": 2, "rope_parameters": rope, "intermediate_size": 100}
    return save(Olmo2ForCausalLM(Olmo2Config(**SIZES, **ENDS, **own)), directory)


def make_phi3(directory: Path) -> PreTrainedModel:
    """Phi-4-mini: a part of each head turns; longrope beyond its original length."""
    return save(phi3({"original_max_position_embeddings": 2}, attention_factor=1.1), directory)


def make_phi3_short(directory: Path) -> PreTrainedModel:
    """Longrope below its original length; windows."""
    own = {"original_max_position_embeddings": 400, "max_position_embeddings": 1600, "sliding_window": 27}
    return save(phi3(own), directory)


def phi3(own: dict[str, int], **more_rope: float) -> Phi3ForCausalLM:
    generator = torch.Generator().manual_seed(3)
    short, long = (torch.rand(2, 6, generator=generator) * 2 + 1).tolist()
    rope = {"rope_type": "longrope", "rope_theta": 5000.0, "short_factor": short, "long_factor": long, **more_rope}
    rope["partial_rotary_factor"] = 0.75
    more = {"num_key_value_heads": 3, "hidden_size": 96, "rope_parameters": rope, "intermediate_size": 100}
    return Phi3ForCausalLM(Phi3Config(**{**SIZES, **ENDS, **more, **own}))


DENSE = {
    "gpt2": make_gpt2,
    "gpt2-bare": make_gpt2_bare,
    "opt": make_opt,
    "opt-narrow": make_opt_narrow,
    "galactica": make_galactica,
    "mistral": make_mistral,
    "granite": make_granite,
    "olmo2": make_olmo2,
    "phi3": make_phi3,
    "phi3-short": make_phi3_short,
    "llama-fp8": make_llama_fp8,
}
