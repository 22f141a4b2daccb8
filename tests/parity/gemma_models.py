"""Gemma 2 and 3, small: what only they have, windows that no block size divides, norms' weights around 0."""

from pathlib import Path
from typing import Any

from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    PreTrainedModel,
)

from tests.parity.random_models import randomised, rewrite

SIZES = {"vocab_size": 517, "num_hidden_layers": 3, "max_position_embeddings": 400, "head_dim": 16, "intermediate_size": 100}
EYES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "image_size": 28}
FULL, SLIDING = "full_attention", "sliding_attention"


def make_gemma2(directory: Path) -> PreTrainedModel:
    """Caps low enough to be felt; windows where nobody says in which layers."""
    caps = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 20}
    heads = {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 3}
    model = randomised(Gemma2ForCausalLM(Gemma2Config(**SIZES, **heads, **caps, sliding_window=21)), norms_around=0.0)
    model.save_pretrained(directory)
    rewrite(directory, without=["layer_types"])
    return model


def gemma3(**own: Any) -> dict[str, Any]:
    """Five heads, which no layout of ranks divides, that share a key and a value."""
    ropes = {
        FULL: {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0},
        SLIDING: {"rope_type": "default", "rope_theta": 70.0},
    }
    heads = {"hidden_size": 60, "num_attention_heads": 5, "num_key_value_heads": 1, "query_pre_attn_scalar": 30}
    return {**SIZES, **heads, "rope_parameters": ropes, "sliding_window": 33, **own}


def make_gemma3(directory: Path) -> PreTrainedModel:
    """Only the last layer sees all: two groups of layers with windows, biases."""
    model = Gemma3ForCausalLM(Gemma3TextConfig(**gemma3(layer_types=[SLIDING, SLIDING, FULL], attention_bias=True)))
    randomised(model, norms_around=0.0).save_pretrained(directory)
    return model


def make_gemma3_seeing(directory: Path) -> PreTrainedModel:
    """As published: weights of text under a name of their own beside those of images, a config in the older spelling."""
    text = gemma3(layer_types=[SLIDING, FULL, SLIDING])
    tokens = {"boi_token_index": 514, "eoi_token_index": 515, "image_token_index": 516, "mm_tokens_per_image": 4}
    config = Gemma3Config(text_config=text, vision_config={**EYES, "model_type": "siglip_vision_model"}, **tokens)
    model = randomised(Gemma3ForConditionalGeneration(config), norms_around=0.0)
    model.save_pretrained(directory)
    older = {"sliding_window_pattern": 2, "rope_scaling": {"rope_type": "linear", "factor": 2.0}, "rope_theta": 5000.0}
    rewrite(directory, "text_config", ["layer_types", "rope_parameters"], **older, rope_local_base_freq=70.0)
    return model


GEMMAS = {"gemma2": make_gemma2, "gemma3": make_gemma3, "gemma3-seeing": make_gemma3_seeing}
