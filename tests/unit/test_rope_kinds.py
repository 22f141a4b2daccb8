"""Every kind of rope turns as in transformers, read from the same config."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, Phi3Config, PreTrainedConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

from tpserve.layers.rope import tables
from tpserve.models.config_fields import ConfigFields
from tpserve.models.rope_config import longest, rope_of

LENGTH, HEAD_DIM = 300, 16
SHORT, LONG = [1.0 + i / 7 for i in range(8)], [2.0 + i for i in range(8)]
LONGROPE = {"rope_type": "longrope", "short_factor": SHORT, "long_factor": LONG}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("model", "table", "length"),
    [
        ("llama", {"rope_type": "default"}, LENGTH),
        ("phi3", {"rope_type": "default", "partial_rotary_factor": 0.75}, LENGTH),
        ("llama", {"rope_type": "linear", "factor": 2.5}, LENGTH),
        ("llama", {"rope_type": "dynamic", "factor": 2.5}, LENGTH),
        ("llama", {**LLAMA3, "original_max_position_embeddings": 64}, LENGTH),
        ("llama", YARN, LENGTH),
        ("llama", {**YARN, "partial_rotary_factor": 0.5}, LENGTH),
        ("llama", {**YARN, "factor": 1.0, "attn_factor": 0.5}, LENGTH),
        ("llama", {**YARN, "truncate": None}, LENGTH),
        ("llama", {**YARN, "beta_fast": 8.0, "beta_slow": 2.0, "truncate": False}, LENGTH),
        ("llama", {**YARN, "attention_factor": 0.8}, LENGTH),
        ("llama", {**YARN, "mscale": 0.707, "mscale_all_dim": 1.2}, LENGTH),
        ("phi3", LONGROPE, LENGTH),
        ("phi3", LONGROPE, 150),
        ("phi3", {**LONGROPE, "attention_factor": 1.3}, LENGTH),
        ("phi3", {**LONGROPE, "factor": 3.0}, LENGTH),
        ("phi3", {**LONGROPE, "short_factor": SHORT[:6], "long_factor": LONG[:6], "partial_rotary_factor": 0.75}, LENGTH),
    ],
    ids=str,
)
def test_tables(model: str, table: dict[str, Any], length: int) -> None:
    """`length`: of the longest sequence served."""
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": LENGTH}
    config, rotary = (Phi3Config, Phi3RotaryEmbedding) if model == "phi3" else (LlamaConfig, LlamaRotaryEmbedding)
    if model == "phi3":
        sizes["original_max_position_embeddings"] = 150
    theirs: PreTrainedConfig = config(**sizes, rope_parameters={"rope_theta": 5000.0, **table})
    cos, sin = rotary(theirs)(torch.zeros(1), torch.arange(length).unsqueeze(0))
    fields = ConfigFields({**sizes, "rope_parameters": {"rope_theta": 5000.0, **table}}, "config.json")
    spec = rope_of(fields, HEAD_DIM, partial=True)
    ours = tables(spec, HEAD_DIM, length, torch.device("cpu"))
    half = cos.shape[-1] // 2
    torch.testing.assert_close(ours.cos_PE, cos[0, :, :half], atol=5e-5, rtol=0)
    torch.testing.assert_close(ours.sin_PE, sin[0, :, :half], atol=5e-5, rtol=0)
    assert longest(fields, spec) == LENGTH


def test_yarn_stretches_the_original_length() -> None:
    config = {"max_position_embeddings": 32768, "rope_scaling": {"type": "yarn", "factor": 4.0}}
    fields = ConfigFields(config, "config.json")
    assert longest(fields, rope_of(fields, 128)) == 131072


def test_earlier_names_of_longrope() -> None:
    for name in ("su", "yarn"):
        table = {"type": name, "short_factor": SHORT, "long_factor": LONG}
        config = {"max_position_embeddings": 600, "original_max_position_embeddings": 150, "rope_scaling": table}
        spec = rope_of(ConfigFields(config, "config.json"), HEAD_DIM)
        assert (spec.scaling, spec.factor, spec.original_max_position) == ("longrope", 4.0, 150)
