"""What a family of models is to tpserve: the architectures it serves, how to read its config, what its weights are called."""

from collections.abc import Callable
from dataclasses import dataclass

from tpserve.models.config_fields import ConfigFields
from tpserve.types.model_spec import ModelSpec
from tpserve.weights.names import LLAMA, WeightNames


@dataclass(frozen=True)
class Family:
    """`architectures`: values of config.json's field of that name; `spec` reads the other fields.

    For docs/models.md: `without`, what such a config can ask for and is refused; `parallel`, the tested ways to spread the model.
    """

    name: str
    architectures: tuple[str, ...]
    spec: Callable[[ConfigFields], ModelSpec]
    names: WeightNames = LLAMA
    without: str = ""
    parallel: tuple[str, ...] = ("TP", "PP")
