"""OPT and Galactica: learned positions from row 2 on, norms before or after, an embedding that may have its own size."""

from tpserve.models import transformer
from tpserve.models.config_fields import ConfigFields
from tpserve.models.family import Family
from tpserve.types.model_spec import ModelSpec
from tpserve.weights.names import WeightNames


def _spec(fields: ConfigFields) -> ModelSpec:
    hidden_size = fields.size("hidden_size")
    embedding_size = fields.size("word_embed_proj_dim", hidden_size)
    before = fields.flag("do_layer_norm_before", True)
    return transformer.plain(
        fields,
        "opt",
        hidden_size=hidden_size,
        embedding_size=None if embedding_size == hidden_size else embedding_size,
        intermediate_size=fields.size("ffn_dim"),
        num_layers=fields.size("num_hidden_layers"),
        num_heads=fields.size("num_attention_heads"),
        norm_affine=fields.flag("layer_norm_elementwise_affine", True),
        norm_eps=1e-5,
        norm_place="before" if before else "after",
        final_norm=before and not fields.flag("_remove_final_layer_norm"),
        max_position=fields.size("max_position_embeddings"),
        bias=fields.flag("enable_bias", True),
        activation=fields.activation("activation_function", "relu"),
    )


FAMILY = Family(
    "opt",
    ("OPTForCausalLM",),
    _spec,
    WeightNames(
        embedding="model.decoder.embed_tokens",
        positions="model.decoder.embed_positions",
        unused_positions=2,
        project_in="model.decoder.project_in",
        project_out="model.decoder.project_out",
        final_norm="model.decoder.final_layer_norm",
        layer="model.decoder.layers.{layer}.",
        attention_norm="self_attn_layer_norm",
        o="self_attn.out_proj",
        mlp_norm="final_layer_norm",
        up="fc1",
        down="fc2",
    ),
)
