"""The link to the ranks: the request table, the coordinator and the sockets of both, on one event loop.

The HTTP frontend and the offline `LLM` have one each. Owns the order of shutdown. Knows nothing about HTTP, signals or the start
of the ranks, and decides nothing about requests. Invariants: only `announce` writes frontend.json, once every socket is bound. At
the end open requests get their answer first, then the ranks get Stop and time to exit; those on this host that still run are
killed.
"""

import asyncio
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import zmq
from msgspec.structs import replace

from tpserve.cluster.discovery import AgentFailure, FrontendRecord, has_agent_ended, read_failure, write_frontend
from tpserve.cluster.run_record import read_run, write_run
from tpserve.config.engine_config import EngineConfig
from tpserve.coordinator.actions import Action, EpochFailed, EpochFinished, EpochLost, EpochReady, EpochStarting
from tpserve.coordinator.config_check import optional_mismatches, required_mismatches
from tpserve.coordinator.coordinator import Coordinator
from tpserve.coordinator.epoch_state import EpochState
from tpserve.coordinator.rank_monitor import KILLED_ADVICE, TICK_S, RankMonitor
from tpserve.engine_client.control import EngineControl
from tpserve.engine_client.recovery import SEAMLESS, Attach, Detach, EngineAction, Recovered, Recovery, SendInputs
from tpserve.engine_client.requests import RequestTable
from tpserve.engine_client.server_info import BROKEN, INVARIANT, NOT_PROMISED, numerics, server_info
from tpserve.engine_client.status import EngineState, EngineStatus
from tpserve.errors import EngineFailure
from tpserve.observe.log import LogRingBuffer
from tpserve.observe.metrics import Metrics
from tpserve.process.process_utils import has_ended, open_pidfd
from tpserve.types.messages import EngineInput, ExpertLoad, LogLines, PauseMode, Stats
from tpserve.wire.channels import EngineServer, EngineUnreachable, TcpEndpoint, tcp
from tpserve.wire.curve import FRONTEND, ConnectInfo, Keyring, ZapAuthenticator

logger = logging.getLogger(__name__)

LEAVE_S = 4.0
"""The time that ranks on this host have to end after Stop before they are killed. They end by themselves after two seconds."""
SLOW_S = 1.0
"""A start that waits longer than this logs the missing ranks. With the time that Python takes, that is within two seconds of
`tpserve serve`."""
NO_SECRET = (
    "the nodes share no --cluster-secret-file: the keys of this run travel over torchrun's store, and whoever can reach its port "
    "can take part (`tpserve secret FILE` makes a secret)"
)
RESUME_HINT = "POST /resume or `tpserve resume` goes on"
EpochNews = EpochReady | EpochFailed | EpochFinished


class EngineClient:
    """See the module. Create and use it inside a running event loop."""

    def __init__(
        self,
        config: EngineConfig,
        runtime_dir: Path,
        remote_address: str | None,
        started_s: float,
        on_epoch_news: Callable[[EpochNews], None],
        log_buffer: LogRingBuffer | None = None,
        *,
        restarts: bool = True,
    ) -> None:
        """Bind the sockets in `runtime_dir` and, for ranks of other nodes, on `remote_address`.

        `on_epoch_news` gets every EpochReady, and at the end EpochFailed or EpochFinished before any open request fails.
        `log_buffer` holds this process's log lines for operators. `started_s` is a time of `time.monotonic`. `restarts`: somebody
        starts dead ranks again. EngineFailure when a socket cannot be bound.
        """
        self._config = config
        self._runtime_dir = runtime_dir
        self._started_s = started_s
        self._on_epoch_news = on_epoch_news
        self._log_buffer = log_buffer
        self._parent: tuple[int, int] | None = None
        self._supervised = False
        self._rank_logs = [LogRingBuffer() for _ in range(config.layout.world_size)]
        self._run = read_run(runtime_dir)
        self._coordinator = Coordinator(
            config.layout.world_size,
            time.monotonic(),
            epoch=self._run.epoch,
            facts=self._run.facts,
            restarts=restarts,
            form_timeout_s=config.start_timeout,
            recovery_timeout_s=config.recovery_timeout,
            drain_timeout_s=config.drain_timeout,
        )
        self._remote_address = remote_address
        if remote_address is not None:
            earlier = self._run.remote
            if earlier is None:
                self._keyring = Keyring.open(config.cluster_secret_file)
            else:
                self._keyring = earlier.keyring(config.cluster_secret_file)
            self._curve_server = self._keyring.curve_server(FRONTEND, config.layout.world_size)
            self._zap_authenticator = ZapAuthenticator(self._curve_server.allowed)
            if config.cluster_secret_file is None:
                logger.warning(NO_SECRET)
        self._rank_monitor = RankMonitor(
            self._coordinator, f"ipc://{runtime_dir}/control", self._control_endpoint(), self._on_action, self._check_parent
        )
        self._run = replace(self._run, remote=self.connect_info(self._rank_monitor.remote_endpoint))
        if (locked := self._rank_monitor.remote_socket) is not None:
            self._zap_authenticator.log_refusals_of(locked)
        self._engine = EngineServer(f"ipc://{runtime_dir}/engine")
        name = (config.served_model_name or (config.model,))[0]
        metrics = Metrics(name, config.block_size, vllm_names=config.metrics_compat == "vllm")
        self.request_table = RequestTable(self._send_to_engine, metrics)
        self.request_table.on_stats = self._on_stats
        self.control = EngineControl(self._send_to_engine, self._keep_pause, self._run.pause)
        if self.control.mode is not None:
            logger.warning("the server is paused (%s), as before its frontend was started again", self.control.mode)
        self._recovery = Recovery(self._coordinator, self.request_table)
        self._exit_code: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    def tcp_endpoint(self) -> TcpEndpoint | None:
        """A new TCP endpoint for processes of other nodes; None on a single node."""
        return (
            None
            if self._remote_address is None
            else TcpEndpoint(tcp(self._remote_address, self._config.port_range), self._curve_server)
        )

    def _control_endpoint(self) -> TcpEndpoint | None:
        """The TCP endpoint of the coordinator: where ranks of other nodes dial already, if there was a frontend before."""
        endpoint, earlier = self.tcp_endpoint(), self._run.remote
        return endpoint if endpoint is None or earlier is None else endpoint._replace(endpoint=earlier.endpoint)

    def connect_info(self, endpoint: str) -> ConnectInfo | None:
        """What a process of another node needs to connect to `endpoint`, a bound `tcp_endpoint`; None on a single node."""
        if self._remote_address is None:
            return None
        return self._keyring.connect_info(endpoint, with_secret=self._config.cluster_secret_file is None)

    def announce(self, url: str = "") -> None:
        """Write frontend.json, by which the ranks find this process. `url` is the address for HTTP clients, if any."""
        rank_monitor = self._rank_monitor
        connect_info = self.connect_info(rank_monitor.remote_endpoint)
        write_frontend(
            self._runtime_dir, FrontendRecord(os.getpid(), rank_monitor.local_endpoint, connect_info, self._engine.endpoint, url)
        )

    def status(self) -> EngineStatus:
        """The engine's state now."""
        c, facts, mode = self._coordinator, self._coordinator.facts, self.control.mode
        state = _state(c)
        paused = state == "running" and mode is not None
        return EngineStatus(
            "paused" if paused else state,
            f"paused ({mode}); {RESUME_HINT}" if paused else c.phase,
            c.percent,
            c.reason,
            facts.get("max_model_len"),
            facts.get("vocab_size"),
            self._recovery.resumption,
            c.recoveries,
            c.last_fault,
        )

    def info(self) -> dict[str, Any]:
        """The JSON value of /server_info."""
        c = self._coordinator
        logs, faults = (self._log_buffer, self._rank_logs), self._recovery.faults
        return server_info(self._config, self.status(), c.epoch, c.ranks, time.monotonic(), *logs, faults)

    async def serve(self, watch_pid: int, *, supervised: bool = False) -> int:
        """Run until the service and the ranks on this host have ended; returns the exit code.

        The ranks on this host die with the process `watch_pid`, so its end ends the service. `supervised`: it is `tpserve serve`,
        which starts a killed agent again and says when one has ended for good; else it is the agent.
        """
        self._supervised = supervised
        loop = asyncio.get_running_loop()
        pidfd = open_pidfd(watch_pid)
        if pidfd is None:
            self._parent_gone(watch_pid)
        else:
            self._parent = watch_pid, pidfd
            loop.add_reader(pidfd, self._parent_gone, watch_pid)
        descriptor = self._engine.socket.get(zmq.FD)
        assert isinstance(descriptor, int)
        loop.add_reader(descriptor, self._receive_from_engine)
        tasks = [loop.create_task(self._rank_monitor.run()), loop.create_task(self._poll())]
        try:
            code = await self._wait_for_end(tasks)
            (self._runtime_dir / "frontend.json").unlink(missing_ok=True)  # ranks that start now wait for the next frontend
            if not await self._rank_monitor.wait_exited(LEAVE_S) and (killed := self._rank_monitor.kill()):
                logger.warning("killed the ranks that did not end: %s", ", ".join(map(str, killed)))
            return code
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)  # while their sockets are open
            loop.remove_reader(descriptor)
            self._parent = None
            if pidfd is not None:
                loop.remove_reader(pidfd)
                os.close(pidfd)

    def drain(self) -> None:
        """Take no new requests, let open ones finish, then end with exit code 0."""
        self._rank_monitor.perform(self._coordinator.drain(time.monotonic()))

    def fail(self, code: int, reason: str, advice: str = "") -> None:
        """End at once with exit code `code` (1 engine, 2 user). `advice` is what an operator can do."""
        self._rank_monitor.perform(self._coordinator.fail(code, reason, time.monotonic(), advice))

    def close(self) -> None:
        """Close the sockets."""
        if self._remote_address is not None:
            self._zap_authenticator.close()
        self._rank_monitor.close()
        self._engine.close()

    async def _wait_for_end(self, tasks: list[asyncio.Task[None]]) -> int:
        """The exit code. Raises what one of `tasks` raised."""
        futures: list[asyncio.Future[Any]] = [self._exit_code, *tasks]
        await asyncio.wait(futures, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            if task.done():
                await task
        return self._exit_code.result()

    async def _poll(self) -> None:
        """Poll for what no event reports: the agent's end, a drain's, messages left in a socket, missing or differing ranks."""
        logged_phase, compared = "", False
        while True:
            self._receive_from_engine()
            if self._supervised and has_agent_ended(self._runtime_dir):
                self._fail_with(AgentFailure(1, "the agent that started the ranks has ended"))
            self._rank_monitor.perform(self._recovery.poll(time.monotonic()))
            if self._coordinator.draining:
                self.control.resume()  # what is open shall come to its end
            slow = self._coordinator.state is EpochState.FORMING and time.monotonic() > self._started_s + SLOW_S
            if self._coordinator.state is not EpochState.FORMING and not compared:
                compared = True
                if lines := optional_mismatches(self._coordinator.hellos):
                    logger.warning("the ranks differ in what may matter")
                    for line in lines:
                        logger.warning(line)
            if slow and self._coordinator.phase != logged_phase:
                logged_phase = self._coordinator.phase
                logger.info(logged_phase)
            await asyncio.sleep(TICK_S)

    # The engine

    def _send_to_engine(self, inputs: list[EngineInput]) -> None:
        """FrameTooLarge for one request, which the table fails. Without an engine nothing is sent: the next one gets it all."""
        try:
            self._engine.send(inputs)
        except EngineUnreachable as error:
            logger.debug("%s", error)
        asyncio.get_running_loop().call_soon(self._receive_from_engine)  # a send may consume an edge of the descriptor

    def _receive_from_engine(self) -> None:
        try:
            outputs = self._engine.receive()
        except EngineFailure as error:
            self.fail(1, str(error))
            return
        try:
            self._carry_out(self._recovery.on_outputs(outputs))
        except Exception as error:  # not of one request; the loop would only log it, and clients would wait for ever
            logger.exception("the request table failed")
            self.fail(1, f"the frontend failed with {type(error).__name__}: {error}")

    def _on_stats(self, stats: Stats) -> None:
        self.request_table.metrics.engine(stats)
        self.control.on_stats(stats)

    # The coordinator

    def _check_parent(self) -> None:
        """Fail with the parent's end, if it has ended: it explains the end of its ranks."""
        if self._parent is not None and has_ended(self._parent[1]):
            self._parent_gone(self._parent[0])

    def _parent_gone(self, pid: int) -> None:
        if self._supervised:
            why = f"`tpserve serve` (pid {pid}) of node 0 has ended: it was killed"
        else:
            how = "it, or a rank without a connection, was killed or crashed"
            why = f"the agent (pid {pid}) that started the ranks has ended: {how}"
        self._fail_with(AgentFailure(1, why, KILLED_ADVICE))

    def _fail_with(self, default: AgentFailure) -> None:
        """Fail with the reason that the agent has left, or with `default`."""
        failure = read_failure(self._runtime_dir) or default
        self.fail(failure.code, failure.why, failure.advice)

    def _on_action(self, action: Action) -> None:
        match action:
            case EpochStarting(epoch):
                self._keep(epoch=epoch)
            case EpochReady():
                self._keep(facts=self._coordinator.facts)
                self._carry_out(self._recovery.on_action(action, time.monotonic()))
                self._log_numerics()
                self._on_epoch_news(action)
            case EpochFailed() | EpochFinished():
                self._end(action)
            case ExpertLoad(_, _, layers, tokens):
                self.request_table.metrics.experts(layers, tokens)
            case LogLines(rank, start, lines, last_error) if 0 <= rank < len(self._rank_logs):
                self._rank_logs[rank].take(start, lines, last_error)
            case EpochLost(epoch, reason):
                logger.warning("%s; epoch %d is over, open requests: %d", reason, epoch, self.request_table.num_open)
                self._carry_out(self._recovery.on_action(action, time.monotonic()))
            case _:
                self._carry_out(self._recovery.on_action(action, time.monotonic()))

    def _keep(self, **fields: Any) -> None:
        """Write down what the next frontend needs."""
        self._run = replace(self._run, **fields)
        write_run(self._runtime_dir, self._run)

    def _keep_pause(self, mode: PauseMode | None) -> None:
        logger.info("resumed" if mode is None else f"paused ({mode})")
        self._keep(pause=mode)

    def _carry_out(self, actions: list[EngineAction]) -> None:
        for action in actions:
            match action:
                case Attach(identity):
                    self._engine.attach(identity)
                    self.control.attach()
                case Detach():
                    self._engine.detach()
                    self.control.detach()
                case SendInputs(inputs):
                    self._send_to_engine(inputs)
                case Recovered(epoch, took_s):
                    num_open = self.request_table.num_open
                    logger.info("recovered in %.2f s: epoch %d runs, open requests: %d", took_s, epoch, num_open)

    def _log_numerics(self) -> None:
        if (numerics_text := numerics(self._coordinator.ranks)) not in (INVARIANT, NOT_PROMISED):
            broken = numerics_text is not None and numerics_text.startswith(BROKEN)
            level = logging.WARNING if broken else logging.INFO
            logger.log(level, "a request's bits may depend on the batch: %s (docs/numerics.md)", numerics_text)
        if self._coordinator.recoveries and self._recovery.resumption == SEAMLESS:
            logger.warning("answers that were open go on %s: the processors promise no more (docs/reliability.md)", SEAMLESS)

    def _end(self, news: EpochFailed | EpochFinished) -> None:
        if isinstance(news, EpochFailed):
            for line in required_mismatches(self._coordinator.hellos):
                logger.error(line)
        self._on_epoch_news(news)
        self.control.detach()
        self._carry_out(self._recovery.on_action(news, time.monotonic()))
        if not self._exit_code.done():
            self._exit_code.set_result(news.code if isinstance(news, EpochFailed) else 0)


def _state(coordinator: Coordinator) -> EngineState:
    """The coordinator's state as operators see it."""
    if coordinator.state is EpochState.STOPPED:
        return "stopped"
    if coordinator.draining:
        return "draining"
    if coordinator.state is EpochState.RUN:
        return "running"
    return "recovering" if coordinator.recovering else "starting"
