"""generation_config.json: which tokens end a text, and what requests are sampled by where they do not say.

Owns --generation-config and --override-generation-config. The ends count under either. The sampling parameters are those that
vLLM takes: temperature, top_p, top_k, min_p, repetition_penalty and max_new_tokens, as far as they are said. `do_sample` false
means greedy, unless a temperature is said (vLLM does not look at it). What else would change a choice of tokens is not supported,
and an operator is told so.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from msgspec.structs import replace

from tpserve.config.model_config import read_object
from tpserve.config.schema import Flags
from tpserve.errors import UserError
from tpserve.types.sampling import SamplingDefaults

FILE = "generation_config.json"
OFF = ("none", "vllm")
HONOURED = {name: name for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")} | {
    "max_new_tokens": "max_tokens"
}
"""Fields of the file, and what requests call them."""
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "no_repeat_ngram_size": (0,),
    "typical_p": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "penalty_alpha": (0,),
    "guidance_scale": (1,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "bad_words_ids": ([],),
    "sequence_bias": ({},),
    "stop_strings": ([],),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "exponential_decay_length_penalty": (),
    "watermarking_config": (),
}
"""Fields that would change what is drawn, and the values that do not; null never does."""
_PLACE = re.compile(r"(?s)(.*) - at `\$\.(.*)`$")
_FLAG = "--override-generation-config"


class GenerationConfig(NamedTuple):
    """`eos_ids` come on top of those of config.json."""

    eos_ids: tuple[int, ...]
    sampling: SamplingDefaults


def load(flags: Flags, model: str) -> GenerationConfig:
    """What the flags and the `model` directory say. UserError names the file or flag and the field that is wrong."""
    said, elsewhere = flags.generation_config, flags.generation_config not in ("auto", *OFF)
    path = Path(said if elsewhere else model, FILE)
    if elsewhere and not path.is_file():
        raise UserError(
            f"--generation-config {said} is neither auto, nor none, nor a directory with a {FILE}", param="generation_config"
        )
    file = read_object(path) if path.exists() else {}
    eos_ids = _ids(file.get("eos_token_id"), path)
    if said in OFF:
        file = {}
    override = flags.override_generation_config or {}
    if wrong := [name for name in override if name not in HONOURED]:
        raise UserError(f"{_FLAG} has {wrong[0]!r}: known are {', '.join(HONOURED)}", param="override_generation_config")
    sampling = _sampling(file, str(path)) | _sampling(override, _FLAG)
    if file.get("do_sample") is False and "temperature" not in sampling:
        sampling["temperature"] = 0.0
    left_out = tuple(
        name for name, neutral in UNSUPPORTED.items() if (value := file.get(name)) is not None and value not in neutral
    )
    sources = [str(path) if elsewhere else FILE] * bool(file) + [_FLAG] * bool(override)
    if not sampling and not left_out:
        return GenerationConfig(eos_ids, SamplingDefaults())
    defaults = msgspec.convert(sampling, SamplingDefaults)
    return GenerationConfig(eos_ids, replace(defaults, left_out=left_out, source=" and ".join(sources)))


def line(defaults: SamplingDefaults) -> str | None:
    """What an operator is told once; None when there are no defaults."""
    if not defaults.source:
        return None
    said = ", ".join(f"{name} {value:g}" for name, value in defaults.said().items()) or "none"
    left_out = f"; not supported and left out: {', '.join(defaults.left_out)}" if defaults.left_out else ""
    return f"default sampling parameters from {defaults.source}: {said}{left_out} (--generation-config none turns them off)"


def _sampling(said: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The fields that are honoured, in the names of a request."""
    found = {name: said[field] for field, name in HONOURED.items() if said.get(field) is not None}
    try:
        msgspec.convert(found, SamplingDefaults)
    except msgspec.ValidationError as error:
        match = _PLACE.match(str(error))
        assert match is not None, "msgspec names the field"
        field = next(field for field, name in HONOURED.items() if name == match[2])
        text = match[1][0].lower() + match[1][1:]
        raise UserError(f"{where}: field {field!r}: {text}, not {said[field]!r}") from None
    return found


def _ids(value: Any, path: Path) -> tuple[int, ...]:
    values = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(token) is int and token >= 0 for token in values):
        raise UserError(f"{path}: field 'eos_token_id' must hold token ids, not {value!r}")
    return tuple(values)
