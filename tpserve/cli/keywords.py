"""Keyword arguments of a Python caller to `Flags`: the flags in snake_case. Pure, as `cli` is, and in the words of Python.

What only a server can honour is refused by name, never ignored.
"""

import difflib
import os
import re
from collections.abc import Mapping
from typing import Any

from tpserve.cli import vllm
from tpserve.cli.command import refuse_all
from tpserve.cli.option import OPTIONS, Option
from tpserve.cli.other_servers import MEANT
from tpserve.cli.server_flags import CommandLine
from tpserve.config.schema import HTTP, LAUNCH, Flags
from tpserve.errors import UserError

_SERVING = frozenset({"served_model_name", "max_queued_requests", "drain_timeout", "config"})
"""What has a meaning for clients only, or on a command line."""


def read(said: Mapping[str, Any]) -> Flags:
    """Check keyword arguments; None means "not said". Raises UserError that names every keyword that cannot be honoured."""
    return read_all(said).flags


def read_all(said: Mapping[str, Any]) -> CommandLine:
    """The same, and what of vLLM's the caller asks for that is so anyway."""
    values: dict[str, Any] = {}
    holding: list[vllm.GivenVllmFlag] = []
    wrong: list[UserError] = []
    for name, value in map(_renamed, said, said.values()):
        given = vllm.of_keyword(name, value)
        try:
            if given is None and not _asks_nothing(name, value):
                values[name] = _value(_option(name), value)
        except UserError as error:
            wrong.append(error)
        if given is not None and given.holds:
            holding += [given] * (value is not None and value is not False)
        elif given is not None and value is not None:
            wrong.append(UserError(_ray(value) or given.refusal(), param=name))
    if (replicas := values.get("data_parallel_size", 1)) > 1:
        wrong.append(_replicas(replicas))
    refuse_all(wrong)
    return CommandLine(Flags(**values), vllm.holding_line(holding))


def _asks_nothing(name: str, value: Any) -> bool:
    """Whether it is not said, or turns off what only a server has."""
    option = OPTIONS.get(name)
    return option is not None and (value is None or (value is False and not _offered(option)))


def _renamed(name: str, value: Any) -> tuple[str, Any]:
    """A keyword by tpserve's name."""
    if (ours := vllm.MAPPED.get(_flag(name))) is not None and type(value) is int:
        return _keyword(ours), value / (1 << 30)
    if name in _ALSO_OFF and isinstance(value, bool):
        return _ALSO_OFF[name], not value
    return _ALSO.get(name, name), value


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _keyword(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_")


_ALSO_OFF = {_keyword(other): option.name for option in OPTIONS.values() for other in option.about.also_off}
_ALSO = {_keyword(other): option.name for option in OPTIONS.values() for other in option.about.also}


def _replicas(number: int) -> UserError:
    return UserError(
        f"data_parallel_size={number} is not supported: start one script per replica, each with its own CUDA_VISIBLE_DEVICES and "
        "its share of the prompts",
        param="data_parallel_size",
    )


def _ray(value: Any) -> str:
    """What to say of Ray, where that is the `value`; else nothing."""
    if value != "ray":
        return ""
    return (
        "distributed_executor_backend='ray': tpserve needs no Ray cluster; leave it out, and for several nodes start the script "
        "with `torchrun --nnodes N --node_rank I --nproc_per_node M --master_addr HEAD` on each"
    )


def _option(name: str) -> Option:
    option = OPTIONS.get(name)
    if option is None:
        near = difflib.get_close_matches(name, [known for known in OPTIONS if _offered(OPTIONS[known])], n=1, cutoff=0.6)
        meant = _keyword(re.split("[ :,]", MEANT.get(_flag(name), ""))[0])
        if meant in OPTIONS and _offered(OPTIONS[meant]):
            near = [meant]
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
