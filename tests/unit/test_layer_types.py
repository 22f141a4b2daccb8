"""Which layers have a window, in every family: `layer_types`, `sliding_window` and their sisters as transformers reads them."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.unit.test_windowed_families import QWEN, windows_of
from tpserve.errors import UserError
from tpserve.models import families, model_spec

FULL, SLIDING = "full_attention", "sliding_attention"
BASE: dict[str, Any] = {
    **QWEN,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "num_hidden_layers": 4,
    "max_position_embeddings": 256,
    "num_key_value_heads": 8,
}
MORE: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": {"num_experts": 4},
    "qwen3_moe": {"num_experts": 4},
    "gpt_oss": {"num_local_experts": 4, "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0,
                "original_max_position_embeddings": 128}},
    "gemma3": {"model_type": "gemma3_text"},
    "gpt2": {"n_embd": 64, "n_head": 8, "n_layer": 4, "n_positions": 256},
    "opt": {"ffn_dim": 172},
    "deepseek_v2": {"n_routed_experts": 4, "kv_lora_rank": 16, "q_lora_rank": None, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
                    "v_head_dim": 8, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "topk_method": "greedy"},
    "deepseek_v3": {"n_routed_experts": 4, "kv_lora_rank": 16, "q_lora_rank": None, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
                    "v_head_dim": 8, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0},
}  # fmt: skip
ARCHITECTURES = {family.name: family.architectures[0] for family in families()}
MIXED = [FULL, SLIDING, SLIDING, FULL]
FIELDS: list[dict[str, Any]] = [
    {},
    {"sliding_window": 32},
    {"sliding_window": None},
    {"layer_types": None, "sliding_window": 32},
    {"layer_types": [FULL] * 4, "sliding_window": 32},
    {"layer_types": [FULL] * 4, "sliding_window": None},
    {"layer_types": [FULL] * 4},
    {"layer_types": [FULL] * 4, "sliding_window": 4096},
    {"layer_types": [SLIDING] * 4, "sliding_window": 32},
    {"layer_types": MIXED, "sliding_window": 32},
    {"layer_types": MIXED, "sliding_window": None},
]
SWITCHED = [{"use_sliding_window": switch, "sliding_window": 32} for switch in (False, True)] + [
    {"use_sliding_window": True},
    {"use_sliding_window": True, "sliding_window": None},
    {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 2},
    {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 2, "layer_types": MIXED},
    {"use_sliding_window": True, "sliding_window": 32, "layer_types": [FULL] * 4},
    {"use_sliding_window": True, "sliding_window": 32, "layer_types": [SLIDING] * 4},
    {"use_sliding_window": False, "sliding_window": 32, "layer_types": MIXED},
    {"use_sliding_window": False, "sliding_window": 32, "layer_types": [FULL] * 4},
]


def config_of(family: str, **fields: Any) -> dict[str, Any]:
    return {**BASE, "model_type": family, "architectures": [ARCHITECTURES[family]], **MORE.get(family, {}), **fields}


def theirs(directory: Path, config: dict[str, Any]) -> list[int | None]:
    """The windows of the layers that transformers builds; one that no sequence leaves is none."""
    (directory / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory))
    inner = model.model if hasattr(model, "model") else model.transformer
    layers = inner.decoder.layers if hasattr(inner, "decoder") else inner.layers if hasattr(inner, "layers") else inner.h
    attentions = [getattr(layer, "self_attn", None) for layer in layers]
    read = type(attentions[0]).__name__ in ("MistralAttention", "MixtralAttention", "Phi3Attention")
    common = model.config.sliding_window if read else None  # these read it when they run
    found = [getattr(attention, "sliding_window", common) for attention in attentions]
    return [None if not window or window >= 256 else window for window in found]


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_windows_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    """Or they are refused: a family that does not read `layer_types` must not be asked for other layers than it has."""
    served = 0
    for fields in FIELDS + (SWITCHED if family.startswith("qwen") else []):
        config = config_of(family, **fields)
        try:
            ours = windows_of(model_spec(config, ""))
        except UserError as error:
            assert "layer_types" in fields or fields.get("sliding_window", 1) is None, error
            assert re.search("'layer_types' names|'sliding_window'", str(error)), error
            continue
        served += 1
        kinds = fields.get("layer_types") or [None] * 4
        assert [None if window is None or window >= 256 else window for window in ours] == theirs(tmp_path, config), fields
        assert all(window is None for window, kind in zip(ours, kinds, strict=True) if kind == FULL)
    assert served >= 6


@pytest.mark.parametrize(
    ("family", "windows"),
    [("mistral", [None, 32, 32, None]), ("qwen2", [None, 32, 32, None]), ("gemma2", [None, 32, 32, None]), ("mixtral", None)],
)
def test_layer_types_beside_a_window(family: str, windows: list[int | None] | None) -> None:
    config = config_of(family, layer_types=MIXED, sliding_window=32, use_sliding_window=True if family == "qwen2" else None)
    if windows is None:
        with pytest.raises(
            UserError, match=r"'layer_types' names 'full_attention' for layer 0, but in this family 'sliding_window'"
        ):
            model_spec(config, "config.json")
    else:
        assert windows_of(model_spec(config, "")) == windows


@pytest.mark.parametrize("family", ARCHITECTURES)
@pytest.mark.parametrize(
    ("kinds", "message"),
    [
        ([FULL] * 3, "must name 4 layers 'sliding_attention' or 'full_attention', not 3"),
        ([], "must name 4 layers 'sliding_attention' or 'full_attention', not 0"),
        ([FULL] * 3 + ["chunked_attention"], "not 'chunked_attention'"),
        ([FULL] * 3 + [{"a": 1}], "not {'a': 1}"),
        (FULL, "not 'full_attention'"),
        (7, "not 7"),
    ],
)
def test_layer_types_that_are_none_are_named(family: str, kinds: Any, message: str) -> None:
    with pytest.raises(UserError, match=re.escape("config.json: field 'layer_types' must name 4 layers")) as info:
        model_spec(config_of(family, layer_types=kinds), "config.json")
    assert message in str(info.value)
