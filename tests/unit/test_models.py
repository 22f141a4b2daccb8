"""config.json as mathematics: both spellings, every family, and a sentence for what cannot be honoured."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from transformers import DeepseekV2Config, DeepseekV3Config, GptOssConfig, MistralConfig, MixtralConfig

from tpserve.config import model_config
from tpserve.errors import UserError
from tpserve.models import families, model_spec, transformer
from tpserve.types.model_spec import CacheGroup, ExpertsSpec, LatentSpec, ModelSpec, RopeSpec, RoutingSpec

BASE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 172,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 517,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 512,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
}
PHI3 = {"architectures": ["Phi3ForCausalLM"]}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def spec_of(**fields: Any) -> Any:
    return model_spec({**BASE, **fields}, "config.json")


def test_llama_2() -> None:
    spec = spec_of(num_key_value_heads=None)
    assert (spec.family, spec.num_kv_heads, spec.head_dim, spec.rope) == ("llama", 8, 8, RopeSpec(theta=10000.0))
    assert (spec.dtype, spec.bos_id, spec.eos_ids, spec.max_position) == ("bfloat16", 1, (2, 3), 512)
    assert not (spec.qkv_bias or spec.out_bias or spec.mlp_bias or spec.qk_norm or spec.tie_embeddings)
    assert spec.cache == (CacheGroup((0, 1)),)


def test_llama_biases_and_head_dim() -> None:
    spec = spec_of(attention_bias=True, mlp_bias=True, head_dim=12, tie_word_embeddings=True)
    assert spec.qkv_bias and spec.out_bias and spec.mlp_bias and spec.head_dim == 12 and spec.tie_embeddings


def test_qwen() -> None:
    qwen2 = spec_of(architectures=["Qwen2ForCausalLM"], use_sliding_window=False, sliding_window=4096, max_window_layers=1)
    assert qwen2.family == "qwen2" and qwen2.qkv_bias and not qwen2.out_bias and not qwen2.qk_norm
    qwen3 = spec_of(architectures=["Qwen3ForCausalLM"], head_dim=16, layer_types=["full_attention"] * 2)
    assert qwen3.family == "qwen3" and not qwen3.qkv_bias and qwen3.qk_norm and qwen3.head_dim == 16


GPT2: dict[str, Any] = {
    "architectures": ["GPT2LMHeadModel"], "activation_function": "gelu_new", "attn_pdrop": 0.1, "bos_token_id": 50256,
    "embd_pdrop": 0.1, "eos_token_id": 50256, "initializer_range": 0.02, "layer_norm_epsilon": 1e-05, "model_type": "gpt2",
    "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024, "resid_pdrop": 0.1, "vocab_size": 50257,
    "summary_type": "cls_index", "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
}  # fmt: skip
OPT_350M: dict[str, Any] = {
    "architectures": ["OPTForCausalLM"], "activation_function": "relu", "bos_token_id": 2, "do_layer_norm_before": False,
    "dropout": 0.1, "eos_token_id": 2, "ffn_dim": 4096, "hidden_size": 1024, "max_position_embeddings": 2048, "prefix": "</s>",
    "model_type": "opt", "num_attention_heads": 16, "num_hidden_layers": 24, "torch_dtype": "float16", "vocab_size": 50272,
    "word_embed_proj_dim": 512, "layerdrop": 0.0, "init_std": 0.02, "pad_token_id": 1, "use_cache": True,
}  # fmt: skip


def test_gpt2_and_opt() -> None:
    gpt2 = model_spec(GPT2, "config.json")
    assert (gpt2.hidden_size, gpt2.intermediate_size, gpt2.head_dim, gpt2.max_position) == (768, 3072, 64, 1024)
    assert (gpt2.norm, gpt2.rope, gpt2.gated, gpt2.activation, gpt2.tie_embeddings) == ("layer", None, False, "gelu_tanh", True)
    assert gpt2.qkv_bias and gpt2.out_bias and gpt2.mlp_bias and gpt2.norm_place == "before" and gpt2.final_norm
    opt = model_spec(OPT_350M, "config.json")
    assert (opt.embedding_size, opt.norm_place, opt.final_norm, opt.activation) == (512, "after", False, "relu")
    assert model_spec({**OPT_350M, "word_embed_proj_dim": 1024}, "").embedding_size is None
    for config, changed, message in (
        (GPT2, {"scale_attn_by_inverse_layer_idx": True}, "'scale_attn_by_inverse_layer_idx' is True"),
        (GPT2, {"activation_function": "tanh"}, "'activation_function' is 'tanh': supported are"),
        (GPT2, {"n_head": 5}, "768 is no multiple of 5"),
        (OPT_350M, {"enable_bias": "yes"}, "'enable_bias' must be true or false"),
    ):
        with pytest.raises(UserError, match=message):
            model_spec({**config, **changed}, "config.json")


def test_windows_multipliers_and_norms() -> None:
    for architecture in ("MistralForCausalLM", "Phi3ForCausalLM"):
        assert spec_of(architectures=[architecture], sliding_window=96).cache == (CacheGroup((0, 1), window=96),)
        for wide in (None, 512, 4096):
            assert spec_of(architectures=[architecture], sliding_window=wide).cache == (CacheGroup((0, 1)),), "no longer sequence"
    multipliers = {"attention_multiplier": 0.0078125, "embedding_multiplier": 12, "residual_multiplier": 0.22}
    granite = spec_of(architectures=["GraniteForCausalLM"], **multipliers, logits_scaling=16)
    assert (granite.attention_scale, granite.embedding_scale, granite.residual_scale) == (0.0078125, 12.0, 0.22)
    assert granite.logits_scale == 1 / 16
    olmo = spec_of(architectures=["Olmo2ForCausalLM"])
    assert (olmo.norm_place, olmo.qk_norm) == ("output", "all")


@pytest.mark.parametrize(
    ("windows", "groups"),
    [
        ([None] * 3, [(0, 1, 2)]),
        ([7] * 3, [(0, 1, 2)]),
        ([7, None] * 2, [(0, 2), (1, 3)]),
        ([7, 7, 7, None] * 2, [(0, 4), (1, 5), (2, 6), (3, 7)]),
        ([7] * 5 + [None, None], [(0, 3), (1, 4), (2,), (5, 6)]),
        ([7, 7, None, None, 7], [(0, 4), (1,), (2, 3)]),
        ([None, 5, 7, 7], [(0,), (1,), (2,), (3,)]),
    ],
)
def test_layers_are_dealt_to_groups_of_one_window(windows: list[int | None], groups: list[tuple[int, ...]]) -> None:
    found = transformer.cache_groups(windows)
    assert sorted(group.layers for group in found) == sorted(groups)
    assert all({windows[layer] for layer in group.layers} == {group.window} for group in found)


MOE = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "head_dim": 8}


def test_experts() -> None:
    mixtral = spec_of(architectures=["MixtralForCausalLM"], num_local_experts=8, num_experts_per_tok=2, sliding_window=None)
    assert mixtral.experts == ExpertsSpec(8, 172, RoutingSpec(2, renormalise=True), layers=(0, 1))
    qwen3 = spec_of(architectures=["Qwen3MoeForCausalLM"], **MOE, norm_topk_prob=True, mlp_only_layers=[0])
    assert qwen3.qk_norm and qwen3.experts == ExpertsSpec(6, 48, RoutingSpec(2, renormalise=True), layers=(1,))
    shared = {"shared_expert_intermediate_size": 100, "decoder_sparse_step": 2, "num_hidden_layers": 5}
    qwen2 = spec_of(architectures=["Qwen2MoeForCausalLM"], **MOE, **shared)
    assert qwen2.qkv_bias and qwen2.experts == ExpertsSpec(6, 48, RoutingSpec(2), (1, 3), shared_size=100, shared_gate=True)
    renamed = {"num_local_experts": MOE["num_experts"], **{name: value for name, value in MOE.items() if name != "num_experts"}}
    assert spec_of(architectures=["Qwen2MoeForCausalLM"], **renamed, **shared) == qwen2


YARN = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1}
DEEPSEEK: dict[str, Any] = {
    "aux_loss_alpha": 0.001, "bos_token_id": 0, "eos_token_id": 1, "ep_size": 1, "first_k_dense_replace": 1, "hidden_act": "silu",
    "kv_lora_rank": 512, "moe_layer_freq": 1, "pretraining_tp": 1, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06, "rope_theta": 10000, "seq_aux": True, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "v_head_dim": 128, "attention_bias": False, "max_position_embeddings": 163840,
}  # fmt: skip
V2_LITE: dict[str, Any] = {
    **DEEPSEEK, "architectures": ["DeepseekV2ForCausalLM"], "hidden_size": 2048, "intermediate_size": 10944,
    "model_type": "deepseek_v2", "moe_intermediate_size": 1408, "n_group": 1, "n_routed_experts": 64, "n_shared_experts": 2,
    "norm_topk_prob": False, "num_attention_heads": 16, "num_experts_per_tok": 6, "num_hidden_layers": 27,
    "num_key_value_heads": 16, "q_lora_rank": None, "rope_scaling": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
    "routed_scaling_factor": 1.0, "scoring_func": "softmax", "topk_group": 1, "topk_method": "greedy", "vocab_size": 102400,
}  # fmt: skip
V2: dict[str, Any] = {
    **V2_LITE, "hidden_size": 5120, "intermediate_size": 12288, "moe_intermediate_size": 1536, "n_group": 8, "topk_group": 3,
    "n_routed_experts": 160, "num_attention_heads": 128, "num_key_value_heads": 128, "num_hidden_layers": 60,
    "q_lora_rank": 1536, "routed_scaling_factor": 16.0, "topk_method": "group_limited_greedy",
}  # fmt: skip
V3: dict[str, Any] = {
    **DEEPSEEK, "architectures": ["DeepseekV3ForCausalLM"], "first_k_dense_replace": 3, "hidden_size": 7168,
    "intermediate_size": 18432, "model_type": "deepseek_v3", "moe_intermediate_size": 2048, "n_group": 8,
    "n_routed_experts": 256, "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 128,
    "num_experts_per_tok": 8, "num_hidden_layers": 61, "num_key_value_heads": 128, "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536, "rope_scaling": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}, "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid", "topk_group": 4, "topk_method": "noaux_tc", "vocab_size": 129280,
}  # fmt: skip


def test_deepseek() -> None:
    lite, v2, v3 = (model_spec(config, "config.json") for config in (V2_LITE, V2, V3))
    assert lite.latent == LatentSpec(512, 64, 128, 128) and v2.latent == v3.latent == LatentSpec(512, 64, 128, 128, q_rank=1536)
    assert lite.rope == RopeSpec(1e4, "yarn", 40.0, original_max_position=4096, interleaved=True) and lite.max_position == 163840
    assert (lite.num_kv_heads, lite.head_dim) == (16, 192)
    assert lite.attention_scale == pytest.approx(192**-0.5 * (0.0707 * math.log(40) + 1) ** 2)
    assert v3.attention_scale == pytest.approx(192**-0.5 * (0.1 * math.log(40) + 1) ** 2)
    assert lite.experts == ExpertsSpec(64, 1408, RoutingSpec(6), tuple(range(1, 27)), shared_size=2816)
    limited = RoutingSpec(6, num_groups=8, num_top_groups=3, scale=16.0)
    assert v2.experts == ExpertsSpec(160, 1536, limited, tuple(range(1, 60)), shared_size=3072)
    corrected = RoutingSpec(8, "sigmoid", "choice", 8, 4, group_best=2, renormalise=True, scale=2.5)
    assert v3.experts == ExpertsSpec(256, 2048, corrected, tuple(range(3, 61)), shared_size=2048)
    plain = model_spec({**V3, "rope_scaling": None, "rope_interleave": False, "n_shared_experts": None, "moe_layer_freq": 2}, "")
    assert plain.rope == RopeSpec(1e4) and plain.attention_scale == 192**-0.5
    assert plain.experts is not None and plain.experts.shared_size == 0 and plain.experts.layers == tuple(range(4, 61, 2))


def without(config: dict[str, Any], *names: str) -> ModelSpec:
    return model_spec({name: value for name, value in config.items() if name not in names}, "config.json")


def test_what_a_config_leaves_out_is_what_transformers_takes() -> None:
    """And null is not that."""
    long = {**BASE, "max_position_embeddings": 32768}
    assert without({**long, "architectures": ["MistralForCausalLM"]}).windows == (MistralConfig().sliding_window,)
    mixtral = without({**long, "architectures": ["MixtralForCausalLM"], "num_local_experts": 2, "num_experts_per_tok": 1})
    yarn = {"rope_scaling": {**YARN, "rope_type": "yarn"}, "head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1}
    gpt_oss = without({**long, **yarn, "architectures": ["GptOssForCausalLM"], "sliding_window": 7})
    for spec, theirs in ((mixtral, MixtralConfig()), (gpt_oss, GptOssConfig())):
        assert spec.rope is not None and spec.rope.theta == theirs.rope_parameters["rope_theta"]
    for config, theirs in ((V2, DeepseekV2Config()), (V3, DeepseekV3Config())):
        experts = without(config, "n_shared_experts", "norm_topk_prob", "rope_interleave").experts
        assert experts is not None and experts.shared_size == theirs.n_shared_experts * experts.size
        assert experts.routing.renormalise == theirs.norm_topk_prob
    null = model_spec({**V3, "norm_topk_prob": None, "rope_interleave": None}, "config.json")
    assert (
        null.experts is not None and not null.experts.routing.renormalise and null.rope is not None and not null.rope.interleaved
    )


@pytest.mark.parametrize(
    ("config", "changed", "message"),
    [
        (V2, {"norm_topk_prob": True}, "'norm_topk_prob' is True"),
        (V2, {"scoring_func": "sigmoid"}, "'scoring_func' is 'sigmoid'"),
        (V2, {"topk_method": "noaux_tc"}, "'topk_method' is 'noaux_tc': supported are"),
        (V2, {"n_group": None}, "'n_group' is missing"),
        (V2, {"n_group": 7}, "160 experts cannot be chosen from 3 of 7 groups"),
        (V2, {"topk_group": 9}, "160 experts cannot be chosen from 9 of 8 groups"),
        (V2, {"num_experts_per_tok": 61}, "'num_experts_per_tok' is 61, but there are 60 experts to choose from"),
        (V3, {"n_group": 256, "topk_group": 9}, "9 of 256 groups with at least 2 in each"),
        (V3, {"scoring_func": "softmax"}, "'scoring_func' is 'softmax'"),
        (V3, {"topk_method": "greedy"}, "'topk_method' is 'greedy'"),
        (V3, {"attention_bias": True}, "'attention_bias' is True"),
        (V3, {"num_key_value_heads": 64}, "'num_key_value_heads' is 64"),
        (V3, {"kv_lora_rank": None}, "'kv_lora_rank' is missing"),
        (V3, {"first_k_dense_replace": -1}, "'first_k_dense_replace' must be an integer from 0 on, not -1"),
        (V3, {"partial_rotary_factor": 0.5}, "'partial_rotary_factor' is 0.5, but"),
        (BASE, {"kv_lora_rank": 512}, "'kv_lora_rank' is 512"),
    ],
)
def test_what_deepseek_cannot_ask_for(config: dict[str, Any], changed: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        model_spec({**config, **changed}, "config.json")


PUBLISHED: dict[str, dict[str, Any]] = {
    "Llama-2-7b": {
        "architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 4096,
        "initializer_range": 0.02, "intermediate_size": 11008, "max_position_embeddings": 4096, "model_type": "llama",
        "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
        "rope_scaling": None, "tie_word_embeddings": False, "torch_dtype": "float16", "use_cache": True, "vocab_size": 32000,
    },
    "Llama-3.1-8B": {
        "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 128000,
        "eos_token_id": [128001, 128008, 128009], "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 14336,
        "max_position_embeddings": 131072, "mlp_bias": False, "model_type": "llama", "num_attention_heads": 32,
        "num_hidden_layers": 32, "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
        "rope_scaling": {**LLAMA3, "rope_type": "llama3"}, "rope_theta": 500000.0, "tie_word_embeddings": False,
        "torch_dtype": "bfloat16", "use_cache": True, "vocab_size": 128256,
    },
    "Qwen2.5-7B": {
        "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151645,
        "hidden_act": "silu", "hidden_size": 3584, "intermediate_size": 18944, "max_position_embeddings": 32768,
        "max_window_layers": 28, "model_type": "qwen2", "num_attention_heads": 28, "num_hidden_layers": 28,
        "num_key_value_heads": 4, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 131072,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True, "use_sliding_window": False,
        "vocab_size": 152064,
    },
    "Qwen3-8B": {
        "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 151643,
        "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 12288,
        "max_position_embeddings": 40960, "max_window_layers": 36, "model_type": "qwen3", "num_attention_heads": 32,
        "num_hidden_layers": 36, "num_key_value_heads": 8, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000,
        "sliding_window": None, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True,
        "use_sliding_window": False, "vocab_size": 151936,
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "heads", "rope", "end_ids", "biased", "normed"),
    [
        ("Llama-2-7b", (32, 32, 128), RopeSpec(10000.0), (2,), False, None),
        ("Llama-3.1-8B", (32, 8, 128), RopeSpec(5e5, "llama3", 8.0), (128001, 128008, 128009), False, None),
        ("Qwen2.5-7B", (28, 4, 128), RopeSpec(1e6), (151645,), True, None),
        ("Qwen3-8B", (32, 8, 128), RopeSpec(1e6), (151645,), False, "head"),
    ],
)
def test_published_configs(
    name: str, heads: tuple[int, int, int], rope: RopeSpec, end_ids: tuple[int, ...], biased: bool, normed: str | None
) -> None:
    config = PUBLISHED[name]
    spec = model_spec(config, name)
    assert (spec.num_heads, spec.num_kv_heads, spec.head_dim) == heads
    assert (spec.rope, spec.eos_ids, spec.qkv_bias, spec.qk_norm) == (rope, end_ids, biased, normed)
    assert (spec.vocab_size, spec.hidden_size, spec.intermediate_size, spec.num_layers, spec.max_position) == tuple(
        config[field]
        for field in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "max_position_embeddings")
    )
    assert (spec.norm_eps, spec.dtype, spec.bos_id) == (config["rms_norm_eps"], config["torch_dtype"], config["bos_token_id"])
    assert not (spec.tie_embeddings or spec.out_bias or spec.mlp_bias)


@pytest.mark.parametrize(
    ("fields", "rope"),
    [
        ({"rope_theta": 5e5}, RopeSpec(5e5)),
        ({"rope_theta": 5e5, "rope_scaling": None}, RopeSpec(5e5)),
        ({"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2}}, RopeSpec(5e5, "linear", 2.0)),
        ({"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}}, RopeSpec(5e5, "llama3", 8.0)),
        ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, RopeSpec(5e5)),
        ({**PHI3, "rope_theta": 5e5, "partial_rotary_factor": 0.5}, RopeSpec(5e5, num_channels=4)),
        ({**PHI3, "rope_parameters": {"rope_theta": 5e5, "partial_rotary_factor": 0.25}}, RopeSpec(5e5, num_channels=2)),
        ({"rope_parameters": {"rope_theta": 9.0}, "rope_scaling": {"type": "linear", "factor": 2}}, RopeSpec(1e4, "linear", 2.0)),
        ({"rope_parameters": {"rope_theta": 5e5}, "rope_scaling": {}}, RopeSpec(5e5)),
        ({"rope_theta": 5e5, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, RopeSpec(5e5)),
        ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", **LLAMA3}}, RopeSpec(5e5, "llama3", 8.0)),
    ],
)
def test_rope_spellings(fields: dict[str, Any], rope: RopeSpec) -> None:
    assert spec_of(**fields).rope == rope


@pytest.mark.parametrize(
    "name", ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "rms_norm_eps"]
)
def test_a_missing_field_is_named(name: str) -> None:
    with pytest.raises(UserError, match=rf"^config\.json: field '{name}' is missing$"):
        model_spec({key: value for key, value in BASE.items() if key != name}, "config.json")


FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic", "fmt": "e4m3"}


def test_block_fp8_is_no_other_mathematics() -> None:
    more = {"modules_to_not_convert": ["lm_head"], "scale_fmt": "ue8m0"}
    assert spec_of(quantization_config={**FP8, **more}) == spec_of(quantization_config=None) == spec_of()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_act": "gelu"}, "'hidden_act' is 'gelu'"),
        ({"use_sliding_window": True}, "'use_sliding_window' is True"),
        (
            {"quantization_config": {"quant_method": "awq"}},
            "'quantization_config' is 'awq', which tpserve does not support: it reads",
        ),
        ({"quantization_config": {"load_in_8bit": True}}, "'quantization_config' is {'load_in_8bit': True}"),
        ({"quantization_config": "gptq"}, "'quantization_config' is 'gptq'"),
        ({"quantization_config": {"quant_method": "fp8"}}, "is 'fp8' with weight_block_size None"),
        ({"quantization_config": {**FP8, "activation_scheme": "static"}}, "is 'fp8' with activation_scheme 'static'"),
        ({"quantization_config": {"quant_method": "mxfp4"}}, "is 'mxfp4', which tpserve does not support: it reads 'fp8' with"),
        ({"attention_multiplier": 0.1}, "'attention_multiplier'"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "'sliding_attention'"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}}, "rope type 'mrope' is not supported"),
        ({"rope_scaling": {"type": "linear", "factor": 4.0, "alpha": 2}}, "field 'alpha' of a rope of type 'linear'"),
        ({"rope_scaling": {"type": "yarn", "factor": 0}}, "'factor' must be a positive number"),
        ({"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 4}}, "'long_factor' is missing"),
        ({"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 3}}, "'short_factor' must hold 4 positive numbers"),
        (
            {
                "rope_scaling": {
                    "type": "longrope",
                    "short_factor": [1.0] * 4,
                    "long_factor": [1.0] * 4,
                    "original_max_position_embeddings": 1,
                }
            },
            "an original length of 1 cannot be stretched",
        ),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "'low_freq_factor' is missing"),
        ({**PHI3, "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.4}}, "3 rotary channels of 8"),
        ({**PHI3, "partial_rotary_factor": 1.5}, "12 rotary channels of 8"),
        ({"partial_rotary_factor": 0.5}, "'partial_rotary_factor' is 0.5, but in this family all channels of a head turn"),
        ({"architectures": ["Phi3ForCausalLM"], "mlp_bias": True}, "'mlp_bias' is True"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "'rope_parameters' must be a flat object"),
        ({"num_key_value_heads": 3}, "8 attention heads are no multiple of 3"),
        ({"hidden_size": 65}, "65 is no multiple of 8"),
        ({"head_dim": 7}, "7 rotary channels of 7"),
        ({"hidden_size": "64"}, "'hidden_size' must be a positive integer, not '64'"),
        ({"num_hidden_layers": True}, "'num_hidden_layers' must be a positive integer"),
        ({"torch_dtype": "float8_e4m3fn"}, "'float8_e4m3fn'"),
        ({"eos_token_id": ["</s>"]}, "'eos_token_id' must hold token ids"),
        ({"architectures": []}, "'architectures' is missing"),
        ({"num_experts": 8}, "'num_experts' is 8"),
        ({"architectures": ["MixtralForCausalLM"], "num_local_experts": 4}, "'num_experts_per_tok' is missing"),
        (
            {"architectures": ["MixtralForCausalLM"], "num_local_experts": 4, "num_experts_per_tok": 5},
            "'num_experts_per_tok' is 5, but there are 4 experts",
        ),
        ({"architectures": ["Qwen3MoeForCausalLM"], **MOE, "mlp_only_layers": "0"}, "'mlp_only_layers' must hold layer numbers"),
    ],
)
def test_what_cannot_be_honoured_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        spec_of(**fields)


def test_unsupported_architecture_lists_the_supported() -> None:
    with pytest.raises(UserError, match="'BertModel' is not supported: supported are") as error:
        spec_of(architectures=["BertModel"])
    assert all(name in str(error.value) for family in families() for name in family.architectures)


def test_reading_a_directory(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no model directory"):
        model_config.read(tmp_path / "nowhere")
    path = tmp_path / "config.json"
    with pytest.raises(UserError, match=r"config\.json does not exist"):
        model_config.read(tmp_path)
    for text, message in (("{", "not valid JSON"), ("[]", "must hold a JSON object")):
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            model_config.read(tmp_path)
    path.write_text(json.dumps({"eos_token_id": 2, "x": 1}))
    assert model_config.read(tmp_path) == {"eos_token_id": 2, "x": 1}
    assert model_config.read(tmp_path, (5, 2)) == {"eos_token_id": [2, 5], "x": 1}
