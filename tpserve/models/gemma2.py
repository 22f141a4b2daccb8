"""Gemma 2: norms around attention and MLP, capped scores and logits, a gated GELU, windows in every other layer."""

from tpserve.models import gemma_config, transformer
from tpserve.models.config_fields import ConfigFields
from tpserve.models.family import Family
from tpserve.types.model_spec import ModelSpec

DEFAULTS = {**gemma_config.DEFAULTS, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
CAPS = ("attn_logit_softcapping", "final_logit_softcapping")


def _spec(fields: ConfigFields) -> ModelSpec:
    fields = fields.over(DEFAULTS)
    scores_cap, logits_cap = (None if fields.get(name) is None else fields.number(name) for name in CAPS)
    return gemma_config.spec(
        fields,
        "gemma2",
        windows=transformer.layer_windows(fields, lambda layer: layer % 2 == 0),
        honoured=CAPS,
        scores_cap=scores_cap,
        logits_cap=logits_cap,
    )


FAMILY = Family(
    "gemma2",
    ("Gemma2ForCausalLM",),
    _spec,
    gemma_config.NAMES,
    without="`use_bidirectional_attention`, another `hidden_activation`",
)
