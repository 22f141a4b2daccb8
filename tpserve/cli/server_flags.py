"""Converts the server's command lines to `Flags` and back.

Owns the precedence (command line, then environment, then --config file) and the errors about Ray's flags. `vllm` knows vLLM's
flags, `command` parses tpserve's. Reads no file but that of --config, never the environment, and prints nothing.
"""

import shlex
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from tpserve.cli import config_file, vllm
from tpserve.cli.command import (
    HelpWanted,
    did_you_mean,
    help_lines,
    normalize_dashes,
    raise_all,
    read_flags,
    unknown_flag,
    wants_help,
)
from tpserve.cli.option import OPTIONS, Option
from tpserve.config.flags import LAUNCH, SECRETS, Flags, WrongValue
from tpserve.errors import UserError

USAGE = """usage: tpserve serve [MODEL] [flags]
       torchrun --nproc-per-node N -m tpserve [MODEL] [flags]
       torchrun --nnodes 2 --node_rank I --nproc_per_node N --master_addr HEAD -m tpserve [MODEL] [flags]
       tpserve plan MODEL --gpus N --gpu-memory 80GB [--help]
       tpserve bench latency|throughput|serve|step [--help]
       tpserve doctor | status | report | template [--help]
       tpserve secret FILE

Serves MODEL (a directory or a repository id ORG/NAME; without it a small built-in model) over HTTP with the OpenAI API."""

RAY = {
    "--worker-use-ray": False,
    "--engine-use-ray": False,
    "--ray-workers-use-nsight": False,
    "--ray-address": True,
    "--ray-num-nodes": True,
    "--num-gpus": True,
    "--num-gpus-per-worker": True,
    "--placement-group": True,
}
"""Flags of vLLM's Ray executor -> whether a value follows."""


class CommandLine(NamedTuple):
    """A parsed command line. `notice`: a log line about accepted vLLM flags; empty without any."""

    flags: Flags
    notice: str


def parse(argv: Sequence[str], overrides: Mapping[str, str] | None = None, *, launch: bool = True) -> Flags:
    """The flags of `read_line`."""
    return read_line(argv, overrides, launch=launch).flags


def read_line(argv: Sequence[str], overrides: Mapping[str, str] | None = None, *, launch: bool = True) -> CommandLine:
    """Read a command line. Precedence: `argv`, `overrides` (flag name -> text, from the environment), the --config file.

    `launch`: allow the flags that only `tpserve serve` has. Raises one UserError with every mistake, or HelpWanted for `--help`.
    """
    argv = normalize_dashes(argv)
    if wants_help(argv):
        raise HelpWanted(help_text())
    line = _parse_line(argv)
    errors, accepted = line.errors, line.accepted
    environ = _read_overrides(overrides or {}, errors)
    path = line.values.get("config") or environ.get("config")
    file = _ParsedLine({}, [], [])
    if path is not None:
        try:
            file = _parse_line(normalize_dashes(config_file.argv_of(path)))
        except UserError as error:
            file.errors.append(error)
        errors += [UserError(f"--config {path}: {error}", param=error.param) for error in file.errors]
        accepted += file.accepted
    values = {**file.values, **environ, **line.values}
    if not launch:
        errors += [_serve_only(OPTIONS[name]) for name in values if OPTIONS[name].about.group == LAUNCH]
    if (replicas := values.get("data_parallel_size", 1)) > 1:
        errors.append(_replicas(replicas))
    raise_all(errors)
    return CommandLine(Flags(**values), vllm.accepted_line(accepted))


class _ParsedLine(NamedTuple):
    """One command line or --config file: values by field name, errors, and accepted vLLM flags."""

    values: dict[str, Any]
    errors: list[UserError]
    accepted: list[vllm.GivenVllmFlag]


def _parse_line(argv: Sequence[str]) -> _ParsedLine:
    try:
        translation = vllm.translate(argv)
    except WrongValue as what:
        raise UserError(f"--kv-cache-memory-bytes must be {what}", param="kv_cache_memory") from None
    ray, plain = _split_ray(translation.argv)
    parsed = read_flags(plain, OPTIONS)
    errors = [UserError(given.refusal(), param=given.flag) for given in translation.refused if not _is_ray(given)]
    if ray or any(map(_is_ray, translation.refused)):
        names = [*ray, *(f"{given.spelling} ray" for given in translation.refused if _is_ray(given))]
        errors.append(
            UserError(f"{', '.join(names)} {'belong' if names[1:] else 'belongs'} to Ray: {_instead(plain, ray)}", param=names[0])
        )
    unknown_flags = [unknown_flag(arg, OPTIONS, _OTHERS, _SEE) for arg in parsed.rest if arg.startswith("-")]
    errors += [*parsed.errors, *unknown_flags]
    values = parsed.values
    if parsed.rest and not unknown_flags:  # an argument after an unknown flag may be its value
        positional, *more = parsed.rest
        errors += [_unexpected(arg, positional) for arg in more]
        if values.setdefault("model", positional) != positional:
            two = f"two models given, {positional!r} and --model {values['model']!r}: give one"
            errors.append(UserError(two, param="model"))
    return _ParsedLine(values, errors, translation.accepted)


def to_argv(flags: Flags) -> list[str]:
    """The command line of a rank that `tpserve serve` starts: every flag whose value is not the default, except launch
    flags, keys and --config."""
    argv = []
    for name, option in OPTIONS.items():
        value = getattr(flags, name)
        if value == option.default or name in (*SECRETS, "config") or option.about.group == LAUNCH:
            continue
        if option.kind is bool:
            argv.append(option.flag if value else option.off)
            continue
        texts = value if option.many else [option.text(value)]
        argv += [f"{option.flag}={texts[0]}"] if texts[0].startswith("-") else [option.flag, *texts]
    return argv


_OTHERS = ("--help", "--version")
_SEE = "`tpserve serve --help` lists all flags"


def help_text() -> str:
    """The text of `tpserve serve --help`."""
    footer = "\n  --help, -h\n  --version\n\nEach flag can also be given as TPSERVE_ARG_<NAME>, or in the file of --config.\n"
    footer += "The command line wins over the environment, and the environment over the file."
    return "\n".join([USAGE, *help_lines(OPTIONS.values()), footer])


def _read_overrides(overrides: Mapping[str, str], errors: list[UserError]) -> dict[str, Any]:
    """Values from environment variables; mistakes are appended to `errors`."""
    result = {}
    for name, text in overrides.items():
        variable = f"the environment variable TPSERVE_ARG_{name.upper()}"
        option: Option | None = OPTIONS.get(name)
        try:
            if option is None:
                flag = "--" + name.replace("_", "-")
                raise UserError(f"{variable} names no flag{did_you_mean(flag, OPTIONS, _OTHERS) or f': {_SEE}'}", param=name)
            result[name] = option.read(text, variable)
        except UserError as error:
            errors.append(error)
    return result


def _unexpected(arg: str, model: str) -> UserError:
    return UserError(f"unexpected argument {arg!r}: the model is {model!r} already, and everything else is a --flag")


def _serve_only(option: Option) -> UserError:
    text = f"{option.flag} is for `tpserve serve`: under torchrun only torchrun's own flags launch ranks"
    return UserError(text, param=option.name)


def _replicas(number: int) -> UserError:
    return UserError(
        f"--data-parallel-size {number} is not supported: start {number} servers, each with its own CUDA_VISIBLE_DEVICES "
        "and --port, and put a load balancer in front",
        param="data_parallel_size",
    )


def _is_ray(given: vllm.GivenVllmFlag) -> bool:
    return given.flag == "--distributed-executor-backend" and given.value == "ray"


def _split_ray(argv: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Ray's flags with their values, and the other arguments."""
    ray, plain, rest = dict[str, str](), [], list(argv)
    while rest:
        flag, equals, value = (arg := rest.pop(0)).partition("=")
        if flag not in RAY:
            plain.append(arg)
        else:
            ray[flag] = value if equals or not RAY[flag] or not rest else rest.pop(0)
    return ray, plain


def _instead(plain: Sequence[str], ray: Mapping[str, str]) -> str:
    ranks = ["--nproc-per-node", ray["--num-gpus"]] if ray.get("--num-gpus", "").isdecimal() else []
    nodes = "" if "--nnodes" in plain else ", on several nodes with `--nnodes N --node-rank I --master-addr HEAD` added on each"
    return f"tpserve needs no Ray cluster; run `{shlex.join(['tpserve', 'serve', *plain, *ranks])}`{nodes}"
