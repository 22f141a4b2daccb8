"""One rank of the doctor's: it takes part in every check; rank 0 gathers what was found, prints it, and decides the exit code.

The ranks meet at a store that rank 0 hosts, as an epoch's ranks do, and learn its address from torchrun's. In order: who is there
and whether they can work together; who reaches whom; what each node has; and, when nothing is broken so far, the mesh of the
layout and what it carries. Invariants: every wait is bounded and names who is missing, and so is every collective (`hang`); all
ranks leave with the same exit code.
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
from tpserve.config.env import RankEnv
from tpserve.config.resolve import resolve
from tpserve.config.schema import EngineConfig
from tpserve.coordinator.config_check import all_facts, mismatch, optional_mismatches
from tpserve.doctor import host, links, traffic
from tpserve.doctor.hang import HangWatchdog, unresponsive_ranks
from tpserve.doctor.verdict import BROKEN, OK, Verdict, exit_code, page, summary
from tpserve.engine import connectivity
from tpserve.engine.fingerprint import fingerprint, processor, traits
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

Of = TypeVar("Of")
MESH_S = 60.0
LEAVE_S = 5.0
LATER_S = 5.0
"""How much later than this rank another one may find that a sum does not come back."""
ANSWER_S = 60.0
"""How much later than the first another rank may be with what all do at the same time."""
_KEY = "tpserve/doctor"


def examine(me: RankEnv, argv: Sequence[str]) -> int:
    """Take part; returns the exit code. Raises UserError for what no rank can be examined with."""
    try:
        flags = server_flags.parse(argv, environment.overrides(), launch=False)
        log.setup(flags.log_level, f"n{me.node_rank} r{me.rank}", lead=me.local_rank == 0, color=environment.color(sys.stderr))
        flags, files, spec = load_model_config(flags, describe)
        config = resolve(flags, files, spec, of_rank(me))
        interface = choose_interface(config.interface, me.nnodes, me.master_addr)
    except UserError:
        if me.local_rank:  # the first rank of the node says the same
            return 2
        raise
    settings = environment.network_variables()
    environment.use_interface(interface.name)
    traced = _trace() if config.all_reduce == "nccl" else None
    device = devices.choose(config.device, me.local_rank, me.local_world_size)
    try:
        code = _DoctorRank(me, config, spec, interface, settings, device, traced).examine()
    except (EngineFailure, UserError) as error:
        logger.error("%s", error)
        code = 2 if isinstance(error, UserError) else 1
    _clean_up(traced)
    os._exit(code)  # destructors of a broken mesh can hang


def _trace() -> Path | None:
    """A directory into which NCCL writes what it does; None when the user has told it otherwise."""
    directory = Path(tempfile.mkdtemp(prefix="tpserve-doctor-"))
    if environment.trace_nccl(f"{directory}/nccl"):
        return directory
    directory.rmdir()
    return None


def _clean_up(traced: Path | None) -> None:
    """Before this process ends, which it does at once."""
    if traced is not None:
        shutil.rmtree(traced, ignore_errors=True)
    logging.shutdown()
    sys.stdout.flush()


class _DoctorRank:
    """The checks in their order."""

    def __init__(
        self,
        me: RankEnv,
        config: EngineConfig,
        spec: ModelSpec,
        interface: Interface,
        settings: dict[str, str],
        device: torch.device,
        traced: Path | None,
    ) -> None:
        """`traced`: where NCCL writes what it does."""
        self._me = me
        self._config = config
        self._spec = spec
        self._interface = interface
        self._device = device
        self._traced = traced
        self._free = devices.free_memory(device)
        node = NodeInfo(me.node_rank, interface.address, host_id(), settings, visible_gpus())
        seat, facts = (me.rank, 0, os.getpid(), socket.gethostname()), fingerprint(config, spec)
        self._hello = Hello(*seat, {}, facts, node, traits(device), config.layout.stage_of(me.rank), processor(device))
        self._store, self._store_address = _meet(me, config, interface)
        self._hosts: list[str] = []

    def examine(self) -> int:
        """All checks; the exit code."""
        hellos = self._gather("hello", self._hello, Hello)
        self._hosts = hosts = [hello.host for hello in hellos]
        self._print(all_facts(hellos))
        if why := next(filter(None, (mismatch(hellos[:i], hello) for i, hello in enumerate(hellos))), ""):
            self._print(["", log.user_error(why)])
            return self._leave(2)
        found = [_agreement(hellos), *links.judge(self._dial(hellos), hosts)]
        looked = self._gather("host", self._look() if self._me.local_rank == 0 else None, host.NodeReport | None)
        found += [verdict for each in looked if each is not None for verdict in host.judge(each, self._config.device)]
        if exit_code(found) == OK:  # all ranks have found the same so far
            found += self._carry(hellos)
        else:
            found.append(Verdict("broken", "all-reduce", "not tried: mend what is broken first"))
        self._print(["", *page(found), "", summary(found)])
        return self._leave(exit_code(found))

    def _dial(self, hellos: Sequence[Hello]) -> list[list[links.ProbeResult]]:
        try:
            ping_server = links.PingServer(self._interface.address, self._config.port_range)
        except UserError as error:
            raise EngineFailure(str(error)) from error
        ports = self._gather("port", ping_server.port, int)
        heard = links.probe_all(self._me.rank, [(hello.node.address, port) for hello, port in zip(hellos, ports, strict=True)])
        all_heard = self._gather("heard", heard, list[links.ProbeResult])
        ping_server.close()
        return all_heard

    def _look(self) -> host.NodeReport:
        """At this node, by its first rank."""
        config, me = self._config, self._me
        files = host.weight_files(Path(config.model))
        known = [size for _, size in config.snapshot.weights] if config.snapshot else [path.stat().st_size for path in files]
        memory = Memory(self._free, 0, "the GPU")
        if config.device == "cpu":
            memory = available_memory()
            memory = Memory(memory.free // me.local_world_size, memory.total, memory.of)
        needed = sum(known) // config.layout.world_size
        disk = host.read_rate(files) if config.load_format != "dummy" else None
        return host.NodeReport(self._hello.host, host.free_shm(), memory.free, memory.of, needed, disk)

    def _carry(self, hellos: Sequence[Hello]) -> list[Verdict]:
        """Form the mesh as a server would, and time it."""
        layout, config = self._config.layout, self._config
        if layout.world_size == 1:
            return [Verdict("good", "all-reduce", "one rank, which has nothing to add up")]
        begin_s, limit = time.monotonic(), HangWatchdog(lambda what: self._give_up(what, LATER_S))
        between = (
            None if environment.user_set_interface(self._hello.node.settings, config.all_reduce) else self._interface.address
        )
        try:
            if self._me.nnodes > 1:
                connectivity.check_connectivity(self._me.rank, layout.world_size, between, self._store, MESH_S)
            with limit.of("mesh", MESH_S + traffic.SUM_S):
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
                verdicts += self._time("in stage", mesh.tp, firsts, 2 * self._spec.num_layers, limit)
            if layout.pp > 1:  # what passes between stages goes the same way
                verdicts += self._time("across stages", mesh.world, range(1), layout.pp - 1, limit)
        except RuntimeError as error:  # of gloo and NCCL: a peer has gone
            logger.warning("%s", str(error).partition("\n")[0])
            self._give_up("all-reduce", traffic.SUM_S + LATER_S)
        verdicts.append(self._transport(hellos, mesh.tp.through_memory))
        meshes.leave(mesh)
        return verdicts

    def _give_up(self, what: str, later_s: float) -> None:
        """`what` hangs, or has failed: say who does not answer, and leave. On the thread that watches, or on the main one.
        `later_s`: how much later than this rank others may notice."""
        place = (self._interface.address, self._config.port_range)
        try:
            store = self._store if self._me.rank == 0 else join_store(self._store_address, links.CONNECT_S)
            found = unresponsive_ranks(store, self._me.rank, self._hosts, place, what, later_s)
            self._print(["", *page(found), "", summary(found)])
        except (EngineFailure, UserError, RuntimeError) as error:
            logger.error("%s did not come back, and neither does rank 0 on %s: %s", what, self._hosts[0], error)
        time.sleep(1.0 if self._me.rank == 0 else 0.0)  # its store is the others'
        _clean_up(self._traced)
        os._exit(BROKEN)

    def _time(self, where: str, group: Group, firsts: Sequence[int], sums: int, limit: HangWatchdog) -> list[Verdict]:
        """All-reduces of groups, whose first ranks are `firsts`: a verdict each, and the sizes of the slowest."""
        mine = traffic.measure(group, getattr(torch, self._config.dtype), self._device, limit, f"all-reduce {where}")
        all_times = self._gather(f"times {where}", mine, list[tuple[int, float]])
        names = [f"all-reduce {where}{f' {i}' if where == 'in stage' else ''}" for i in range(len(firsts))]
        times = [all_times[rank] for rank in firsts]
        slowest = max(range(len(times)), key=lambda i: times[i][0][1])
        sizes = traffic.lines(times[slowest], group.size)
        token_bytes = self._spec.hidden_size * getattr(torch, self._config.dtype).itemsize
        self._print(["", f"{names[slowest]}, {self._config.dtype}", *table([("size", "time", "bus bandwidth"), *sizes])])
        return [traffic.judge(name, each, group.size, sums, token_bytes) for name, each in zip(names, times, strict=True)]

    def _transport(self, hellos: Sequence[Hello], through_memory: bool) -> Verdict:
        """What carries the sums."""
        if self._config.all_reduce == "nccl":
            mine = traffic.read_nccl(self._traced) if self._traced else {}
            told = sum(map(Counter[str], self._gather("nccl", mine, dict[str, int])), Counter[str]())
            return traffic.judge_nccl(dict(told), self._me.nnodes)
        if through_memory:
            return Verdict("good", "transport", "memory that the ranks of a host share, within each stage")
        kind = "loopback" if self._interface.is_loopback else "TCP"
        return Verdict("good", "transport", f"gloo over {kind}, {', '.join(dict.fromkeys(h.node.address for h in hellos))}; "
                       "InfiniBand and GPUDirect: not tried, they are NCCL's")  # fmt: skip

    # Among the ranks

    def _gather(self, name: str, mine: Of, kind: object) -> list[Of]:
        """What every rank has for `name`, in rank order. EngineFailure when one is missing for too long."""
        limit_s = ANSWER_S if self._hosts else self._config.start_timeout
        told = gather(self._store, name, self._me.rank, range(self._me.world_size), msgspec.json.encode(mine), limit_s)
        return [msgspec.json.decode(each, type=kind) for each in told]

    def _leave(self, code: int) -> int:
        """All leave with rank 0's code, once it has said what there is to say: torchrun ends all ranks when one has failed."""
        store, timeout = self._store, timedelta(seconds=self._config.start_timeout)
        try:
            if self._me.rank == 0:
                store.set("code", str(code))
                store.wait([f"left{rank}" for rank in range(1, self._me.world_size)], timedelta(seconds=LEAVE_S))
            else:
                store.wait(["code"], timeout)
                code = int(store.get("code"))
                store.set(f"left{self._me.rank}", "")
        except RuntimeError as error:
            logger.warning("not all ranks left together: %s", str(error).partition("\n")[0])
        return code

    def _print(self, lines: Sequence[str]) -> None:
        if self._me.rank == 0:
            sys.stdout.write("\n".join([*lines, ""]))
            sys.stdout.flush()


def _meet(me: RankEnv, config: EngineConfig, interface: Interface) -> tuple[Store, str]:
    """The store of this run, and where it is."""
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


def _agreement(hellos: Sequence[Hello]) -> Verdict:
    what = f"{len(hellos)} ranks agree in all that must agree"
    if optional_mismatches(hellos):
        remedy = "install the same driver and set the same variables everywhere, or know why not; the table above has them"
        return Verdict("slow", "fingerprint", f"{what}, and differ in what may matter", remedy)
    return Verdict("good", "fingerprint", what)
