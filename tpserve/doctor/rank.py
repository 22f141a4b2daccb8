"""One rank of `tpserve doctor`. All ranks take part in every check; rank 0 gathers and prints the results and sets the exit code.

The ranks use a store that rank 0 hosts, as the ranks of an epoch do, and read its address from torchrun's store. The checks, in
order: fingerprints of all ranks; connections between ranks; resources of each node; and, when nothing is broken so far, the mesh
of the layout and its all-reduces. Invariants: every wait and every collective (`hang`) has a limit and names the missing ranks;
all ranks exit with the same code.
"""

import logging
import os
import shutil
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import msgspec
import torch
from torch._C._distributed_c10d import Store  # torch.distributed has it without its types

from tpserve.cli import server_flags
from tpserve.config import env as environment
from tpserve.config.engine_config import EngineConfig
from tpserve.config.env import RankEnv
from tpserve.config.resolve import resolve
from tpserve.coordinator.config_check import all_facts, mismatch, optional_mismatches
from tpserve.doctor import host, links, traffic
from tpserve.doctor.hang import HangWatchdog, unresponsive_ranks
from tpserve.doctor.verdict import BROKEN, OK, Verdict, exit_code, page, summary
from tpserve.engine import connectivity
from tpserve.engine.fingerprint import fingerprint, processor
from tpserve.errors import EngineFailure, UserError
from tpserve.host.network import Interface, choose_interface, host_id
from tpserve.host.resources import Memory, available_cores, available_memory, of_rank, visible_gpus
from tpserve.hub.locate import describe
from tpserve.models.load_config import load_model_config
from tpserve.observe import log
from tpserve.observe.table import table
from tpserve.parallel import mesh as meshes
from tpserve.parallel.group import Group
from tpserve.parallel.store import agent_store, gather, host_store, join_store
from tpserve.types.messages import Hello, NodeInfo
from tpserve.types.model_spec import ModelSpec
from tpserve.worker import device as devices

logger = logging.getLogger(__name__)

T = TypeVar("T")
MESH_S = 60.0
"""Limit for the mesh to form."""
EXIT_S = 5.0
"""Time for the other ranks to read the exit code from rank 0's store."""
HANG_NOTICE_S = 5.0
"""The longest delay after which another rank notices that an all-reduce hangs."""
GATHER_S = 60.0
"""The longest delay of a rank in a step that all ranks do at the same time."""
_KEY = "tpserve/doctor"


def run_rank(me: RankEnv, argv: Sequence[str]) -> int:
    """Run all checks and end this process with the exit code. Returns 2 or raises UserError for flags that are wrong."""
    try:
        flags = server_flags.parse(argv, environment.overrides(), launch=False)
        log.setup(flags.log_level, f"n{me.node_rank} r{me.rank}", lead=me.local_rank == 0, color=environment.color(sys.stderr))
        flags, files, spec = load_model_config(flags, describe)
        config = resolve(flags, files, spec, of_rank(me))
        interface = choose_interface(config.interface, me.nnodes, me.master_addr)
    except UserError:
        if me.local_rank:  # the first rank of the node raises the same
            return 2
        raise
    settings = environment.network_variables()
    environment.use_interface(interface.name)
    trace_dir = _trace_nccl() if config.all_reduce == "nccl" else None
    device = devices.choose(config.device, me.local_rank, me.local_world_size)
    try:
        code = _DoctorRank(me, config, spec, interface, settings, device, trace_dir).run_checks()
    except (EngineFailure, UserError) as error:
        logger.error("%s", error)
        code = 2 if isinstance(error, UserError) else 1
    _clean_up(trace_dir)
    os._exit(code)  # destructors of a broken mesh can hang


def _trace_nccl() -> Path | None:
    """Make NCCL write its log into a new directory. None when the user has set NCCL's log variables."""
    directory = Path(tempfile.mkdtemp(prefix="tpserve-doctor-"))
    if environment.trace_nccl(f"{directory}/nccl"):
        return directory
    directory.rmdir()
    return None


def _clean_up(trace_dir: Path | None) -> None:
    """Remove NCCL's log and flush all output, before `os._exit`."""
    if trace_dir is not None:
        shutil.rmtree(trace_dir, ignore_errors=True)
    logging.shutdown()
    sys.stdout.flush()


class _DoctorRank:
    """The checks of one rank."""

    def __init__(
        self,
        me: RankEnv,
        config: EngineConfig,
        spec: ModelSpec,
        interface: Interface,
        settings: dict[str, str],
        device: torch.device,
        trace_dir: Path | None,
    ) -> None:
        """`settings`: the network variables that the user has set. `trace_dir`: the directory of NCCL's log."""
        self._me = me
        self._config = config
        self._spec = spec
        self._interface = interface
        self._device = device
        self._trace_dir = trace_dir
        self._free = devices.free_memory(device)
        node = NodeInfo(me.node_rank, interface.address, host_id(), settings, visible_gpus())
        process, facts = (me.rank, 0, os.getpid(), socket.gethostname()), fingerprint(config, spec)
        equal, traits = processor(device, config.dtype, spec)
        self._hello = Hello(*process, {}, facts, node, traits, config.layout.stage_of(me.rank), equal)
        self._store, self._store_address = _open_store(me, config, interface)
        self._hosts: list[str] = []

    def run_checks(self) -> int:
        """Run all checks; returns the exit code."""
        hellos = self._gather("hello", self._hello, Hello)
        self._hosts = hosts = [hello.host for hello in hellos]
        self._print(all_facts(hellos))
        if why := next(filter(None, (mismatch(hellos[:i], hello) for i, hello in enumerate(hellos))), ""):
            self._print(["", log.user_error(why)])
            return self._agree_on_exit_code(2)
        verdicts = [_fingerprint_verdict(hellos), *links.judge(self._probe_links(hellos), hosts)]
        reports = self._gather("host", self._node_report() if self._me.local_rank == 0 else None, host.NodeReport | None)
        verdicts += [verdict for each in reports if each is not None for verdict in host.judge(each, self._config.device)]
        if exit_code(verdicts) == OK:  # all ranks have the same verdicts so far
            verdicts += self._check_all_reduce(hellos)
        else:
            verdicts.append(Verdict("broken", "all-reduce", "not tried: mend what is broken first"))
        self._print(["", *page(verdicts), "", summary(verdicts)])
        return self._agree_on_exit_code(exit_code(verdicts))

    def _probe_links(self, hellos: Sequence[Hello]) -> list[list[links.ProbeResult]]:
        """The results of all ranks that dial each other, in rank order."""
        try:
            ping_server = links.PingServer(self._interface.address, self._config.port_range)
        except UserError as error:
            raise EngineFailure(str(error)) from error
        ports = self._gather("port", ping_server.port, int)
        addresses = [(hello.node.address, port) for hello, port in zip(hellos, ports, strict=True)]
        probes = self._gather("probes", links.probe_all(self._me.rank, addresses), list[links.ProbeResult])
        ping_server.close()
        return probes

    def _node_report(self) -> host.NodeReport:
        """The resources of this node, for its first rank."""
        config, me = self._config, self._me
        files = host.weight_files(Path(config.model))
        sizes = [size for _, size in config.snapshot.weights] if config.snapshot else [path.stat().st_size for path in files]
        memory = Memory(self._free, 0, "the GPU")
        if config.device == "cpu":
            memory = available_memory()
            memory = Memory(memory.free // me.local_world_size, memory.total, memory.of)
        needed = sum(sizes) // config.layout.world_size
        disk = host.read_rate(files) if config.load_format != "dummy" else None
        return host.NodeReport(self._hello.host, host.free_shm(), memory.free, memory.of, needed, disk)

    def _check_all_reduce(self, hellos: Sequence[Hello]) -> list[Verdict]:
        """Form the mesh with the server's code, and time its all-reduces."""
        layout, config = self._config.layout, self._config
        if layout.world_size == 1:
            return [Verdict("good", "all-reduce", "one rank, which needs no all-reduce")]
        begin_s, watchdog = time.monotonic(), HangWatchdog(lambda step: self._report_hang(step, HANG_NOTICE_S))
        user_set = environment.user_set_interface(self._hello.node.settings, config.all_reduce)
        address = None if user_set else self._interface.address
        try:
            if self._me.nnodes > 1:
                connectivity.check_connectivity(self._me.rank, layout.world_size, address, self._store, MESH_S)
            with watchdog.limit("mesh", MESH_S + traffic.ALL_REDUCE_LIMIT_S):
                mesh = meshes.init_distributed(
                    self._me.rank, layout, 1, self._store, self._device, MESH_S, config.all_reduce, available_cores()
                )  # fmt: skip
        except EngineFailure as error:
            remedy = "see that --interface names the network that gloo and NCCL are to use, and that its ports are open"
            return [Verdict("broken", "mesh", str(error), remedy)]
        verdicts = [Verdict("good", "mesh", f"formed in {time.monotonic() - begin_s:.1f} s")]
        try:
            if layout.tp > 1:
                firsts = range(0, layout.world_size, layout.tp)
                verdicts += self._time("in stage", mesh.tp, firsts, 2 * self._spec.num_layers, watchdog)
            if layout.pp > 1:  # activations between stages take the same way
                verdicts += self._time("across stages", mesh.world, range(1), layout.pp - 1, watchdog)
        except RuntimeError as error:  # gloo and NCCL raise it when a peer has ended
            logger.warning("%s", str(error).partition("\n")[0])
            self._report_hang("all-reduce", traffic.ALL_REDUCE_LIMIT_S + HANG_NOTICE_S)
        verdicts.append(self._transport(hellos, mesh.tp.uses_shm))
        meshes.destroy_distributed(mesh)
        return verdicts

    def _report_hang(self, step: str, timeout_s: float) -> None:
        """Print which ranks do not respond after `step` hangs or fails, and end this process. Runs on the watchdog's thread or on
        the main one. `timeout_s`: the longest delay after which another rank notices."""
        listen = (self._interface.address, self._config.port_range)
        try:
            store = self._store if self._me.rank == 0 else join_store(self._store_address, links.CONNECT_S)
            verdicts = unresponsive_ranks(store, self._me.rank, self._hosts, listen, step, timeout_s)
            self._print(["", *page(verdicts), "", summary(verdicts)])
        except (EngineFailure, UserError, RuntimeError) as error:
            logger.error("%s hangs, and rank 0 on %s does not respond: %s", step, self._hosts[0], error)
        time.sleep(1.0 if self._me.rank == 0 else 0.0)  # the other ranks still use rank 0's store
        _clean_up(self._trace_dir)
        os._exit(BROKEN)

    def _time(
        self, where: str, group: Group, firsts: Sequence[int], num_all_reduces: int, watchdog: HangWatchdog
    ) -> list[Verdict]:
        """Time the all-reduces of all groups, whose first ranks are `firsts`, and print the sizes of the slowest group.

        `num_all_reduces`: those of one token. Returns a verdict for each group.
        """
        own = traffic.measure(group, getattr(torch, self._config.dtype), self._device, watchdog, f"all-reduce {where}")
        all_times = self._gather(f"times {where}", own, list[tuple[int, float]])
        names = [f"all-reduce {where}{f' {i}' if where == 'in stage' else ''}" for i in range(len(firsts))]
        times = [all_times[rank] for rank in firsts]
        slowest = max(range(len(times)), key=lambda i: times[i][0][1])
        sizes = traffic.lines(times[slowest], group.size)
        token_bytes = self._spec.hidden_size * getattr(torch, self._config.dtype).itemsize
        self._print(["", f"{names[slowest]}, {self._config.dtype}", *table([("size", "time", "bus bandwidth"), *sizes])])
        return [
            traffic.judge(name, each, group.size, num_all_reduces, token_bytes) for name, each in zip(names, times, strict=True)
        ]

    def _transport(self, hellos: Sequence[Hello], uses_shm: bool) -> Verdict:
        """The transport of the all-reduces."""
        if self._config.all_reduce == "nccl":
            own = traffic.read_nccl(self._trace_dir) if self._trace_dir else {}
            carriers = sum(map(Counter[str], self._gather("nccl", own, dict[str, int])), Counter[str]())
            return traffic.judge_nccl(dict(carriers), self._me.nnodes)
        if uses_shm:
            return Verdict("good", "transport", "shared memory between the ranks of a host, within each stage")
        kind = "loopback" if self._interface.is_loopback else "TCP"
        return Verdict("good", "transport", f"gloo over {kind}, {', '.join(dict.fromkeys(h.node.address for h in hellos))}; "
                       "InfiniBand and GPUDirect: not tried, only NCCL uses them")  # fmt: skip

    # Communication between the ranks

    def _gather(self, name: str, value: T, kind: object) -> list[T]:
        """Exchange `value` under `name`. Returns the values in rank order. Raises EngineFailure when a rank is too late."""
        timeout_s = GATHER_S if self._hosts else self._config.start_timeout
        encoded = gather(self._store, name, self._me.rank, range(self._me.world_size), msgspec.json.encode(value), timeout_s)
        return [msgspec.json.decode(each, type=kind) for each in encoded]

    def _agree_on_exit_code(self, code: int) -> int:
        """Return rank 0's code on all ranks, after rank 0 has printed everything: torchrun ends all ranks when one fails."""
        store, timeout = self._store, timedelta(seconds=self._config.start_timeout)
        try:
            if self._me.rank == 0:
                store.set("code", str(code))
                store.wait([f"left{rank}" for rank in range(1, self._me.world_size)], timedelta(seconds=EXIT_S))
            else:
                store.wait(["code"], timeout)
                code = int(store.get("code"))
                store.set(f"left{self._me.rank}", "")
        except RuntimeError as error:
            logger.warning("not all ranks ended together: %s", str(error).partition("\n")[0])
        return code

    def _print(self, lines: Sequence[str]) -> None:
        if self._me.rank == 0:
            sys.stdout.write("\n".join([*lines, ""]))
            sys.stdout.flush()


def _open_store(me: RankEnv, config: EngineConfig, interface: Interface) -> tuple[Store, str]:
    """Host or join the store of this run. Returns it and its address. Raises EngineFailure when rank 0 is too late."""
    if me.world_size == 1:
        return host_store(interface.address, config.port_range)
    agents = agent_store(me.master_addr, me.master_port, me.rank, me.use_agent_store, config.start_timeout)
    key = f"{_KEY}/{me.restart_count}"
    if me.rank == 0:
        store, address = host_store(interface.address, config.port_range)
        agents.set(key, address)
        return store, address
    try:
        agents.wait([key], timedelta(seconds=config.start_timeout))
        address = agents.get(key).decode()
        return join_store(address, links.CONNECT_S), address
    except RuntimeError as error:
        raise EngineFailure(f"rank 0 did not come within {config.start_timeout:g} s") from error


def _fingerprint_verdict(hellos: Sequence[Hello]) -> Verdict:
    text = f"{len(hellos)} ranks agree in everything that must agree"
    if optional_mismatches(hellos):
        remedy = (
            "install the same driver and set the same variables on all nodes, unless the difference is intended; see the table"
        )
        return Verdict("slow", "fingerprint", f"{text}, and differ in other facts that may matter", remedy)
    return Verdict("good", "fingerprint", text)
