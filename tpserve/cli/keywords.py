"""Converts the keyword arguments of `LLM` to `Flags`: the flags in snake_case, errors in Python's words. Pure.

A keyword that only a server can honour is refused by name, never ignored.
"""

import difflib
import os
import re
from collections.abc import Mapping
from typing import Any

from tpserve.cli import vllm
from tpserve.cli.command import raise_all
from tpserve.cli.option import OPTIONS, Option
from tpserve.cli.other_servers import EQUIVALENT_FLAGS
from tpserve.cli.server_flags import CommandLine
from tpserve.config.flags import HTTP, LAUNCH, Flags
from tpserve.errors import UserError

_SERVER_ONLY = frozenset({"served_model_name", "max_queued_requests", "drain_timeout", "config"})
"""Flags outside the HTTP and launch groups that `LLM` does not have."""


def read_kwargs(kwargs: Mapping[str, Any]) -> CommandLine:
    """Check keyword arguments; None is the same as leaving a keyword out. Raises one UserError that names every mistake."""
    values: dict[str, Any] = {}
    accepted: list[vllm.GivenVllmFlag] = []
    errors: list[UserError] = []
    for name, value in map(_rename, kwargs, kwargs.values()):
        given = vllm.from_keyword(name, value)
        try:
            if given is None and not _is_noop(name, value):
                values[name] = _read_value(_option(name), value)
        except UserError as error:
            errors.append(error)
        if given is not None and given.is_accepted:
            accepted += [given] * (value is not None and value is not False)
        elif given is not None and value is not None:
            errors.append(UserError(_ray(value) or given.refusal(), param=name))
    if (replicas := values.get("data_parallel_size", 1)) > 1:
        errors.append(_replicas(replicas))
    raise_all(errors)
    return CommandLine(Flags(**values), vllm.accepted_line(accepted))


def _is_noop(name: str, value: Any) -> bool:
    """Whether the keyword is None, or turns off a feature that only the server has."""
    option = OPTIONS.get(name)
    return option is not None and (value is None or (value is False and not _is_for_llm(option)))


def _rename(name: str, value: Any) -> tuple[str, Any]:
    """The keyword with tpserve's name, and its value in tpserve's unit."""
    if (renamed := vllm.MAPPED.get(_flag(name))) is not None and type(value) is int:
        return _keyword(renamed), value / (1 << 30)
    if name in _OFF_ALIASES and isinstance(value, bool):
        return _OFF_ALIASES[name], not value
    return _ALIASES.get(name, name), value


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _keyword(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_")


_OFF_ALIASES = {_keyword(alias): option.name for option in OPTIONS.values() for alias in option.about.off_aliases}
_ALIASES = {_keyword(alias): option.name for option in OPTIONS.values() for alias in option.about.aliases}


def _replicas(number: int) -> UserError:
    return UserError(
        f"data_parallel_size={number} is not supported: start one script per replica, each with its own CUDA_VISIBLE_DEVICES and "
        "its share of the prompts",
        param="data_parallel_size",
    )


def _ray(value: Any) -> str:
    """The error text for the executor backend "ray"; empty for any other `value`."""
    if value != "ray":
        return ""
    return (
        "distributed_executor_backend='ray': tpserve needs no Ray cluster; leave it out, and for several nodes start the script "
        "with `torchrun --nnodes N --node_rank I --nproc_per_node M --master_addr HEAD` on each"
    )


def _option(name: str) -> Option:
    option = OPTIONS.get(name)
    if option is None:
        candidates = [other for other in OPTIONS if _is_for_llm(OPTIONS[other])]
        close = difflib.get_close_matches(name, candidates, n=1, cutoff=0.6)
        equivalent = _keyword(re.split("[ :,]", EQUIVALENT_FLAGS.get(_flag(name), ""))[0])
        if equivalent in candidates:
            close = [equivalent]
        hint = f": did you mean {close[0]}?" if close else ": docs/flags.md lists them all"
        raise UserError(f"unknown keyword {name}{hint}", param=name)
    if not _is_for_llm(option):
        raise UserError(f"{name} is only for `tpserve serve`, not for LLM: leave it out", param=name)
    return option


def _is_for_llm(option: Option) -> bool:
    return option.about.group not in (HTTP, LAUNCH) and option.name not in _SERVER_ONLY


def _read_value(option: Option, value: Any) -> Any:
    """The checked value. It goes through the command line's text, so that there is one set of bounds."""
    if option.kind is bool or isinstance(value, bool):
        if option.kind is not bool or not isinstance(value, bool):
            kind = "True or False" if option.kind is bool else "no switch"
            raise UserError(f"{option.name} must be {kind}, not {value!r}", param=option.name)
        return value
    return option.read(os.fspath(value) if isinstance(value, os.PathLike) else option.text(value), option.name)
