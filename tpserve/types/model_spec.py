"""config.json as mathematics: everything a decoder needs to know about a model, with the spelling of no family."""

from typing import Literal

from msgspec import Struct


class RopeSpec(Struct, frozen=True):
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864) and its scaling.

    `linear` divides positions by `factor`; `llama3` is the frequency-dependent interpolation of Llama 3.1; `yarn` that of
    Peng et al. 2023 (arXiv:2309.00071); `longrope` (Ding et al. 2024, arXiv:2402.13753) has a divisor for each frequency.
    """

    theta: float = 10000.0
    scaling: Literal["default", "linear", "llama3", "yarn", "longrope"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    """yarn: whether the bounds of its ramp are whole channels."""
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()
    """longrope: the divisors up to `original_max_position`, and those of a server of longer sequences."""
    magnitude: float = 1.0
    """What rotated channels are multiplied by."""
    num_channels: int | None = None
    """How many of a head's channels turn, the first ones; None: all."""


class CacheGroup(Struct, frozen=True):
    """Layers that share one block table. `full` keeps every position; other kinds arrive with the models that need them."""

    kind: Literal["full"]
    layers: tuple[int, ...]


class ExpertsSpec(Struct, frozen=True):
    """A mixture of experts in place of the MLP (Shazeer et al. 2017, arXiv:1701.06538).

    A token's experts are the `num_active` most probable ones under a softmax over all of them; the lower id wins a tie.
    """

    count: int
    num_active: int
    size: int
    """Intermediate channels of an expert."""
    renormalise: bool
    """Whether the chosen experts' probabilities are scaled to add up to 1."""
    layers: tuple[int, ...]
    """The layers that have experts; the others have an MLP of `ModelSpec.intermediate_size`."""
    shared_size: int = 0
    """Intermediate channels of an MLP that every token goes through beside its experts, behind a sigmoid gate; 0 for none."""


class ModelSpec(Struct, frozen=True, kw_only=True):
    """A decoder-only transformer. Sizes are those of the whole model, before any split. Defaults are neutral: Llama's."""

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    embedding_size: int | None = None
    """Width of the embedding and of the LM head's input where it is not the hidden size: a projection lies between."""
    norm: Literal["rms", "layer"] = "rms"
    norm_affine: bool = True
    """Whether norms have weights; layer norms have biases then, too."""
    norm_eps: float
    norm_place: Literal["before", "after", "output"] = "before"
    """f is attention or MLP: x + f(norm(x)), norm(x + f(x)), or x + norm(f(x))."""
    final_norm: bool = True
    rope: RopeSpec | None
    """None: positions are learned embeddings, added to those of the tokens."""
    max_position: int
    sliding_window: int | None = None
    """Positions that a token sees, its own included; None: all before it."""
    tie_embeddings: bool
    qkv_bias: bool
    """Bias on the query, key and value projections."""
    out_bias: bool
    """Bias on the attention output projection."""
    mlp_bias: bool
    qk_norm: Literal["head", "all"] | None = None
    """RMS norm of q and k before rope: over each head (Qwen3), or over all heads together (OLMo 2)."""
    gated: bool = True
    """The MLP is down(activation(gate(x)) * up(x)), else down(activation(up(x)))."""
    activation: Literal["silu", "gelu", "gelu_tanh", "relu"]
    experts: ExpertsSpec | None = None
    attention_scale: float | None = None
    """What scores are multiplied by; None: head_dim ** -0.5."""
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    """What attention and MLP are multiplied by before they are added to the residual stream."""
    logits_scale: float = 1.0
    dtype: Literal["float32", "bfloat16", "float16"]
    """The checkpoint's dtype, what `--dtype auto` follows."""
    bos_id: int | None
    eos_ids: tuple[int, ...]
    cache: tuple[CacheGroup, ...]
