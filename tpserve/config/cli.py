"""The server's command lines to `Flags` and back. Pure: no file, no environment, no machine is looked at, nothing is printed.

Owns what is said of flags that are known and not served; `command` reads them.
"""

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from tpserve.config.command import HelpWanted, dashes, described, nearest, read, wants_help
from tpserve.config.option import OPTIONS, Option
from tpserve.config.schema import LAUNCH, SECRETS, Flags
from tpserve.config.vllm import why_refused
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

_BACKEND = {"--distributed-executor-backend": True}


def parse(argv: Sequence[str], overrides: Mapping[str, str] | None = None, *, launch: bool = True) -> Flags:
    """Read a command line. `overrides` (flag name to text) are weaker; `launch`: the flags of `tpserve serve` are allowed.

    Raises UserError, or HelpWanted for `--help`.
    """
    argv = dashes(argv)
    if wants_help(argv):
        raise HelpWanted(help_text())
    _refuse_ray(argv)
    for flag in (arg.partition("=")[0] for arg in argv):
        if (why := why_refused(flag)) is not None:
            raise UserError(f"{flag} is refused: {why}", param=flag)
    said, extra = read(argv, OPTIONS, positional=True)
    if extra:
        raise _unexpected(extra[0], said.get("positional"))
    said.update(_overridden(overrides or {}, said))
    positional = said.pop("positional", None)
    if positional is not None and said.setdefault("model", positional) != positional:
        raise UserError(f"two models given, {positional!r} and --model {said['model']!r}: give one", param="model")
    flags = Flags(**said)
    _refuse(flags, argv)
    if not launch and (wrong := [name for name in said if OPTIONS[name].about.group == LAUNCH]):
        raise UserError(f"{OPTIONS[wrong[0]].flag} is for `tpserve serve`: under torchrun only torchrun's own flags launch ranks")
    return flags


def to_argv(flags: Flags) -> list[str]:
    """The command line of a rank that `tpserve serve` starts: all that was said, without launch flags and the keys."""
    argv = []
    for name, option in OPTIONS.items():
        value = getattr(flags, name)
        if value == option.default or name in SECRETS or option.about.group == LAUNCH:
            continue
        if option.kind is bool:
            argv.append(option.flag if value else option.off)
            continue
        texts = value if option.many else [option.text(value)]
        argv += [f"{option.flag}={texts[0]}"] if texts[0].startswith("-") else [option.flag, *texts]
    return argv


def help_text() -> str:
    """All flags in their groups."""
    ends = "\n  --help, -h\n  --version\n\nEach flag can also be given as TPSERVE_ARG_<NAME>; the command line wins."
    return "\n".join([USAGE, *described(OPTIONS.values()), ends])


def _overridden(overrides: Mapping[str, str], said: Mapping[str, Any]) -> dict[str, Any]:
    result = {}
    for name, text in overrides.items():
        variable = f"the environment variable TPSERVE_ARG_{name.upper()}"
        option: Option | None = OPTIONS.get(name)
        if option is None:
            raise UserError(f"{variable} names no flag{_nearest('--' + name.replace('_', '-'))}", param=name)
        if name not in said and not (name == "model" and "positional" in said):
            result[name] = option.read(text, variable)
    return result


def _unexpected(arg: str, model: str | None) -> UserError:
    if arg.startswith("-"):
        flag = arg.partition("=")[0]
        return UserError(f"unknown flag {flag}{_nearest(flag)}", param=flag)
    return UserError(f"unexpected argument {arg!r}: the model is {model!r} already, and everything else is a --flag")


def _nearest(flag: str) -> str:
    return nearest(flag, OPTIONS, ("--help", "--version")) or ": `tpserve serve --help` lists all flags"


def _refuse(flags: Flags, argv: Sequence[str]) -> None:
    """Flags that are understood, and not served."""
    replicas = flags.data_parallel_size
    if replicas > 1:
        raise UserError(
            f"--data-parallel-size {replicas} is not supported: start {replicas} servers, each with its own CUDA_VISIBLE_DEVICES "
            "and --port, and put a load balancer in front",
            param="data_parallel_size",
        )
    if flags.distributed_executor_backend == "ray":
        raise UserError(
            f"--distributed-executor-backend ray: {_instead(_without(argv, _BACKEND))}", param="distributed_executor_backend"
        )


def _refuse_ray(argv: Sequence[str]) -> None:
    for at, arg in enumerate(argv):
        flag, _, value = arg.partition("=")
        if flag not in RAY:
            continue
        rest = _without(argv, RAY | _BACKEND)
        if flag == "--num-gpus":
            value = value or (argv[at + 1] if at + 1 < len(argv) else "")
            rest += ["--nproc-per-node", value] if value.isdecimal() else []
        raise UserError(f"{flag} belongs to Ray: {_instead(rest)}", param=flag)


def _instead(rest: Sequence[str]) -> str:
    nodes = "" if "--nnodes" in rest else ", on several nodes with `--nnodes N --node-rank I --master-addr HEAD` added on each"
    return f"tpserve needs no Ray cluster; run `{shlex.join(['tpserve', 'serve', *rest])}`{nodes}"


def _without(argv: Sequence[str], flags: Mapping[str, bool]) -> list[str]:
    """`argv` without some flags and the values that follow them."""
    result, skip = [], False
    for arg in argv:
        flag = arg.partition("=")[0]
        if skip:
            skip = False
        elif flag in flags:
            skip = flags[flag] and "=" not in arg
        else:
            result.append(arg)
    return result
