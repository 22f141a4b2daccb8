"""A model directory, small enough to start in a moment: without weights, for --load-format dummy, or with random ones."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from tests.http import tiny_tokenizer

LAYERS, HEADS = 3, 4


def save(directory: Path) -> Path:
    tokenizer_vocab = 320
    tiny_tokenizer.save(tiny_tokenizer.byte_level(), directory)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": tokenizer_vocab, "hidden_size": 32,
        "intermediate_size": 48, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": 256, "tie_word_embeddings": False,
        "hidden_act": "silu", "torch_dtype": "float32", "bos_token_id": 0, "eos_token_id": tiny_tokenizer.EOS,
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def add_weights(directory: Path) -> None:
    """Random weights in two files and their index."""
    config = json.loads((directory / "config.json").read_text())
    hidden, inner, kv = config["hidden_size"], config["intermediate_size"], config["hidden_size"] // 2
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for layer in range(LAYERS):
        attention = {"q": (hidden, hidden), "k": (kv, hidden), "v": (kv, hidden), "o": (hidden, hidden)}
        mlp = {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
        prefix = f"model.layers.{layer}"
        shapes |= {f"{prefix}.self_attn.{name}_proj.weight": shape for name, shape in attention.items()}
        shapes |= {f"{prefix}.mlp.{name}_proj.weight": shape for name, shape in mlp.items()}
        shapes |= {f"{prefix}.{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (config["vocab_size"], hidden)}
    random, names = np.random.default_rng(0), list(shapes)
    files = {"model-1.safetensors": names[: len(names) // 2], "model-2.safetensors": names[len(names) // 2 :]}
    for file, inside in files.items():
        save_file({name: random.standard_normal(shapes[name], np.float32) for name in inside}, directory / file)
    index = {"metadata": {}, "weight_map": {name: file for file, inside in files.items() for name in inside}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
