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
    interleaved: bool = False
    """Channel 2 c turns with 2 c + 1, not with one half the channels away."""


class LatentSpec(Struct, frozen=True):
    """Multi-head latent attention (DeepSeek-V2, 2024, arXiv:2405.04434): what is cached of a position is one latent vector, of
    which the keys and values of all heads are products, and one rotated key that all heads share.
    """

    kv_rank: int
    """Channels of the latent."""
    rope_dim: int
    """Channels of the shared key, and as many of each query."""
    nope_dim: int
    """Channels of a head's key that come from the latent."""
    v_dim: int
    q_rank: int | None = None
    """Channels that queries are compressed to; None: they are not."""
    norm_eps: float = 1e-6
    """Of the norms of the latent and of the compressed query."""


class CacheGroup(Struct, frozen=True):
    """Layers that share one block table, in order; every layer is in one group."""

    layers: tuple[int, ...]
    window: int | None = None
    """Positions that a layer sees, the row's own included, and all that the group keeps; None: every position."""


class ClampedSwiglu(Struct, frozen=True):
    """gate * logistic(alpha * gate) * (up + 1), gate at most `limit` and up within it (gpt-oss, arXiv:2508.10925)."""

    alpha: float
    limit: float


class RoutingSpec(Struct, frozen=True):
    """How a token's `num_active` experts are chosen, and what their outputs are multiplied by before they are added up.

    The weights are the scores of the chosen ones. The lower id wins a tie, of experts and of groups.
    """

    num_active: int
    scores: Literal["softmax", "sigmoid"] = "softmax"
    """Over all experts, of what the router gives."""
    bias: Literal["logits", "choice"] | None = None
    """A number for each expert, added to what the router gives, or to the scores, for the choice alone."""
    num_groups: int = 1
    num_top_groups: int = 1
    """Experts lie in groups of equal size; chosen from are those of so many groups (DeepSeek-V2, arXiv:2405.04434)."""
    group_best: int = 1
    """What a group is chosen by: the sum of its so many best experts."""
    renormalise: bool = False
    """Whether the weights are scaled to add up to 1."""
    scale: float = 1.0
    """What they are multiplied by last."""


class ExpertsSpec(Struct, frozen=True):
    """A mixture of experts in place of the MLP (Shazeer et al. 2017, arXiv:1701.06538)."""

    count: int
    size: int
    """Intermediate channels of an expert."""
    routing: RoutingSpec
    layers: tuple[int, ...]
    """The layers that have experts; the others have an MLP of `ModelSpec.intermediate_size`."""
    bias: bool = False
    """Biases on the experts' projections."""
    clamped: ClampedSwiglu | None = None
    """The experts' activation where it is not `ModelSpec.activation`."""
    shared_size: int = 0
    """Intermediate channels of an MLP that every token goes through beside its experts; 0 for none."""
    shared_gate: bool = False
    """Whether a sigmoid gate of its own lets that one's output through."""


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
    norm_offset: float = 0.0
    """What is added to the weights of RMS norms: 1 where they lie around 0 (Gemma)."""
    norm_place: Literal["before", "after", "output", "around"] = "before"
    """f is attention or MLP: x + f(norm(x)), norm(x + f(x)), x + norm(f(x)), or x + norm(f(norm(x))) with two norms."""
    final_norm: bool = True
    rope: RopeSpec | None
    """None: positions are learned embeddings, added to those of the tokens."""
    window_rope: RopeSpec | None = None
    """The rope of layers with a window where it is another one (Gemma 3)."""
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
    """With latents, `head_dim` is that of queries and there are as many key/value heads as heads."""
    attention_scale: float | None = None
    """What scores are multiplied by; None: head_dim ** -0.5, but models with latents say it."""
    scores_cap: float | None = None
    """Scaled scores s become cap * tanh(s / cap)."""
    sinks: bool = False
    """Each head has a score of its own that takes part in the softmax and brings no value (arXiv:2309.17453, learned)."""
    embedding_scale: float = 1.0
    embedding_scale_rounded: bool = False
    """The scale is rounded to the model's dtype before it multiplies."""
    residual_scale: float = 1.0
    """What attention and MLP are multiplied by before they are added to the residual stream."""
    logits_scale: float = 1.0
    logits_cap: float | None = None
    """Logits x become cap * tanh(x / cap)."""
    dtype: Literal["float32", "bfloat16", "float16"]
    """The checkpoint's dtype, what `--dtype auto` follows."""
    bos_id: int | None
    eos_ids: tuple[int, ...]
    cache: tuple[CacheGroup, ...]

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Of each cache group."""
        return tuple(group.window for group in self.cache)
