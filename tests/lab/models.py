"""Models small enough to start in a moment, with heads and layers enough for the layouts of a cluster."""

from pathlib import Path
from typing import Any

from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM, PreTrainedModel

from tests.http import tiny_tokenizer
from tests.parity.random_models import randomised

VOCAB = 517
_ENDS: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}


def llama(directory: Path) -> str:
    """16 heads for up to 16 ranks, of which several share each of the four key/value heads. Four layers."""
    sizes = {"hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 4, "num_attention_heads": 16}
    more: dict[str, Any] = {"num_key_value_heads": 4, "vocab_size": VOCAB, "max_position_embeddings": 256, **_ENDS}
    return _save(LlamaForCausalLM(LlamaConfig(**sizes, **more)), directory)


def gpt2(directory: Path) -> str:
    """GPT-2's shape: twelve heads, of which four ranks hold three each, and twelve layers."""
    sizes = {"n_embd": 96, "n_layer": 12, "n_head": 12, "n_positions": 256}
    return _save(GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, **sizes, **_ENDS)), directory)


def opt(directory: Path) -> str:
    """OPT's shape: positions from two on, biases everywhere."""
    sizes = {"hidden_size": 64, "ffn_dim": 128, "num_hidden_layers": 3, "num_attention_heads": 8}
    return _save(OPTForCausalLM(OPTConfig(vocab_size=VOCAB, max_position_embeddings=256, **sizes, **_ENDS)), directory)


def _save(model: PreTrainedModel, directory: Path) -> str:
    randomised(model).save_pretrained(directory)
    tiny_tokenizer.save(tiny_tokenizer.byte_level(), directory)
    return str(directory)
