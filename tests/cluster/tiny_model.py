"""A model directory without weights, for --load-format dummy: small enough to start in a moment."""

import json
from pathlib import Path

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
