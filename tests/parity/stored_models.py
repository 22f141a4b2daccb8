"""Checkpoints of transformers' models in other forms: block FP8 as it is published, torch's own files."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from tests.parity.random_models import randomised
from tests.quantized import CONFIG, fp8_checkpoint


def in_block_fp8(model: PreTrainedModel, directory: Path) -> PreTrainedModel:
    """Save the model with 8-bit layers; what is returned has the numbers that those stand for."""
    meant_directory = directory.with_name(f"{directory.name}-meant")
    model.save_pretrained(meant_directory, save_original_format=True)
    stored, meant = fp8_checkpoint(load_file(meant_directory / "model.safetensors"))
    save_file(meant, meant_directory / "model.safetensors", metadata={"format": "pt"})
    directory.mkdir()
    save_file(stored, directory / "model.safetensors")
    config = json.loads((meant_directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "quantization_config": CONFIG}))
    return type(model).from_pretrained(meant_directory).eval()


def as_torch_file(directory: Path) -> None:
    """The checkpoint as pytorch_model.bin."""
    file = directory / "model.safetensors"
    torch.save(load_file(file), directory / "pytorch_model.bin")
    file.unlink()


def make_llama_fp8(directory: Path) -> PreTrainedModel:
    """Blocks in both directions, none of which ends where a rank's share does."""
    config = LlamaConfig(
        vocab_size=517, hidden_size=192, intermediate_size=300, num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=4,
        max_position_embeddings=400,
    )  # fmt: skip
    return in_block_fp8(randomised(LlamaForCausalLM(config)), directory)
