"""The registry of supported model families. Each family is one short torch-free file; `decoder` (torch) runs them all."""

from collections.abc import Mapping
from typing import Any

from tpserve.errors import UserError
from tpserve.models import (
    deepseek,
    gemma2,
    gemma3,
    gpt2,
    gpt_oss,
    granite,
    llama,
    mistral,
    mixtral,
    olmo2,
    opt,
    phi3,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_moe,
)  # fmt: skip
from tpserve.models.config_fields import ConfigFields
from tpserve.models.family import Family
from tpserve.types.model_spec import ModelSpec
from tpserve.weights.names import WeightNames

__all__ = ["Family", "families", "model_spec", "names_of"]

_FAMILIES = (
    llama.FAMILY,
    mistral.FAMILY,
    mixtral.FAMILY,
    qwen2.FAMILY,
    qwen2_moe.FAMILY,
    qwen3.FAMILY,
    qwen3_moe.FAMILY,
    phi3.FAMILY,
    gemma2.FAMILY,
    gemma3.FAMILY,
    gpt_oss.FAMILY,
    granite.FAMILY,
    olmo2.FAMILY,
    gpt2.FAMILY,
    opt.FAMILY,
    deepseek.V2,
    deepseek.V3,
)


def families() -> tuple[Family, ...]:
    """All families, in the order errors list them."""
    return _FAMILIES


def model_spec(config: Mapping[str, Any], where: str) -> ModelSpec:
    """Read a config.json into a ModelSpec; `where` names the file in errors.

    Raises UserError for an unsupported architecture, a missing or malformed field, and a field that the decoder does not support.
    """
    fields = ConfigFields(config, where)
    wanted = fields.get("architectures")
    if not isinstance(wanted, list) or not wanted:
        raise fields.refuse("field 'architectures' is missing: it names the model's class")
    for family in _FAMILIES:
        if wanted[0] in family.architectures:
            return family.spec(fields)
    supported = ", ".join(name for family in _FAMILIES for name in family.architectures)
    raise UserError(f"{where}: architecture {wanted[0]!r} is not supported: supported are {supported}")


def names_of(spec: ModelSpec) -> WeightNames:
    """The names of this model's weights in a checkpoint."""
    return next(family.names for family in _FAMILIES if family.name == spec.family)
