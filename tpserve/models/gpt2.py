"""GPT-2: learned positions, layer norms, biases everywhere, a plain MLP; projections fused and stored transposed (Conv1D)."""

from tpserve.models import transformer
from tpserve.models.config_fields import ConfigFields
from tpserve.models.family import Family
from tpserve.types.model_spec import ModelSpec
from tpserve.weights.names import WeightNames


def _spec(fields: ConfigFields) -> ModelSpec:
    fields.refuse_unless("scale_attn_by_inverse_layer_idx", False)
    fields.refuse_unless("add_cross_attention", False)
    hidden_size = fields.size("n_embd")
    return transformer.plain(
        fields,
        "gpt2",
        hidden_size=hidden_size,
        intermediate_size=fields.size("n_inner", 4 * hidden_size),
        num_layers=fields.size("n_layer"),
        num_heads=fields.size("n_head"),
        norm_eps=fields.number("layer_norm_epsilon", 1e-5),
        max_position=fields.size("n_positions"),
        bias=True,
        activation=fields.activation("activation_function", "gelu_new"),
        attention_scale=None if fields.flag("scale_attn_weights", True) else 1.0,
    )


FAMILY = Family(
    "gpt2",
    ("GPT2LMHeadModel",),
    _spec,
    WeightNames(
        embedding="transformer.wte",
        positions="transformer.wpe",
        final_norm="transformer.ln_f",
        layer="transformer.h.{layer}.",
        attention_norm="ln_1",
        q="attn.c_attn",
        k="attn.c_attn",
        v="attn.c_attn",
        o="attn.c_proj",
        mlp_norm="ln_2",
        up="mlp.c_fc",
        down="mlp.c_proj",
        transposed=True,
        unused=(".attn.bias", ".attn.masked_bias"),
    ),
    without="`scale_attn_by_inverse_layer_idx`, `add_cross_attention`",
)
