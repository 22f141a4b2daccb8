"""Typed access to the fields of config.json, and the list of fields that must not be ignored.

A field that asks for mathematics the decoder lacks is an error with the field's name; fields that change nothing in inference
(dropout, initialisation, file metadata) are ignored.
"""

from collections.abc import Mapping
from typing import Any, Literal, cast

from tpserve.errors import UserError

NEUTRAL: dict[str, tuple[Any, ...]] = {
    # field -> values that the decoder supports; it always supports an absent field and null
    "hidden_act": ("silu", "swish"),
    "use_sliding_window": (False,),
    "compression_config": (),
    "attention_multiplier": (),
    "residual_multiplier": (1, 1.0),
    "embedding_multiplier": (1, 1.0),
    "logits_scaling": (1, 1.0),
    "logit_scale": (1, 1.0),
    "scale_emb": (1, 1.0),
    "scale_depth": (),
    "dim_model_base": (),
    "final_logit_softcapping": (),
    "attn_logit_softcapping": (),
    "query_pre_attn_scalar": (),
    "clip_qkv": (),
    "attention_chunk_size": (),
    "no_rope_layers": ([],),
    "num_experts": (0, 1),
    "num_local_experts": (0, 1),
    "n_routed_experts": (0,),
    "kv_lora_rank": (),
    "is_encoder_decoder": (False,),
    "cross_attention_hidden_size": (),
}
ACTIVATIONS: dict[str, Literal["silu", "gelu", "gelu_tanh", "relu"]] = {
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
FP8 = {"weight_block_size": ([128, 128],), "activation_scheme": (None, "dynamic"), "fmt": (None, "e4m3")}
"""The supported values of the fields of an FP8 `quantization_config`."""
QUANTIZED = {"fp8": "'fp8' with weight_block_size [128, 128] and activation_scheme 'dynamic'", "mxfp4": "'mxfp4'"}
DTYPES = ("float32", "bfloat16", "float16")


class ConfigFields:
    """The fields of config.json, or of an object in it. `where` names the file in errors."""

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        self._config = config
        self._where = where

    def refuse(self, text: str) -> UserError:
        """Make the error to raise: `text` after the name of the file."""
        return UserError(f"{self._where}: {text}")

    def over(self, defaults: Mapping[str, Any]) -> "ConfigFields":
        """A copy with `defaults` for absent fields; null stays null."""
        return ConfigFields({**defaults, **self._config}, self._where)

    def replaced(self, **fields: Any) -> "ConfigFields":
        """A copy with these fields replaced."""
        return ConfigFields({**self._config, **fields}, self._where)

    def get(self, name: str) -> Any:
        """The raw value of a field; None when absent or null."""
        return self._config.get(name)

    def size(self, name: str, default: int | None = None) -> int:
        """A positive integer."""
        value = self._required(name, default)
        if type(value) is not int or value < 1:
            raise self.refuse(f"field {name!r} must be a positive integer, not {value!r}")
        return value

    def count(self, name: str, default: int | None = None) -> int:
        """A non-negative integer."""
        value = self._required(name, default)
        if type(value) is not int or value < 0:
            raise self.refuse(f"field {name!r} must be an integer from 0 on, not {value!r}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A positive number."""
        value = self._required(name, default)
        if type(value) not in (int, float) or not value > 0:
            raise self.refuse(f"field {name!r} must be a positive number, not {value!r}")
        return float(value)

    def flag(self, name: str, default: bool = False) -> bool:
        """True or false."""
        value = self._required(name, default)
        if type(value) is not bool:
            raise self.refuse(f"field {name!r} must be true or false, not {value!r}")
        return value

    def _required(self, name: str, default: Any) -> Any:
        value = self.get(name)
        if value is None:
            value = default
        if value is None:
            raise self.refuse(f"field {name!r} is missing")
        return value

    def numbers(self, name: str, count: int) -> tuple[float, ...]:
        """A list of `count` positive numbers."""
        values = self._required(name, None)
        if not isinstance(values, list) or len(values) != count or not all(type(x) in (int, float) and x > 0 for x in values):
            raise self.refuse(f"field {name!r} must hold {count} positive numbers, not {_short(values)}")
        return tuple(map(float, values))

    def part(self, name: str) -> "ConfigFields":
        """The fields of an object; none where it is absent or null."""
        value = self.get(name) or {}
        if not isinstance(value, dict):
            raise self.refuse(f"field {name!r} must be an object, not {_short(value)}")
        return ConfigFields(value, f"{self._where}: {name}")

    def table(self, name: str) -> "ConfigFields":
        """As `part`, for an object that contains no objects."""
        part = self.part(name)
        if any(isinstance(part.get(inner), dict) for inner in part.names()):
            raise self.refuse(f"field {name!r} must be a flat object, not {_short(self.get(name))}")
        return part

    def names(self) -> set[str]:
        """The names of all fields that are not null."""
        return {name for name, value in self._config.items() if value is not None}

    def ids(self, name: str) -> tuple[int, ...]:
        """A token id, a list of them, or none."""
        value = self.get(name)
        values = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(token) is int and token >= 0 for token in values):
            raise self.refuse(f"field {name!r} must hold token ids, not {value!r}")
        return tuple(values)

    def dtype(self) -> Literal["float32", "bfloat16", "float16"]:
        """The checkpoint's dtype, under its old or new name; float32 when both are absent."""
        value = self.get("dtype") or self.get("torch_dtype") or "float32"
        if value not in DTYPES:
            raise self.refuse(f"dtype {value!r} is not supported: supported are {', '.join(DTYPES)}")
        return cast(Literal["float32", "bfloat16", "float16"], value)

    def activation(self, name: str, default: str) -> Literal["silu", "gelu", "gelu_tanh", "relu"]:
        """The activation of an MLP without a gate."""
        value = self.get(name) or default
        if value not in ACTIVATIONS:
            raise self.refuse(f"field {name!r} is {_short(value)}: supported are {', '.join(ACTIVATIONS)}")
        return ACTIVATIONS[value]

    def refuse_unless(self, name: str, *neutral: Any) -> None:
        """Raise UserError unless the field is absent, null or one of the `neutral` values."""
        value = self.get(name)
        if value is not None and value not in neutral:
            shown = value.get("quant_method", value) if isinstance(value, dict) else value
            raise self.refuse(f"field {name!r} is {_short(shown)}, which tpserve does not support yet")

    def refuse_quantization_but(self, *methods: str) -> None:
        """Raise UserError for a `quantization_config` with another method than `methods`.

        Loading dequantises the weights; the stored tensors show which of them are quantized.
        """
        value = self.get("quantization_config")
        if value is None:
            return
        config = ConfigFields(value if isinstance(value, dict) else {}, "")
        method = config.get("quant_method")
        odd = [name for name, known in FP8.items() if config.get(name) not in known] if method == "fp8" else []
        if method not in methods or odd:
            what = _short(method or value) + "".join(f" with {name} {config.get(name)!r}" for name in odd[:1])
            supported = ", ".join(QUANTIZED[name] for name in methods)
            raise self.refuse(f"field 'quantization_config' is {what}, which tpserve does not support: it reads {supported}")

    def refuse_other_mathematics(self, honoured: tuple[str, ...] = ()) -> None:
        """Raise UserError for every field of `NEUTRAL` that asks for other mathematics, except the `honoured` ones."""
        for name, neutral in NEUTRAL.items():
            if name not in honoured:
                self.refuse_unless(name, *neutral)
        if "quantization_config" not in honoured:
            self.refuse_quantization_but("fp8")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
