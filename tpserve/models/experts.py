"""The fields that describe a mixture of experts, in the spelling that Qwen's models share."""

from tpserve.models.fields import Fields
from tpserve.types.model_spec import ExpertsSpec

COUNTS = ("num_experts", "num_local_experts")
"""Fields that a family without experts must not have."""
PARALLEL = ("TP", "PP", "EP")


def checked(fields: Fields, spec: ExpertsSpec) -> ExpertsSpec:
    """The same; refuses a token that wants more experts than there are."""
    if spec.num_active > spec.count:
        raise fields.refuse(f"field 'num_experts_per_tok' is {spec.num_active}, but there are {spec.count} experts")
    return spec


def qwen(fields: Fields, shared_size: int = 0) -> ExpertsSpec:
    """Experts in every `decoder_sparse_step`-th layer that `mlp_only_layers` does not name."""
    step, dense = fields.size("decoder_sparse_step", 1), fields.get("mlp_only_layers") or []
    if not isinstance(dense, list) or not all(type(layer) is int for layer in dense):
        raise fields.refuse(f"field 'mlp_only_layers' must hold layer numbers, not {dense!r}")
    layers = range(fields.size("num_hidden_layers"))
    spec = ExpertsSpec(
        count=fields.size("num_experts", fields.get("num_local_experts")),  # transformers 5 writes the second
        num_active=fields.size("num_experts_per_tok"),
        size=fields.size("moe_intermediate_size"),
        renormalise=fields.flag("norm_topk_prob"),
        layers=tuple(layer for layer in layers if (layer + 1) % step == 0 and layer not in dense),
        shared_size=shared_size,
    )
    return checked(fields, spec)
