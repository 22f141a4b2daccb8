"""config.json as mathematics: everything a decoder needs to know about a model, with the spelling of no family."""

from typing import Literal

from msgspec import Struct


class RopeSpec(Struct, frozen=True):
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864) and its scaling.

    `linear` divides positions by `factor`; `llama3` is the frequency-dependent interpolation of Llama 3.1.
    """

    theta: float = 10000.0
    scaling: Literal["default", "linear", "llama3"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192


class CacheGroup(Struct, frozen=True):
    """Layers that share one block table. `full` keeps every position; other kinds arrive with the models that need them."""

    kind: Literal["full"]
    layers: tuple[int, ...]


class ModelSpec(Struct, frozen=True):
    """A decoder-only transformer. Sizes are those of the whole model, before any split."""

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    rope: RopeSpec
    max_position: int
    tie_embeddings: bool
    qkv_bias: bool
    """Bias on the query, key and value projections."""
    out_bias: bool
    """Bias on the attention output projection."""
    mlp_bias: bool
    qk_norm: bool
    """RMS norm over each head of q and k, before rope (Qwen3)."""
    activation: Literal["silu"]
    dtype: Literal["float32", "bfloat16", "float16"]
    """The checkpoint's dtype, what `--dtype auto` follows."""
    bos_id: int | None
    eos_ids: tuple[int, ...]
    cache: tuple[CacheGroup, ...]
