"""Gemma 3: Gemma 2 without caps, norms over the heads of query and key, layers with a window have a rope of their own.

A multimodal model is served as its text model, whose fields are in `text_config`.
"""

from tpserve.models import gemma_config, transformer
from tpserve.models.config_fields import ConfigFields
from tpserve.models.family import Family
from tpserve.models.rope_config import rope_of
from tpserve.models.transformer import FULL, SLIDING
from tpserve.types.model_spec import ModelSpec, RopeSpec

DEFAULTS = {
    **gemma_config.DEFAULTS,
    "vocab_size": 262_208,
    "max_position_embeddings": 131_072,
    "rope_theta": 1e6,
    "rope_local_base_freq": 1e4,
    "sliding_window_pattern": 6,
    "bos_token_id": 2,
    "eos_token_id": 1,
}
OUTSIDE = ("dtype", "torch_dtype", "bos_token_id", "eos_token_id", "tie_word_embeddings", "quantization_config")
"""Fields at the top level of the config that apply to `text_config`."""


def _spec(fields: ConfigFields) -> ModelSpec:
    if fields.get("text_config") is not None:
        fields = fields.part("text_config").replaced(**{name: fields.get(name) for name in OUTSIDE if name in fields.names()})
    fields = fields.over(DEFAULTS)
    pattern = fields.size("sliding_window_pattern")
    rope, window_rope = _ropes(fields)
    return gemma_config.spec(
        fields,
        "gemma3",
        windows=transformer.layer_windows(fields, lambda layer: (layer + 1) % pattern != 0),
        honoured=(),
        rope=rope,
        window_rope=window_rope,
        qk_norm="head",
    )


def _ropes(fields: ConfigFields) -> tuple[RopeSpec, RopeSpec]:
    """The ropes of layers without and with a window. The older spelling scales only the former."""
    kinds = fields.part("rope_parameters")
    scaling = fields.table("rope_scaling")
    # transformers merges the two, and ignores scaling without a type
    if scaling.names() and (kinds.names() or scaling.get("rope_type") is None):
        raise scaling.refuse("it must name its 'rope_type', and there must be no 'rope_parameters' beside it")
    if unknown := sorted(kinds.names() - {FULL, SLIDING}):
        raise kinds.refuse(f"field {unknown[0]!r} is not supported: supported are {FULL!r} and {SLIDING!r}")
    tables = kinds if kinds.names() else ConfigFields({FULL: fields.get("rope_scaling")}, "")
    thetas = {FULL: fields.number("rope_theta"), SLIDING: fields.number("rope_local_base_freq")}
    head_dim = fields.size("head_dim")
    full, windowed = (
        rope_of(fields.replaced(rope_parameters=tables.get(kind), rope_scaling=None, rope_theta=theta), head_dim)
        for kind, theta in thetas.items()
    )
    return full, windowed


FAMILY = Family(
    "gemma3",
    ("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"),
    _spec,
    gemma_config.NAMES,
    without="`attn_logit_softcapping`, `final_logit_softcapping`, `use_bidirectional_attention`, another `hidden_activation`",
)
