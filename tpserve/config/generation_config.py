"""generation_config.json: the EOS ids and the default sampling parameters.

Owns --generation-config and --override-generation-config. The EOS ids are read whatever these flags say. The sampling parameters
are those that vLLM reads: temperature, top_p, top_k, min_p, repetition_penalty and max_new_tokens. `do_sample: false` means
greedy unless the file has a temperature (vLLM ignores `do_sample`). Other fields that would change the output are not supported,
and the log names them.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from msgspec.structs import replace

from tpserve.config.flags import Flags
from tpserve.config.model_config import read_object
from tpserve.errors import UserError
from tpserve.types.sampling import SamplingDefaults

FILE = "generation_config.json"
OFF = ("none", "vllm")
SUPPORTED = {name: name for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")} | {
    "max_new_tokens": "max_tokens"
}
"""Fields of the file -> parameters of a request."""
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
"""Unsupported fields -> the values that have no effect. null never has one."""
_PLACE = re.compile(r"(?s)(.*) - at `\$\.(.*)`$")
_FLAG = "--override-generation-config"


class GenerationConfig(NamedTuple):
    """What the file and the flags define. `eos_ids`: in addition to those of config.json."""

    eos_ids: tuple[int, ...]
    sampling: SamplingDefaults


def load(flags: Flags, model: str) -> GenerationConfig:
    """Read the flags and the file in directory `model`. Raises UserError that names the file or flag, and the field."""
    choice = flags.generation_config
    other_directory = choice not in ("auto", *OFF)
    path = Path(choice if other_directory else model, FILE)
    if other_directory and not path.is_file():
        raise UserError(
            f"--generation-config {choice} is neither auto, nor none, nor a directory with a {FILE}", param="generation_config"
        )
    file = read_object(path) if path.exists() else {}
    eos_ids = _ids(file.get("eos_token_id"), path)
    if choice in OFF:
        file = {}
    override = flags.override_generation_config or {}
    if wrong := [name for name in override if name not in SUPPORTED]:
        raise UserError(f"{_FLAG} has {wrong[0]!r}: known are {', '.join(SUPPORTED)}", param="override_generation_config")
    sampling = _sampling(file, str(path)) | _sampling(override, _FLAG)
    if file.get("do_sample") is False and "temperature" not in sampling:
        sampling["temperature"] = 0.0
    unsupported = tuple(
        name for name, neutral in UNSUPPORTED.items() if (value := file.get(name)) is not None and value not in neutral
    )
    sources = [str(path) if other_directory else FILE] * bool(file) + [_FLAG] * bool(override)
    if not sampling and not unsupported:
        return GenerationConfig(eos_ids, SamplingDefaults())
    defaults = msgspec.convert(sampling, SamplingDefaults)
    return GenerationConfig(eos_ids, replace(defaults, unsupported=unsupported, source=" and ".join(sources)))


def log_line(defaults: SamplingDefaults) -> str | None:
    """The log line about the defaults; None when there are none."""
    if not defaults.source:
        return None
    values = ", ".join(f"{name} {value:g}" for name, value in defaults.specified().items()) or "none"
    ignored = f"; not supported and ignored: {', '.join(defaults.unsupported)}" if defaults.unsupported else ""
    return f"default sampling parameters from {defaults.source}: {values}{ignored} (--generation-config none turns them off)"


def _sampling(fields: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The supported fields under a request's names. Raises UserError that names `source` and the field."""
    found = {name: fields[field] for field, name in SUPPORTED.items() if fields.get(field) is not None}
    try:
        msgspec.convert(found, SamplingDefaults)
    except msgspec.ValidationError as error:
        match = _PLACE.match(str(error))
        assert match is not None, "msgspec names the field"
        field = next(field for field, name in SUPPORTED.items() if name == match[2])
        text = match[1][0].lower() + match[1][1:]
        raise UserError(f"{source}: field {field!r}: {text}, not {fields[field]!r}") from None
    return found


def _ids(value: Any, path: Path) -> tuple[int, ...]:
    values = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(token) is int and token >= 0 for token in values):
        raise UserError(f"{path}: field 'eos_token_id' must hold token ids, not {value!r}")
    return tuple(values)
