"""Gemma 2 and 3, gpt-oss and Qwen's windows: published configurations, both spellings, what is refused."""

import re
from typing import Any

import pytest
import torch
from msgspec.structs import replace
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

from tests.parity.runner import Table, step_batch
from tests.specs import small
from tpserve.errors import UserError
from tpserve.models import model_spec
from tpserve.models.decoder import Decoder
from tpserve.parallel.group import Group
from tpserve.types.layout import ParallelLayout
from tpserve.types.model_spec import ClampedSwiglu, ModelSpec, RopeSpec, RoutingSpec

GEMMA_2_9B: dict[str, Any] = {
    "architectures": ["Gemma2ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "attn_logit_softcapping": 50.0,
    "bos_token_id": 2, "cache_implementation": "hybrid", "eos_token_id": 1, "final_logit_softcapping": 30.0, "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 3584, "initializer_range": 0.02,
    "intermediate_size": 14336, "max_position_embeddings": 8192, "model_type": "gemma2", "num_attention_heads": 16,
    "num_hidden_layers": 42, "num_key_value_heads": 8, "pad_token_id": 0, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0, "sliding_window": 4096, "sliding_window_size": 4096, "torch_dtype": "float32", "use_cache": True,
    "vocab_size": 256000,
}  # fmt: skip
GEMMA_3_1B: dict[str, Any] = {
    "architectures": ["Gemma3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "attn_logit_softcapping": None,
    "bos_token_id": 2, "cache_implementation": "hybrid", "eos_token_id": [1, 106], "final_logit_softcapping": None,
    "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 1152, "initializer_range": 0.02,
    "intermediate_size": 6912, "max_position_embeddings": 32768, "model_type": "gemma3_text", "num_attention_heads": 4,
    "num_hidden_layers": 26, "num_key_value_heads": 1, "pad_token_id": 0, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": 512,
    "sliding_window_pattern": 6, "torch_dtype": "bfloat16", "use_cache": True, "vocab_size": 262144,
}  # fmt: skip
GEMMA_3_4B: dict[str, Any] = {
    "architectures": ["Gemma3ForConditionalGeneration"], "boi_token_index": 255999, "eoi_token_index": 256000,
    "eos_token_id": [1, 106], "image_token_index": 262144, "initializer_range": 0.02, "mm_tokens_per_image": 256,
    "model_type": "gemma3", "torch_dtype": "bfloat16",
    "text_config": {
        "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
    },
    "vision_config": {
        "hidden_size": 1152, "image_size": 896, "intermediate_size": 4304, "model_type": "siglip_vision_model",
        "num_attention_heads": 16, "num_hidden_layers": 27, "patch_size": 14, "vision_use_head": False,
    },
}  # fmt: skip
GPT_OSS_20B: dict[str, Any] = {
    "architectures": ["GptOssForCausalLM"], "attention_bias": True, "attention_dropout": 0.0, "eos_token_id": 200002,
    "experts_per_token": 4, "head_dim": 64, "hidden_act": "silu", "hidden_size": 2880, "initial_context_length": 4096,
    "initializer_range": 0.02, "intermediate_size": 2880, "layer_types": ["sliding_attention", "full_attention"] * 12,
    "max_position_embeddings": 131072, "model_type": "gpt_oss", "num_attention_heads": 64, "num_experts_per_tok": 4,
    "num_hidden_layers": 24, "num_key_value_heads": 8, "num_local_experts": 32, "output_router_logits": False,
    "pad_token_id": 199999, "quantization_config": {"modules_to_not_convert": ["lm_head"], "quant_method": "mxfp4"},
    "rms_norm_eps": 1e-05, "rope_theta": 150000, "router_aux_loss_coef": 0.9, "sliding_window": 128, "swiglu_limit": 7.0,
    "rope_scaling": {
        "beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 4096, "rope_type": "yarn",
        "truncate": False,
    },
    "tie_word_embeddings": False, "use_cache": True, "vocab_size": 201088,
}  # fmt: skip
QWEN: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 4,
    "head_dim": 8, "vocab_size": 517, "rms_norm_eps": 1e-5, "max_position_embeddings": 512, "num_experts_per_tok": 2,
    "moe_intermediate_size": 48, "shared_expert_intermediate_size": 48,
}  # fmt: skip


def windows_of(spec: ModelSpec) -> list[int | None]:
    """Layer by layer."""
    windows = {layer: group.window for group in spec.cache for layer in group.layers}
    return [windows[layer] for layer in range(spec.num_layers)]


def test_gemma2() -> None:
    spec = model_spec(GEMMA_2_9B, "config.json")
    assert (spec.family, spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.rope) == ("gemma2", 16, 8, 256, RopeSpec())
    assert (spec.norm_place, spec.norm_offset, spec.activation, spec.tie_embeddings) == ("around", 1.0, "gelu_tanh", True)
    assert (spec.scores_cap, spec.logits_cap, spec.attention_scale, spec.window_rope) == (50.0, 30.0, 1 / 16, None)
    assert spec.embedding_scale == 3584**0.5 and spec.embedding_scale_rounded
    assert windows_of(spec) == [4096, None] * 21
    plain = dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping"))
    assert model_spec({**GEMMA_2_9B, **plain}, "").scores_cap is None
    fewer = {name: value for name, value in GEMMA_2_9B.items() if name not in plain}
    assert model_spec(fewer, "") == spec, "what transformers takes for fields that are not there"


def test_gemma3() -> None:
    text = model_spec(GEMMA_3_1B, "config.json")
    assert (text.family, text.qk_norm, text.vocab_size, text.eos_ids, text.dtype) == (
        "gemma3",
        "head",
        262144,
        (1, 106),
        "bfloat16",
    )
    assert (text.rope, text.window_rope) == (RopeSpec(1e6), RopeSpec(1e4))
    assert windows_of(text) == ([512] * 5 + [None]) * 4 + [512] * 2
    ropes = {"full_attention": {"rope_type": "default", "rope_theta": 1e6}, "sliding_attention": {"rope_type": "default"}}
    kinds = ["sliding_attention" if (layer + 1) % 6 else "full_attention" for layer in range(26)]
    newer = {name: value for name, value in GEMMA_3_1B.items() if not name.startswith(("rope", "sliding_window_pattern"))}
    assert model_spec({**newer, "rope_parameters": ropes, "layer_types": kinds}, "") == text


def test_gemma3_that_sees() -> None:
    """Most of what its text is like, its config leaves to whoever knows."""
    spec = model_spec(GEMMA_3_4B, "config.json")
    assert (spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.vocab_size) == (8, 4, 256, 262208)
    assert (spec.max_position, spec.eos_ids, spec.bos_id, spec.dtype) == (131072, (1, 106), 2, "bfloat16")
    assert (spec.rope, spec.window_rope) == (RopeSpec(1e6, "linear", 8.0), RopeSpec(1e4))
    assert windows_of(spec) == ([1024] * 5 + [None]) * 5 + [1024] * 4 and spec.tie_embeddings
    assert replace(spec, cache=()) == replace(model_spec({**GEMMA_3_4B, "tie_word_embeddings": True}, ""), cache=())


def test_a_window_that_no_sequence_leaves_keeps_its_rope() -> None:
    spec = model_spec({**GEMMA_3_1B, "sliding_window": 32768}, "")
    assert windows_of(spec).count(32768) == 22


def test_gpt_oss() -> None:
    spec = model_spec(GPT_OSS_20B, "config.json")
    assert (spec.family, spec.sinks, spec.qkv_bias, spec.out_bias, spec.tie_embeddings) == ("gpt_oss", True, True, True, False)
    assert (spec.head_dim, spec.num_heads, spec.max_position, spec.dtype) == (64, 64, 131072, "bfloat16")
    assert windows_of(spec) == [128, None] * 12
    assert spec.rope is not None and (spec.rope.scaling, spec.rope.truncate, spec.rope.theta) == ("yarn", False, 150000.0)
    experts = spec.experts
    assert experts is not None and (experts.count, experts.size, experts.bias) == (32, 2880, True)
    assert experts.clamped == ClampedSwiglu(alpha=1.702, limit=7.0) and len(experts.layers) == 24
    assert experts.routing == RoutingSpec(4, bias="logits", renormalise=True)


@pytest.mark.parametrize(
    ("architecture", "windows"),
    [
        ("Qwen2ForCausalLM", [None, None, None, None, 32, 32]),
        ("Qwen3ForCausalLM", [None, None, None, None, 32, 32]),
        ("Qwen2MoeForCausalLM", [32, None, 32, None, None, None]),
        ("Qwen3MoeForCausalLM", [32] * 6),
    ],
)
def test_qwens_windows_are_those_of_transformers(architecture: str, windows: list[int | None]) -> None:
    config = {**QWEN, "architectures": [architecture], "sliding_window": 32, "max_window_layers": 4}
    if "Moe" in architecture:
        config["num_experts"] = 4
    assert windows_of(model_spec({**config, "use_sliding_window": True}, "")) == windows
    assert windows_of(model_spec({**config, "use_sliding_window": False}, "")) == [None] * 6


SLIDING = ["sliding_attention"]
LINEAR = {"rope_type": "linear", "factor": 2.0}


@pytest.mark.parametrize(
    ("config", "changed", "message"),
    [
        (GEMMA_2_9B, {"hidden_activation": "gelu"}, "'hidden_activation' is 'gelu'"),
        (GEMMA_2_9B, {"use_bidirectional_attention": True}, "'use_bidirectional_attention' is True"),
        (GEMMA_2_9B, {"sliding_window": None}, "'sliding_window' is missing"),
        (GEMMA_2_9B, {"layer_types": SLIDING * 41}, "'layer_types' must name 42 layers"),
        (GEMMA_2_9B, {"layer_types": ["chunked_attention"] * 42}, "'layer_types' must name 42 layers 'sliding_attention' or"),
        (GEMMA_3_1B, {"attn_logit_softcapping": 50.0}, "'attn_logit_softcapping' is 50.0"),
        (GEMMA_3_1B, {"final_logit_softcapping": 30.0}, "'final_logit_softcapping' is 30.0"),
        (
            GEMMA_3_1B,
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0}},
            "rope_parameters: field 'factor' is not supported",
        ),
        (GEMMA_3_1B, {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling: it must name its 'rope_type'"),
        (
            GEMMA_3_1B,
            {"rope_scaling": LINEAR, "rope_parameters": {"full_attention": LINEAR}},
            "there must be no 'rope_parameters' beside it",
        ),
        (GEMMA_3_4B, {"quantization_config": {"quant_method": "awq"}}, "text_config: field 'quantization_config' is 'awq'"),
        (
            GEMMA_3_4B,
            {"text_config": {**GEMMA_3_4B["text_config"], "query_pre_attn_scalar": 0}},
            "'query_pre_attn_scalar' must be",
        ),
        (GEMMA_3_4B, {"text_config": [1]}, "'text_config' must be an object, not [1]"),
        (GPT_OSS_20B, {"rope_scaling": None}, "'rope_scaling' is missing"),
        (GPT_OSS_20B, {"rope_scaling": {}}, "'rope_scaling' is missing"),
        (GPT_OSS_20B, {"quantization_config": {"quant_method": "fp8"}}, "'quantization_config' is 'fp8'"),
        (GPT_OSS_20B, {"num_experts_per_tok": 33}, "'num_experts_per_tok' is 33, but there are 32 experts"),
        (
            {**QWEN, "architectures": ["Qwen2ForCausalLM"]},
            {"layer_types": SLIDING * 6},
            "which 'use_sliding_window' switches off",
        ),
    ],
)
def test_what_cannot_be_honoured_is_refused(config: dict[str, Any], changed: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        model_spec({**config, **changed}, "config.json")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_scale_of_the_embedding_is_rounded_as_transformers_does(dtype: torch.dtype) -> None:
    """Layers that add nothing let the embedding through: 48 ** 0.5 is 6.9282, in bfloat16 6.9375."""
    shape: dict[str, Any] = {"num_layers": 1, "hidden_size": 48, "num_heads": 4, "head_dim": 12, "norm_place": "around"}
    spec = small(family="gemma3", qk_norm="head", embedding_scale=48**0.5, embedding_scale_rounded=True, **shape)
    decoder = Decoder(spec, ParallelLayout(1, 1, (1,)), 0, Group(), dtype, torch.device("cpu"), 40)
    for parameter in decoder.parameters():
        parameter.tensor.zero_()
    embedding = decoder.parameters()[0].tensor.normal_(generator=torch.Generator().manual_seed(1))
    theirs = Gemma3TextScaledWordEmbedding(517, 48, 0, embed_scale=48**0.5).to(dtype)
    theirs.weight.data.copy_(embedding)
    tokens = list(range(100, 140))
    batch = step_batch([tokens], [(0, 0, 40)], [Table(torch.tensor([[2, 0, 1]]).int(), None, 0)], torch.device("cpu"))
    cache = decoder.kv_layout.empty(3, 16, dtype, torch.device("cpu"))
    assert torch.equal(decoder.forward(batch, None, [cache]), theirs(torch.tensor(tokens)))
