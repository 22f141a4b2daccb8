"""A model's architecture in family-independent terms: everything that the decoder needs to know from config.json."""

from typing import Literal

from msgspec import Struct


class RopeSpec(Struct, frozen=True):
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864) and its scaling.

    `linear` divides positions by `factor`; `llama3` is the frequency-dependent interpolation of Llama 3.1; `yarn` that of
    Peng et al. 2023 (arXiv:2309.00071); `longrope` (Ding et al. 2024, arXiv:2402.13753) divides each frequency by its own factor.
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
    """yarn: round the bounds of the ramp to whole channels."""
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()
    """longrope: the divisors for sequences up to `original_max_position`, and for a server with longer sequences."""
    magnitude: float = 1.0
    """Factor on the rotated channels."""
    num_channels: int | None = None
    """The number of rotated channels, the first ones of a head; None: all."""
    interleaved: bool = False
    """Rotate channel pairs (2c, 2c + 1) instead of (c, c + num_channels / 2)."""


class LatentSpec(Struct, frozen=True):
    """Multi-head latent attention (MLA; DeepSeek-V2, 2024, arXiv:2405.04434).

    The cache holds, per position, one latent vector, from which the keys and values of all heads are projected, and one rotated
    key that all heads share.
    """

    kv_rank: int
    """Channels of the latent."""
    rope_dim: int
    """Channels of the shared rotated key, and of the rotated part of each query."""
    nope_dim: int
    """Channels of a head's key that are projected from the latent, without rotation."""
    v_dim: int
    """Channels of a head's value."""
    q_rank: int | None = None
    """Channels of the compressed query; None: queries are not compressed."""
    norm_eps: float = 1e-6
    """Epsilon of the norms of the latent and of the compressed query."""


class CacheGroup(Struct, frozen=True):
    """Layers that share one block table, in ascending order; every layer is in exactly one group."""

    layers: tuple[int, ...]
    window: int | None = None
    """Sliding window: the number of positions that a row sees, its own included, and that the group keeps; None: all."""


class ClampedSwiglu(Struct, frozen=True):
    """gate * sigmoid(alpha * gate) * (up + 1), with gate <= limit and -limit <= up <= limit (gpt-oss, arXiv:2508.10925)."""

    alpha: float
    limit: float


class RoutingSpec(Struct, frozen=True):
    """How a token's `num_active` experts are chosen, and how their outputs are weighted before they are summed.

    The weights are the scores of the chosen experts. On a tie the lower id wins, among experts and among groups.
    """

    num_active: int
    scores: Literal["softmax", "sigmoid"] = "softmax"
    """The function from the router's logits, over all experts, to scores."""
    bias: Literal["logits", "choice"] | None = None
    """A bias per expert. logits: added to the router's logits; choice: added to the scores, only to choose experts."""
    num_groups: int = 1
    num_top_groups: int = 1
    """Experts form `num_groups` groups of equal size; only the best `num_top_groups` are used (DeepSeek-V2, arXiv:2405.04434)."""
    group_best: int = 1
    """A group's score is the sum of the scores of its `group_best` best experts."""
    renormalise: bool = False
    """Whether the weights are scaled to add up to 1."""
    scale: float = 1.0
    """A factor on the weights, applied last."""


class ExpertsSpec(Struct, frozen=True):
    """A mixture of experts in place of the MLP (Shazeer et al. 2017, arXiv:1701.06538)."""

    count: int
    """Number of experts of a layer."""
    size: int
    """Intermediate channels of an expert."""
    routing: RoutingSpec
    layers: tuple[int, ...]
    """The layers that have experts; the others have an MLP of `ModelSpec.intermediate_size`."""
    bias: bool = False
    """Biases on the experts' projections."""
    clamped: ClampedSwiglu | None = None
    """The experts' activation if it is not `ModelSpec.activation`."""
    shared_size: int = 0
    """Intermediate channels of the shared expert, an MLP that processes every token; 0: none."""
    shared_gate: bool = False
    """Whether a sigmoid gate multiplies the shared expert's output."""


class ModelSpec(Struct, frozen=True, kw_only=True):
    """A decoder-only transformer. Sizes are those of the whole model, before any split. The defaults are Llama's."""

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    embedding_size: int | None = None
    """Width of the embedding and of the LM head's input if it is not the hidden size; projections convert between the two."""
    norm: Literal["rms", "layer"] = "rms"
    norm_affine: bool = True
    """Whether norms have weights, and layer norms also biases."""
    norm_eps: float
    norm_offset: float = 0.0
    """Added to the weights of RMS norms: 1 for Gemma, whose weights are stored around 0."""
    norm_place: Literal["before", "after", "output", "around"] = "before"
    """With f = attention or MLP: x + f(norm(x)), norm(x + f(x)), x + norm(f(x)), or x + norm(f(norm(x))) with two norms."""
    final_norm: bool = True
    rope: RopeSpec | None
    """None: learned position embeddings are added to the token embeddings."""
    window_rope: RopeSpec | None = None
    """The rope of layers with a window, if different (Gemma 3)."""
    max_position: int
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
    latent: LatentSpec | None = None
    """With MLA, `head_dim` is the queries' and `num_kv_heads` equals `num_heads`."""
    attention_scale: float | None = None
    """Factor on attention scores; None: head_dim ** -0.5. Always set with MLA."""
    scores_cap: float | None = None
    """Soft cap: scaled scores s become cap * tanh(s / cap)."""
    sinks: bool = False
    """Attention sinks: each head has a learned score that takes part in the softmax without a value (arXiv:2309.17453)."""
    embedding_scale: float = 1.0
    embedding_scale_rounded: bool = False
    """Whether the scale is rounded to the model's dtype first."""
    residual_scale: float = 1.0
    """Factor on the outputs of attention and MLP before they are added to the residual stream."""
    logits_scale: float = 1.0
    logits_cap: float | None = None
    """Soft cap: logits x become cap * tanh(x / cap)."""
    dtype: Literal["float32", "bfloat16", "float16"]
    """The checkpoint's dtype, which `--dtype auto` uses."""
    bos_id: int | None
    eos_ids: tuple[int, ...]
    cache: tuple[CacheGroup, ...]

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The window of each cache group."""
        return tuple(group.window for group in self.cache)
