"""What a running server may take over when it reloads: which flags, and which checkpoints. Pure.

Every flag is in `RELOADABLE` or is refused with the reason of `fixed_because`. New weights have the shape of the old ones, so
that layouts, requests and the tokenizer of the frontend stay what they are.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import msgspec
from msgspec import Struct
from msgspec.structs import asdict, fields

from tpserve.config.engine_config import EngineConfig
from tpserve.config.flags import ENGINE, HTTP, LAUNCH, LAYOUT, MODEL, SECRETS, Flags
from tpserve.errors import UserError
from tpserve.types.machine import Machine
from tpserve.types.model_spec import ModelSpec

RELOADABLE = frozenset((
    "model", "revision", "tokenizer", "tokenizer_revision", "download_dir", "generation_config", "override_generation_config",
    "dtype", "quantization", "load_format", "seed", "verify_weights", "enforce_eager", "binding", "max_model_len", "max_num_seqs",
    "max_num_batched_tokens", "kv_cache_dtype", "enable_prefix_caching", "gpu_memory_utilization", "kv_cache_memory",
    "num_gpu_blocks_override", "max_queued_requests", "request_timeout", "log_level", "start_timeout", "drain_timeout",
    "recovery_timeout", "step_trace",
))  # fmt: skip
_FRONTEND = "belongs to the frontend, which keeps its clients' connections"
_FIXED = {
    LAYOUT: "decides how the ranks are arranged",
    LAUNCH: "decides how the ranks are arranged",
    HTTP: _FRONTEND,
    MODEL: _FRONTEND,
    ENGINE: "decides how the frontend counts",
}


class Launched(Struct, frozen=True):
    """What a server was started with, or has been reloaded to: its flags, its model, and where it runs."""

    flags: Flags
    spec: ModelSpec
    machine: Machine


class FrontendJob(Struct, frozen=True):
    """The stdin of a frontend in JSON. `launched`: None where nobody starts ranks again with other flags."""

    config: EngineConfig
    launched: Launched | None = None


class Candidate(Struct, frozen=True):
    """A configuration that ranks may try. `changes`: every flag that differs from the start's, by field name.

    `new_weights`: the model's files are others.
    """

    changes: dict[str, Any]
    launched: Launched
    config: EngineConfig
    new_weights: bool = False


class RankConfiguration(NamedTuple):
    """With which configuration a rank comes: its number, 0 for the flags of the start, and why it cannot start with that one.

    `may_fail`: another one may come back, so that an error is no reason to end.
    """

    number: int = 0
    refused: str = ""
    may_fail: bool = False


class ReloadQuestion(Struct, frozen=True):
    """What `tpserve.reload_check` reads: the present state, and the flags that shall change, as an operator gave them."""

    present: Candidate
    values: dict[str, Any]


class ReloadVerdict(Struct, frozen=True):
    """What it answers: a candidate, or the error for the operator."""

    candidate: Candidate | None = None
    error: str = ""
    param: str | None = None


def with_changes(flags: Flags, changes: Mapping[str, Any]) -> Flags:
    """The flags with some of them changed."""
    return msgspec.convert(msgspec.to_builtins(flags) | dict(changes), Flags)


def fixed_because(name: str, group: str) -> str:
    """Why the flag cannot change in a running server; empty when it can."""
    if name in RELOADABLE:
        return ""
    why = "is a secret, and those are read when the server starts" if name in SECRETS else _FIXED.get(group)
    return why or "is what the nodes have agreed on when they met"


def check_same_shape(old: ModelSpec, new: ModelSpec) -> None:
    """UserError that names how a checkpoint differs from the one that is served, other than by the type of its numbers."""
    before, after = asdict(old), asdict(new)
    names = [field.name for field in fields(ModelSpec) if field.name != "dtype" and before[field.name] != after[field.name]]
    if names:
        differences = ", ".join(f"{name} {_shown(after[name])} and not {_shown(before[name])}" for name in names)
        raise UserError(
            f"the new model has {differences}: a reload takes weights of the same shape and vocabulary; start another server",
            param="model",
        )


def check_durable_answers(present: Candidate, new: Candidate) -> None:
    """UserError when answers that are kept in --state-dir would be continued by another model."""
    if present.config.state_dir is not None and (new.new_weights or present.config.of_answers() != new.config.of_answers()):
        raise UserError(
            "answers in --state-dir are this model's with these flags: only flags that change no answer can be reloaded; start "
            "the server anew with another --state-dir",
            param="state_dir",
        )


def _shown(value: Any) -> str:
    text = str(msgspec.to_builtins(value))
    return text if len(text) <= 60 else text[:60] + "..."
