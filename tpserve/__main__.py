"""Where every command starts: those of `COMMANDS` after `tpserve`, and `python -m tpserve` as a rank of torchrun.

Owns which of them this process is, and the last line of an error. Never imports torch itself: a rank reads its flags,
checks the layout and finds the frontend first, so that whatever can be refused is refused within a moment, and the HTTP
port is open while torch loads. Exit codes: 0 after a drain, 1 failure, 2 something the user can mend.
"""

import difflib
import gc
import json
import logging
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tpserve.config import cli, env, machine
from tpserve.config.command import HelpWanted, wants_help
from tpserve.config.network import Interface, choose, kernel_ports
from tpserve.config.resolve import resolve
from tpserve.config.schema import EngineConfig, Flags
from tpserve.config.vllm import means_nothing
from tpserve.errors import EngineFailure, UserError
from tpserve.hub.locate import locate
from tpserve.models.opened import open_model
from tpserve.observe import log
from tpserve.observe.stopwatch import Stopwatch
from tpserve.types.model_files import ModelFiles
from tpserve.version import __version__
from tpserve.wire.attach import Failure, attach, write_failure
from tpserve.wire.auth import Keyring, write_secret
from tpserve.wire.lifetime import allow_many_files, die_with
from tpserve.wire.siblings import Elder, ask
from tpserve.wire.signals import block_signals

logger = logging.getLogger("tpserve")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit code."""
    argv = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if argv[:1] == ["--version"]:
            sys.stdout.write(f"tpserve {__version__}\n")
            return 0
        if argv[:1] and argv[0] in COMMANDS:
            return COMMANDS[argv[0]](argv[1:])
        if env.under_torchrun():
            return _rank(argv)
        return _neither(argv)
    except HelpWanted as wanted:
        sys.stdout.write(f"{wanted}\n")
        return 0
    except UserError as error:
        sys.stderr.write(log.user_error(str(error)) + "\n")
        return 2
    except KeyboardInterrupt:
        return 130


def _serve(argv: list[str]) -> int:
    from tpserve.config.launch import check_launch
    from tpserve.supervisor import serve

    flags = cli.parse(argv, env.overrides())
    check_launch(flags)
    _check_secret(flags)
    allow_many_files()
    log.setup(flags.log_level, f"n{flags.node_rank} serve")
    try:
        flags, files, spec = open_model(flags, lambda flags: locate(flags, head=flags.node_rank == 0))
        return serve(flags, files, spec)
    except EngineFailure as error:
        logger.error("%s", error)
        return 1


def _bench(argv: list[str]) -> int:
    from tpserve.bench.command import run

    return run(argv)


def _plan(argv: list[str]) -> int:
    from tpserve.planner.command import run

    return run(argv)


def _status(argv: list[str]) -> int:
    from tpserve.admin.status import run

    return run(argv)


def _report(argv: list[str]) -> int:
    from tpserve.admin.report import run

    return run(argv)


def _doctor(argv: list[str]) -> int:
    from tpserve.doctor.command import run

    return run(argv)


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
        raise UserError("say where to write it: `tpserve secret FILE`; then copy the file to every node, readable by you alone")
    write_secret(argv[0])
    sys.stdout.write(f"wrote {argv[0]}: copy it to every node and pass --cluster-secret-file there\n")
    return 0


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "serve": _serve,
    "bench": _bench,
    "plan": _plan,
    "doctor": _doctor,
    "status": _status,
    "report": _report,
    "secret": _secret,
    "ray": _ray,
}


def _neither(argv: list[str]) -> int:
    """No torchrun, no command: say how it is done with what was given."""
    near = difflib.get_close_matches(argv[0].lower(), COMMANDS, n=1) if argv else []
    if near and not Path(argv[0]).exists():
        raise UserError(f"there is no command {argv[0]}: did you mean `{shlex.join(['tpserve', near[0], *argv[1:]])}`?")
    cli.parse(argv, env.overrides())
    torchrun = shlex.join(["torchrun", "--nproc-per-node", "2", "-m", "tpserve", *argv])
    if env.under_slurm():
        raise UserError(
            f"a task of SLURM, but not a rank of torchrun: run `{shlex.join(['sbatch', 'launch/slurm/tpserve.sbatch', *argv])}`, "
            "or in a job with one task a node `srun bash -c 'torchrun --nnodes $SLURM_NNODES --node_rank $SLURM_NODEID "
            f"--nproc_per_node $SLURM_GPUS_ON_NODE --master_addr HEAD -m {shlex.join(['tpserve', *argv])}'`"
        )
    raise UserError(
        f"neither `tpserve serve` nor a rank of torchrun: run `{shlex.join(['tpserve', 'serve', *argv])}` or `{torchrun}`; "
        "`tpserve --help` lists the commands"
    )


def _find_once_a_node(me: env.RankEnv, flags: Flags) -> ModelFiles:
    """Only the first rank of a node looks for what is no directory; the others ask it, and all mean the same commit."""
    head = me.rank == 0 and me.runtime_dir is None
    assert flags.model is not None
    if me.local_world_size == 1 or Path(flags.model).is_dir():
        return locate(flags, head=head)
    if me.local_rank:
        return ask(me, flags.start_timeout)
    elder = Elder(me)
    try:
        files = locate(flags, head=head)
    except UserError as error:
        elder.refuse(str(error))
        raise
    elder.tell(files)
    return files


def _check_secret(flags: Flags) -> None:
    """Now, and not once other nodes have been waited for."""
    if flags.cluster_secret_file is not None:
        Keyring.read(flags.cluster_secret_file)


def _rank(argv: list[str]) -> int:
    """One of torchrun's ranks. What ends it before the coordinator knows it, the frontend reads from the runtime directory."""
    block_signals()
    allow_many_files()
    me = env.rank_env()
    try:
        return _live_as(me, argv)
    except (HelpWanted, UserError):
        raise
    except Exception as error:  # the edge of the process
        why = str(error) if isinstance(error, EngineFailure) else f"{type(error).__name__}: {error}"
        logger.error("rank %d fails: %s", me.rank, why)
        logger.debug("rank %d fails", me.rank, exc_info=True)
        _leave_word(me, Failure(1, f"rank {me.rank} (pid {os.getpid()}): {why}"))
        return 1


def _leave_word(me: env.RankEnv, failure: Failure) -> None:
    """For the frontend, which does not know of this rank yet and will only see its agent end."""
    if me.node_rank == 0 and me.runtime_dir is not None:
        write_failure(Path(me.runtime_dir), failure)


def _live_as(me: env.RankEnv, argv: list[str]) -> int:
    watch = Stopwatch(me.agent_pid)
    die_with(me.agent_pid)
    try:
        flags = cli.parse(argv, env.overrides(), launch=False)
        _check_secret(flags)
        log.setup(flags.log_level, f"n{me.node_rank} r{me.rank}", lead=me.local_rank == 0)
        flags, files, spec = open_model(flags, lambda flags: _find_once_a_node(me, flags))
        config = resolve(flags, files, spec, machine.of_rank(me))
        interface = _interface(me, config)
    except UserError as error:
        return _refuse(me, error, tell=me.local_rank == 0)
    except HelpWanted:
        if me.local_rank:
            return 0
        raise
    log.setup(config.log_level, log.rank_prefix(me.node_rank, me.rank, config.layout.stage_of(me.rank)), lead=me.local_rank == 0)
    kept = log.keep()
    if me.rank == 0:
        _introduce(flags, config)
    settings = _use(interface, me, config)
    watch.lap("config")
    try:
        bare = me.runtime_dir is None
        attachment = attach(me, config, interface.address, config.start_timeout, start=bare) if me.node_rank == 0 else None
    except UserError as error:  # under `tpserve serve` it is the supervisor who tells
        return _refuse(me, error, tell=me.rank == 0 and me.runtime_dir is None)
    watch.lap("frontend")
    env.calm_threads()
    gc.disable()  # nothing that torch makes while it is imported is garbage, and looking for it costs a sixth of the time
    from tpserve.engine.start import run_rank

    gc.freeze()  # nor need it be looked at ever again
    gc.enable()
    watch.lap("torch")
    try:
        code = run_rank(config, spec, me, interface, settings, attachment, watch, kept)
    except UserError as error:  # before it could tell the coordinator
        code = _refuse(me, error, tell=me.local_rank == 0)
    logging.shutdown()
    sys.stdout.flush()
    os._exit(code)  # taking the interpreter down takes seconds, and destructors of a broken mesh can hang


def _interface(me: env.RankEnv, config: EngineConfig) -> Interface:
    """This node's interface. Raises UserError when other nodes could not use it."""
    interface = choose(config.interface, me.nnodes, me.master_addr)
    if me.nnodes > 1 and me.rank == 0 and me.master_addr.strip("[]") != interface.address and interface.is_loopback:
        raise UserError(
            f"--master-addr {me.master_addr} is {interface} on this node, which other machines cannot reach: pass an address, or "
            "--interface (lo, when all nodes are on this machine)",
            param="master_addr",
        )
    return interface


def _use(interface: Interface, me: env.RankEnv, config: EngineConfig) -> dict[str, str]:
    """Have gloo and NCCL use it too, unless the user has told them otherwise. Returns what the user has told."""
    settings = env.network_variables()
    if me.nnodes > 1:
        logger.info("node %d of %d uses %s", me.node_rank, me.nnodes, interface)
    if me.nnodes > 1 and me.rank == 0 and config.port_range[1]:
        what = "NCCL" if config.all_reduce == "nccl" else "gloo"
        ranges = f"tpserve's {config.port_range[0]}-{config.port_range[1]}, and the kernel's {kernel_ports()} for {what}"
        logger.info("ports between nodes: %s, which knows none (net.ipv4.ip_local_port_range)", ranges)
    for name, value in settings.items():
        logger.info("%s=%s is set, and wins", name, value)
    for line in means_nothing(env.vllm_variables()) if me.local_rank == 0 else ():
        logger.warning("%s", line)
    env.use_interface(interface.name)
    return settings


def _introduce(flags: Flags, config: EngineConfig) -> None:
    """Say once what was resolved."""
    layout = config.layout
    logger.info(
        "tpserve %s: %s (%s), TP %d x PP %d (layers %s), %s on %s; %s %s tokens a sequence, %d sequences and %s tokens a step",
        __version__,
        config.served_model_name[0],
        config.model,
        layout.tp,
        layout.pp,
        ",".join(map(str, layout.layers)),
        config.dtype,
        config.device,
        "as many as fit of" if config.fit_max_model_len else "up to",
        f"{config.max_model_len:,}",
        config.max_num_seqs,
        f"{config.max_num_batched_tokens:,}",
    )
    if flags.distributed_executor_backend is not None:
        logger.info("--distributed-executor-backend %s: torchrun's ranks it is", flags.distributed_executor_backend)


def _refuse(me: env.RankEnv, error: UserError, *, tell: bool) -> int:
    """Tell the user, and torchrun, which would report no more than the exit code."""
    _leave_word(me, Failure(2, str(error)))
    if tell:
        sys.stderr.write(log.user_error(str(error)) + "\n")
        sys.stderr.flush()
    if me.error_file is not None:
        # "py_callstack" is what torchrun's report shows.
        extra = {"timestamp": str(int(time.time())), "py_callstack": log.user_error(str(error))}
        message = {"message": str(error), "extraInfo": extra}
        Path(me.error_file).write_text(json.dumps({"message": message}))
    return 2


if __name__ == "__main__":
    sys.exit(main())
