"""Keyword arguments of a Python caller to `Flags`: the flags in snake_case. Pure, as `cli` is, and in the words of Python.

What only a server can honour is refused by name, never ignored.
"""

import difflib
import os
from collections.abc import Mapping
from typing import Any

from tpserve.config.option import OPTIONS, Option
from tpserve.config.schema import HTTP, LAUNCH, Flags
from tpserve.config.vllm import asks_nothing, why_refused
from tpserve.errors import UserError

_SERVING = frozenset({"served_model_name", "max_queued_requests", "drain_timeout"})
"""What has a meaning for clients only."""


def read(said: Mapping[str, Any]) -> Flags:
    """Check keyword arguments; None means "not said". Raises UserError that names the keyword."""
    values = {name: _value(_option(name), value) for name, value in said.items() if not _asks_nothing(name, value)}
    flags = Flags(**values)
    if flags.data_parallel_size > 1:
        raise UserError(
            f"data_parallel_size={flags.data_parallel_size} is not supported: start one script per replica, each with its own "
            "CUDA_VISIBLE_DEVICES and its share of the prompts",
            param="data_parallel_size",
        )
    if flags.distributed_executor_backend == "ray":
        raise UserError(
            "distributed_executor_backend='ray': tpserve needs no Ray cluster; leave it out, and for several nodes start the "
            "script with `torchrun --nnodes N --node_rank I --nproc_per_node M --master_addr HEAD` on each",
            param="distributed_executor_backend",
        )
    return flags


def _asks_nothing(name: str, value: Any) -> bool:
    """Whether a caller spells out that something of vLLM's is not wanted, such as `trust_remote_code=False`."""
    flag = "--" + name.replace("_", "-")
    return (value is None and (name in OPTIONS or why_refused(flag) is not None)) or (value is False and asks_nothing(flag))


def _option(name: str) -> Option:
    option = OPTIONS.get(name)
    if (why := why_refused("--" + name.replace("_", "-"))) is not None:
        raise UserError(f"{name} is refused: {why}", param=name)
    if option is None:
        near = difflib.get_close_matches(name, [known for known in OPTIONS if _offered(OPTIONS[known])], n=1, cutoff=0.6)
        hint = f": did you mean {near[0]}?" if near else ": docs/flags.md lists them all"
        raise UserError(f"unknown keyword {name}{hint}", param=name)
    if not _offered(option):
        raise UserError(f"{name} is for `tpserve serve`, an LLM has no use for it: leave it out", param=name)
    return option


def _offered(option: Option) -> bool:
    return option.about.group not in (HTTP, LAUNCH) and option.name not in _SERVING


def _value(option: Option, value: Any) -> Any:
    """Through the text that a command line would have, so that there is one set of bounds."""
    if option.kind is bool or isinstance(value, bool):
        if option.kind is not bool or not isinstance(value, bool):
            kind = "True or False" if option.kind is bool else "no switch"
            raise UserError(f"{option.name} must be {kind}, not {value!r}", param=option.name)
        return value
    return option.read(os.fspath(value) if isinstance(value, os.PathLike) else option.text(value), option.name)
