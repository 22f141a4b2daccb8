"""A family of models: its architectures, the function that reads its config, the names of its weights."""

from collections.abc import Callable
from dataclasses import dataclass

from tpserve.models.config_fields import ConfigFields
from tpserve.types.model_spec import ModelSpec
from tpserve.weights.names import LLAMA, WeightNames


@dataclass(frozen=True)
class Family:
    """`architectures`: values of config.json's field of that name; `spec` reads the other fields.

    For docs/models.md: `without`, config fields that are refused; `parallel`, the tested parallel modes.
    """

    name: str
    architectures: tuple[str, ...]
    spec: Callable[[ConfigFields], ModelSpec]
    names: WeightNames = LLAMA
    without: str = ""
    parallel: tuple[str, ...] = ("TP", "PP")
