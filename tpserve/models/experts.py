"""The fields that describe a mixture of experts, in the spelling that Qwen's models share."""

from tpserve.models.config_fields import ConfigFields
from tpserve.types.model_spec import ExpertsSpec, RoutingSpec

COUNTS = ("num_experts", "num_local_experts")
"""Fields that hold the number of experts; a family without experts refuses them."""
PARALLEL = ("TP", "PP", "EP")


def checked(fields: ConfigFields, spec: ExpertsSpec) -> ExpertsSpec:
    """Return `spec`. UserError for groups of unequal size, and for more active experts than there are to choose from."""
    routing = spec.routing
    size, rest = divmod(spec.count, routing.num_groups)
    if rest or not routing.group_best <= size or routing.num_top_groups > routing.num_groups:
        chosen = f"{routing.num_top_groups} of {routing.num_groups} groups"
        raise fields.refuse(f"{spec.count} experts cannot be chosen from {chosen} with at least {routing.group_best} in each")
    if routing.num_active > size * routing.num_top_groups:
        there = f"there are {size * routing.num_top_groups} experts to choose from"
        raise fields.refuse(f"field 'num_experts_per_tok' is {routing.num_active}, but {there}")
    return spec


def qwen(fields: ConfigFields, shared_size: int = 0) -> ExpertsSpec:
    """Experts in every `decoder_sparse_step`-th layer that `mlp_only_layers` does not name."""
    step, dense = fields.size("decoder_sparse_step", 1), fields.get("mlp_only_layers") or []
    if not isinstance(dense, list) or not all(type(layer) is int for layer in dense):
        raise fields.refuse(f"field 'mlp_only_layers' must hold layer numbers, not {dense!r}")
    layers = range(fields.size("num_hidden_layers"))
    spec = ExpertsSpec(
        count=fields.size("num_experts", fields.get("num_local_experts")),  # transformers 5 writes num_local_experts
        size=fields.size("moe_intermediate_size"),
        routing=RoutingSpec(fields.size("num_experts_per_tok"), renormalise=fields.flag("norm_topk_prob")),
        layers=tuple(layer for layer in layers if (layer + 1) % step == 0 and layer not in dense),
        shared_size=shared_size,
        shared_gate=shared_size > 0,
    )
    return checked(fields, spec)
