"""The server's command lines to `Flags` and back. No environment and no machine is looked at, nothing is printed; of files only
the one that --config names is read.

Owns the order of strength, command line before environment before file, and what is said of Ray; `vllm` knows vLLM's flags, and
`command` reads ours.
"""

import shlex
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from tpserve.cli import config_file, vllm
from tpserve.cli.command import HelpWanted, dashes, described, nearest, read, refuse_all, unknown, wants_help
from tpserve.cli.option import OPTIONS, Option
from tpserve.config.schema import LAUNCH, SECRETS, Flags, WrongValue
from tpserve.errors import UserError

USAGE = """usage: tpserve serve [MODEL] [flags]
       torchrun --nproc-per-node N -m tpserve [MODEL] [flags]
       torchrun --nnodes 2 --node_rank I --nproc_per_node N --master_addr HEAD -m tpserve [MODEL] [flags]
       tpserve plan MODEL --gpus N --gpu-memory 80GB [--help]
       tpserve bench latency|throughput|serve|step [--help]
       tpserve doctor | status | report [--help]
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
"""Flags of the days of Ray, and whether a value follows."""


class CommandLine(NamedTuple):
    """What a command line means. `holding`: what of vLLM's it asks for that is so anyway, in one line; empty without any."""

    flags: Flags
    holding: str


def parse(argv: Sequence[str], overrides: Mapping[str, str] | None = None, *, launch: bool = True) -> Flags:
    """The flags of `read_line`."""
    return read_line(argv, overrides, launch=launch).flags


def read_line(argv: Sequence[str], overrides: Mapping[str, str] | None = None, *, launch: bool = True) -> CommandLine:
    """Read a command line. `overrides` (flag name to text, of the environment) are weaker, a --config file is weaker still.
    `launch`: the flags of `tpserve serve` are allowed.

    Raises UserError with all that cannot be honoured, or HelpWanted for `--help`.
    """
    argv = dashes(argv)
    if wants_help(argv):
        raise HelpWanted(help_text())
    line = _read(argv)
    wrong, holding = line.wrong, line.holding
    environ = _overridden(overrides or {}, wrong)
    path = line.values.get("config") or environ.get("config")
    file = _SplitLine({}, [], [])
    if path is not None:
        try:
            file = _read(dashes(config_file.argv_of(path)))
        except UserError as error:
            file.wrong.append(error)
        wrong += [UserError(f"--config {path}: {error}", param=error.param) for error in file.wrong]
        holding += file.holding
    said = {**file.values, **environ, **line.values}
    if not launch:
        wrong += [_only_serve(OPTIONS[name]) for name in said if OPTIONS[name].about.group == LAUNCH]
    if (replicas := said.get("data_parallel_size", 1)) > 1:
        wrong.append(_replicas(replicas))
    refuse_all(wrong)
    return CommandLine(Flags(**said), vllm.holding_line(holding))


class _SplitLine(NamedTuple):
    """One command line, or a file of one: values by field name, mistakes, and what of vLLM's holds anyway."""

    values: dict[str, Any]
    wrong: list[UserError]
    holding: list[vllm.GivenVllmFlag]


def _read(argv: Sequence[str]) -> _SplitLine:
    try:
        ours = vllm.translate(argv)
    except WrongValue as what:
        raise UserError(f"--kv-cache-memory-bytes must be {what}", param="kv_cache_memory") from None
    ray, plain = _split_ray(ours.argv)
    said = read(plain, OPTIONS)
    wrong = [UserError(given.refusal(), param=given.flag) for given in ours.refused if not _is_ray(given)]
    if ray or any(map(_is_ray, ours.refused)):
        names = [*ray, *(f"{given.said} ray" for given in ours.refused if _is_ray(given))]
        wrong.append(
            UserError(f"{', '.join(names)} {'belong' if names[1:] else 'belongs'} to Ray: {_instead(plain, ray)}", param=names[0])
        )
    unknown_flags = [unknown(arg, OPTIONS, _OTHERS, _SEE) for arg in said.rest if arg.startswith("-")]
    wrong += [*said.wrong, *unknown_flags]
    values = said.values
    if said.rest and not unknown_flags:  # what follows an unknown flag may be its value
        positional, *more = said.rest
        wrong += [_unexpected(arg, positional) for arg in more]
        if values.setdefault("model", positional) != positional:
            two = f"two models given, {positional!r} and --model {values['model']!r}: give one"
            wrong.append(UserError(two, param="model"))
    return _SplitLine(values, wrong, ours.holding)


def to_argv(flags: Flags) -> list[str]:
    """The command line of a rank that `tpserve serve` starts: all that was said, without launch flags and the keys."""
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
    """All flags in their groups."""
    ends = "\n  --help, -h\n  --version\n\nEach flag can also be given as TPSERVE_ARG_<NAME>, or in the file of --config.\n"
    ends += "The command line is stronger than the environment, and the environment than the file."
    return "\n".join([USAGE, *described(OPTIONS.values()), ends])


def _overridden(overrides: Mapping[str, str], wrong: list[UserError]) -> dict[str, Any]:
    result = {}
    for name, text in overrides.items():
        variable = f"the environment variable TPSERVE_ARG_{name.upper()}"
        option: Option | None = OPTIONS.get(name)
        try:
            if option is None:
                flag = "--" + name.replace("_", "-")
                raise UserError(f"{variable} names no flag{nearest(flag, OPTIONS, _OTHERS) or f': {_SEE}'}", param=name)
            result[name] = option.read(text, variable)
        except UserError as error:
            wrong.append(error)
    return result


def _unexpected(arg: str, model: str) -> UserError:
    return UserError(f"unexpected argument {arg!r}: the model is {model!r} already, and everything else is a --flag")


def _only_serve(option: Option) -> UserError:
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
    """The flags of Ray with their values, and the rest."""
    found, plain, rest = dict[str, str](), [], list(argv)
    while rest:
        flag, equals, value = (arg := rest.pop(0)).partition("=")
        if flag not in RAY:
            plain.append(arg)
        else:
            found[flag] = value if equals or not RAY[flag] or not rest else rest.pop(0)
    return found, plain


def _instead(plain: Sequence[str], ray: Mapping[str, str]) -> str:
    ranks = ["--nproc-per-node", ray["--num-gpus"]] if ray.get("--num-gpus", "").isdecimal() else []
    nodes = "" if "--nnodes" in plain else ", on several nodes with `--nnodes N --node-rank I --master-addr HEAD` added on each"
    return f"tpserve needs no Ray cluster; run `{shlex.join(['tpserve', 'serve', *plain, *ranks])}`{nodes}"
