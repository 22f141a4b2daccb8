"""The entry point: `tpserve COMMAND ...`, and `python -m tpserve` as a rank of torchrun (`rank_main`).

Owns the choice of the command and how an error is printed. Never imports torch. Exit codes: 0 success (a server: drained), 1
failure, 2 an error that the user can fix, 130 interrupted.
"""

import importlib
import logging
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from tpserve.cli import server_flags
from tpserve.cli.command import HelpWanted, wants_help
from tpserve.cli.commands import overview, suggest_command
from tpserve.config import env
from tpserve.errors import EngineFailure, UserError
from tpserve.hub.locate import locate
from tpserve.models.load_config import load_model_config
from tpserve.observe import log
from tpserve.process.process_utils import allow_many_files
from tpserve.version import __version__
from tpserve.wire.curve import Keyring, write_secret

logger = logging.getLogger("tpserve")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit code."""
    argv = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if argv[:1] and argv[0] in COMMANDS:
            return COMMANDS[argv[0]](argv[1:])
        if env.under_torchrun():
            return _deferred("tpserve.rank_main")(argv)
        return _reject(argv)
    except HelpWanted as wanted:
        sys.stdout.write(f"{wanted}\n")
        return 0
    except UserError as error:
        sys.stderr.write(log.user_error(str(error)) + "\n")
        return 2
    except KeyboardInterrupt:
        return 130


def _deferred(module: str, function: str = "run") -> Callable[[list[str]], int]:
    """A function of a module that is imported on the first call."""

    def run(argv: list[str]) -> int:
        return int(getattr(importlib.import_module(module), function)(argv))

    return run


def _serve(argv: list[str]) -> int:
    from tpserve.host.launch import check_launch
    from tpserve.supervisor import serve

    flags, notice = server_flags.read_line(argv, env.overrides())
    check_launch(flags)
    Keyring.open(flags.cluster_secret_file)  # refuse a bad file before waiting for other nodes
    allow_many_files()
    log.setup(flags.log_level, f"n{flags.node_rank} serve", color=env.color(sys.stderr))
    if notice:
        logger.info("%s", notice)
    try:
        flags, files, spec = load_model_config(flags, lambda flags: locate(flags, head=flags.node_rank == 0))
        return serve(flags, files, spec)
    except EngineFailure as error:
        logger.error("%s", error)
        return 1


def _version(argv: list[str]) -> int:
    sys.stdout.write(f"tpserve {__version__}\n")
    return 0


def _help(argv: list[str]) -> int:
    """`tpserve help COMMAND` is `tpserve COMMAND --help`."""
    if not argv or argv[0] in ("help", "version"):
        raise HelpWanted(overview())
    return COMMANDS[argv[0]]([*argv[1:], "--help"]) if argv[0] in COMMANDS else _reject(argv)


def _ray(argv: list[str]) -> int:
    raise UserError(
        "tpserve needs no Ray cluster: run `tpserve serve MODEL`, on several nodes with `--nnodes N --node-rank I --master-addr "
        "HEAD` added on each; `tpserve status` shows what `ray status` would"
    )


def _secret(argv: list[str]) -> int:
    if wants_help(argv):
        raise HelpWanted(
            "usage: tpserve secret FILE\n\nWrites a new secret of 32 random bytes, for --cluster-secret-file on every node."
        )
    if len(argv) != 1 or argv[0].startswith("-"):
        raise UserError("the file is missing: `tpserve secret FILE` writes it; then copy it to every node, readable by you alone")
    write_secret(argv[0])
    sys.stdout.write(f"wrote {argv[0]}: copy it to every node and pass --cluster-secret-file there\n")
    return 0


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "serve": _serve,
    "plan": _deferred("tpserve.planner.command"),
    "doctor": _deferred("tpserve.doctor.command"),
    "bench": _deferred("tpserve.bench.command"),
    "chat": _deferred("tpserve.chat.command"),
    "status": _deferred("tpserve.admin.status"),
    "report": _deferred("tpserve.admin.report"),
    "pause": _deferred("tpserve.admin.control", "pause"),
    "resume": _deferred("tpserve.admin.control", "resume"),
    "abort": _deferred("tpserve.admin.control", "abort"),
    "reset-prefix-cache": _deferred("tpserve.admin.control", "reset_prefix_cache"),
    "template": _deferred("tpserve.template_command"),
    "completion": _deferred("tpserve.completion_command"),
    "secret": _secret,
    "version": _version,
    "help": _help,
    "--version": _version,
    "-v": _version,
    "ray": _ray,
}


def _reject(argv: list[str]) -> int:
    """Neither a command nor a rank: raise an error with the command line that starts a server with these arguments."""
    if argv in (["--help"], ["-h"]) or (not argv and not env.under_slurm()):
        raise HelpWanted(overview())
    if argv and not Path(argv[0]).exists() and (command := suggest_command(argv[0], COMMANDS)):
        raise UserError(f"there is no command {argv[0]}: did you mean `{shlex.join(['tpserve', command, *argv[1:]])}`?")
    server_flags.parse(argv, env.overrides())
    serve = shlex.join(["tpserve", "serve", *argv])
    torchrun = shlex.join(["torchrun", "--nproc-per-node", "2", "-m", "tpserve", *argv])
    if env.under_slurm():
        sbatch = shlex.join(["sbatch", "launch/slurm/tpserve.sbatch", *argv])
        raise UserError(
            f"this is a SLURM task but not a rank of torchrun: run `{sbatch}`, or in a job with one task per node `srun bash -c "
            "'torchrun --nnodes $SLURM_NNODES --node_rank $SLURM_NODEID --nproc_per_node $SLURM_GPUS_ON_NODE "
            f"--master_addr HEAD -m {shlex.join(['tpserve', *argv])}'`"
        )
    raise UserError(
        f"no command, and this process is not a rank of torchrun: run `{serve}` or `{torchrun}`; "
        "`tpserve --help` lists the commands"
    )


if __name__ == "__main__":
    sys.exit(main())
