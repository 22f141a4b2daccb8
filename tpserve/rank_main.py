"""The main program of a rank, from its command line to the engine.

A rank reads its flags, resolves the layout and finds the frontend before it imports torch. So wrong input is refused at once,
and the HTTP port is open while torch loads. A rank that fails before the coordinator knows it writes the reason to the runtime
directory, where the frontend reads it.
"""

import gc
import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

import msgspec

from tpserve.cli import server_flags
from tpserve.cli.command import HelpWanted
from tpserve.cli.vllm import ignored_variables
from tpserve.cluster.discovery import AgentFailure, find_frontend, write_failure
from tpserve.cluster.local_leader import LocalLeader, ask_local_leader
from tpserve.config import env
from tpserve.config.engine_config import EngineConfig
from tpserve.config.flags import Flags
from tpserve.config.reload import RankConfiguration, with_changes
from tpserve.config.resolve import resolve
from tpserve.errors import EngineFailure, PeerLost, UserError
from tpserve.host import resources
from tpserve.host.network import Interface, choose_interface, kernel_ports
from tpserve.hub.locate import locate
from tpserve.models.load_config import load_model_config
from tpserve.observe import log
from tpserve.observe.start_timer import StartTimer
from tpserve.process.exit_rules import ENDED_CODE
from tpserve.process.node_configuration import read_configuration
from tpserve.process.process_utils import allow_many_files, die_with
from tpserve.process.signals import block_signals
from tpserve.types.messages import RESTART_CODE
from tpserve.types.model_files import ModelFiles
from tpserve.types.model_spec import ModelSpec
from tpserve.version import __version__
from tpserve.wire.curve import Keyring

logger = logging.getLogger("tpserve")


def run(argv: list[str]) -> int:
    """Run this rank; returns the exit code. Raises UserError, or HelpWanted."""
    block_signals()
    allow_many_files()
    me = env.rank_env()
    try:
        return _run_rank(me, argv)
    except (HelpWanted, UserError):
        raise
    except Exception as error:  # the edge of the process
        reason = str(error) if isinstance(error, EngineFailure) else f"{type(error).__name__}: {error}"
        logger.error("rank %d fails: %s", me.rank, reason)
        logger.debug("rank %d fails", me.rank, exc_info=True)
        _write_failure(me, AgentFailure(1, f"rank {me.rank} (pid {os.getpid()}): {reason}"))
        if me.runtime_dir is None:
            return 1
        if isinstance(error, PeerLost):  # node 0's agent was lost meanwhile
            return RESTART_CODE
        return 1 if me.restart_count else ENDED_CODE  # a first start would fail again; a later one may find the frontend gone


def _write_failure(me: env.RankEnv, failure: AgentFailure) -> None:
    """Leave the reason for the frontend, which does not know this rank yet and only sees its agent end."""
    if me.node_rank == 0 and me.runtime_dir is not None:
        write_failure(Path(me.runtime_dir), failure)


def _run_rank(me: env.RankEnv, argv: list[str]) -> int:
    start_timer = StartTimer(me.agent_pid)
    die_with(me.agent_pid)
    try:
        flags, notice = server_flags.read_line(argv, env.overrides(), launch=False)
        if flags.cluster_secret_file is not None:
            Keyring.read(flags.cluster_secret_file)  # refuse a bad file before waiting for other nodes
        color = env.color(sys.stderr)
        log.setup(flags.log_level, f"n{me.node_rank} r{me.rank}", lead=me.local_rank == 0, color=color)
        if notice and me.rank == 0:
            logger.info("%s", notice)
        config, spec, configuration = _configure(me, flags)
        interface = _interface(me, config)
    except UserError as error:
        return _report_user_error(me, error, print_it=me.local_rank == 0)
    except HelpWanted:
        if me.local_rank:
            return 0
        raise
    prefix = log.rank_prefix(me.node_rank, me.rank, config.layout.stage_of(me.rank))
    log.setup(config.log_level, prefix, lead=me.local_rank == 0, color=color)
    log_buffer = log.keep_log()
    if me.rank == 0:
        _log_config(config)
    settings = _apply_interface(interface, me, config)
    start_timer.mark("config")
    try:
        under_torchrun = me.runtime_dir is None
        frontend_address = None
        if me.node_rank == 0:
            frontend_address = find_frontend(me, config, interface.address, config.start_timeout, start=under_torchrun)
    except UserError as error:  # under `tpserve serve` the supervisor prints it
        return _report_user_error(me, error, print_it=me.rank == 0 and me.runtime_dir is None)
    start_timer.mark("frontend")
    env.set_omp_spin()
    gc.disable()  # importing torch makes no garbage, and collections take a sixth of the import time
    from tpserve.engine.start import run_rank

    gc.freeze()  # later collections skip the objects made so far
    gc.enable()
    start_timer.mark("torch")
    try:
        code = run_rank(config, spec, me, interface, settings, frontend_address, start_timer, log_buffer, configuration)
    except UserError as error:  # raised before the rank can report it to the coordinator
        code = _report_user_error(me, error, print_it=me.local_rank == 0)
    logging.shutdown()
    sys.stdout.flush()
    os._exit(code)  # shutting the interpreter down takes seconds, and destructors of a broken mesh can hang


def _configure(me: env.RankEnv, flags: Flags) -> tuple[EngineConfig, ModelSpec, RankConfiguration]:
    """Resolve the flags, as the last reload has changed them. Raises UserError.

    With flags that cannot be had on this node the rank comes with those of before, and says so in its Hello.
    """
    order = read_configuration(me.configuration)
    if order is None:
        return (*_resolve(me, flags), RankConfiguration())
    try:
        changed = _resolve(me, _changed(flags, order.changes))
        return (*changed, RankConfiguration(order.number, may_fail=order.fallback is not None))
    except UserError as error:
        if order.fallback is None:
            raise
        try:
            before = _resolve(me, _changed(flags, order.fallback))
        except UserError:
            raise error from None  # those of before cannot be had any more either
        return (*before, RankConfiguration(order.number, str(error)))


def _changed(flags: Flags, changes: bytes) -> Flags:
    return with_changes(flags, msgspec.json.decode(changes, type=dict[str, Any]))


def _resolve(me: env.RankEnv, flags: Flags) -> tuple[EngineConfig, ModelSpec]:
    flags, files, spec = load_model_config(flags, lambda flags: _locate_once_per_node(me, flags))
    return resolve(flags, files, spec, resources.of_rank(me)), spec


def _interface(me: env.RankEnv, config: EngineConfig) -> Interface:
    """This node's interface. Raises UserError when other nodes cannot reach it."""
    interface = choose_interface(config.interface, me.nnodes, me.master_addr)
    if me.nnodes > 1 and me.rank == 0 and me.master_addr.strip("[]") != interface.address and interface.is_loopback:
        raise UserError(
            f"--master-addr {me.master_addr} is {interface} on this node, which other machines cannot reach: pass an address, or "
            "--interface (lo, when all nodes are on this machine)",
            param="master_addr",
        )
    return interface


def _apply_interface(interface: Interface, me: env.RankEnv, config: EngineConfig) -> dict[str, str]:
    """Make gloo and NCCL use `interface` unless the user set theirs. Returns the user's NCCL_* and GLOO_* variables."""
    settings = env.network_variables()
    if me.nnodes > 1:
        logger.info("node %d of %d uses %s", me.node_rank, me.nnodes, interface)
    if me.nnodes > 1 and me.rank == 0 and config.port_range[1]:
        backend = "NCCL" if config.all_reduce == "nccl" else "gloo"
        ranges = f"{config.port_range[0]}-{config.port_range[1]} for tpserve, {kernel_ports()} for {backend}"
        logger.info("ports between nodes: %s, which uses the kernel's range (net.ipv4.ip_local_port_range)", ranges)
    for name, value in settings.items():
        logger.info("%s=%s is set and stays as it is", name, value)
    for line in ignored_variables(env.vllm_variables()) if me.local_rank == 0 else ():
        logger.warning("%s", line)
    env.use_interface(interface.name)
    return settings


def _log_config(config: EngineConfig) -> None:
    """Log one line about the resolved configuration."""
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
        "as many as fit, at most" if config.fit_max_model_len else "up to",
        f"{config.max_model_len:,}",
        config.max_num_seqs,
        f"{config.max_num_batched_tokens:,}",
    )


def _report_user_error(me: env.RankEnv, error: UserError, *, print_it: bool) -> int:
    """Report the error to the frontend, to stderr if `print_it`, and to torchrun, which otherwise shows only the exit code.

    Returns the exit code 2.
    """
    _write_failure(me, AgentFailure(2, str(error)))
    if print_it:
        sys.stderr.write(log.user_error(str(error)) + "\n")
        sys.stderr.flush()
    if me.error_file is not None:
        # "py_callstack" is what torchrun's report shows.
        extra = {"timestamp": str(int(time.time())), "py_callstack": log.user_error(str(error))}
        message = {"message": str(error), "extraInfo": extra}
        Path(me.error_file).write_text(json.dumps({"message": message}))
    return 2


def _locate_once_per_node(me: env.RankEnv, flags: Flags) -> ModelFiles:
    """Locate the model's files. For a repository only the node's first rank does it, and the others use the same commit."""
    head = me.rank == 0 and me.runtime_dir is None
    assert flags.model is not None
    if me.local_world_size == 1 or Path(flags.model).is_dir():
        return locate(flags, head=head)
    asked = repr((flags.model, flags.revision, flags.tokenizer, flags.tokenizer_revision, flags.download_dir))
    if me.local_rank:
        return ask_local_leader(me, asked, flags.start_timeout)
    local_leader = LocalLeader(me, asked)
    try:
        files = locate(flags, head=head)
    except UserError as error:
        local_leader.publish_error(str(error))
        raise
    local_leader.publish(files)
    return files
