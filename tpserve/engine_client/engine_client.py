"""Between whoever has requests and the ranks: the request table, the coordinator, and the sockets of both, on one event loop.

The HTTP frontend and the offline `LLM` each own one; what differs between them is who opens handles and what is told to whom.
Owns the order of ending and decides nothing about requests. Never knows HTTP, signals or how the ranks were started. Invariants:
frontend.json is written only by `announce`, once every socket is bound; whatever ends the service, open requests get their answer
first, then the ranks are told and given time to leave, and those on this host that do not are killed.
"""

import asyncio
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import zmq

from tpserve.cluster.discovery import AgentFailure, FrontendRecord, read_failure, write_frontend
from tpserve.config.schema import EngineConfig
from tpserve.coordinator.config_check import optional_mismatches, required_mismatches
from tpserve.coordinator.coordinator import Action, Coordinator, Draining, EpochFailed, EpochFinished, EpochReady, EpochState
from tpserve.coordinator.rank_monitor import KILLED_ADVICE, TICK_S, RankMonitor
from tpserve.engine_client.requests import RequestTable
from tpserve.engine_client.server_info import BROKEN, INVARIANT, NOT_PROMISED, numerics, server_info
from tpserve.engine_client.status import EngineStatus
from tpserve.errors import EngineFailure
from tpserve.observe.log import LogRingBuffer
from tpserve.process.process_utils import has_ended, open_pidfd
from tpserve.types.messages import EngineControl, EngineInput, ExpertLoad, LogLines
from tpserve.wire.channels import EngineServer, TcpEndpoint, tcp
from tpserve.wire.codec import FrameTooLarge
from tpserve.wire.curve import FRONTEND, ConnectInfo, Keyring, ZapAuthenticator

logger = logging.getLogger(__name__)

LEAVE_S = 4.0
"""How long ranks on this host have to end after Stop before they are killed; they end themselves after two seconds."""
SLOW_S = 1.0
"""A start that waits longer for ranks logs for which: within two seconds of `tpserve serve`, with the time that Python takes."""
NO_SECRET = (
    "the nodes share no --cluster-secret-file: the keys of this run travel over torchrun's store, and whoever can reach its port "
    "can take part (`tpserve secret FILE` makes a secret)"
)
_STATES: dict[EpochState, Literal["starting", "running", "draining", "stopped"]] = {
    EpochState.FORMING: "starting",
    EpochState.STARTING: "starting",
    EpochState.RUN: "running",
    EpochState.DRAINING: "draining",
    EpochState.STOPPED: "stopped",
}

EpochNews = EpochReady | EpochFailed | EpochFinished


class EngineClient:
    """See the module. Made and used inside a running event loop."""

    def __init__(
        self,
        config: EngineConfig,
        where: Path,
        remote_address: str | None,
        started_s: float,
        tell: Callable[[EpochNews], None],
        log_buffer: LogRingBuffer | None = None,
    ) -> None:
        """Bind the sockets in the runtime directory `where` and, for ranks of other nodes, on `remote_address`.

        `tell` hears that the ranks are ready and why the service ended, before any open request does. `log_buffer`: lines of
        the log,
        for operators. EngineFailure when a socket cannot be bound.
        """
        self._config = config
        self._where = where
        self._started_s = started_s
        self._tell = tell
        self._log_buffer = log_buffer
        self._watched: tuple[int, int] | None = None
        self._rank_logs = [LogRingBuffer() for _ in range(config.layout.world_size)]
        self._coordinator = Coordinator(
            config.layout.world_size,
            time.monotonic(),
            form_timeout_s=config.start_timeout,
            drain_timeout_s=config.drain_timeout,
        )
        self._remote_address = remote_address
        if remote_address is not None:
            self._keyring = Keyring.open(config.cluster_secret_file)
            self._curve_server = self._keyring.curve_server(FRONTEND, config.layout.world_size)
            self._zap_authenticator = ZapAuthenticator(self._curve_server.allowed)
            if config.cluster_secret_file is None:
                logger.warning(NO_SECRET)
        self._rank_monitor = RankMonitor(
            self._coordinator, f"ipc://{where}/control", self.tcp_endpoint(), self._on_action, self._look_at_parent
        )
        if (locked := self._rank_monitor.remote_socket) is not None:
            self._zap_authenticator.log_refusals_of(locked)
        self._engine = EngineServer(f"ipc://{where}/engine")
        self.request_table = RequestTable(self._to_engine, (config.served_model_name or (config.model,))[0])
        self._code: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    def tcp_endpoint(self) -> TcpEndpoint | None:
        """A place for processes of other nodes to come in; None where there are none."""
        return (
            None
            if self._remote_address is None
            else TcpEndpoint(tcp(self._remote_address, self._config.port_range), self._curve_server)
        )

    def connect_info(self, endpoint: str) -> ConnectInfo | None:
        """What such processes must know to come in at `endpoint`, which was bound at a door."""
        if self._remote_address is None:
            return None
        return self._keyring.connect_info(endpoint, with_secret=self._config.cluster_secret_file is None)

    def announce(self, url: str = "") -> None:
        """Tell the ranks where we are; `url`: where clients reach us, if they do."""
        rank_monitor = self._rank_monitor
        connect_info = self.connect_info(rank_monitor.remote_endpoint)
        write_frontend(
            self._where, FrontendRecord(os.getpid(), rank_monitor.local_endpoint, connect_info, self._engine.endpoint, url)
        )

    def status(self) -> EngineStatus:
        """What may be said of the engine."""
        c, facts = self._coordinator, self._coordinator.facts
        return EngineStatus(_STATES[c.state], c.phase, c.percent, c.reason, facts.get("max_model_len"), facts.get("vocab_size"))

    def info(self) -> dict[str, Any]:
        """What operators may see: of the configuration, and of every rank as far as it is known."""
        c = self._coordinator
        return server_info(self._config, self.status(), c.epoch, c.ranks, time.monotonic(), self._log_buffer, self._rank_logs)

    async def serve(self, watch_pid: int) -> int:
        """Run until the service has ended and the ranks on this host are gone; returns the exit code. The ranks die with
        the process `watch_pid`."""
        loop = asyncio.get_running_loop()
        watched = open_pidfd(watch_pid)
        if watched is None:
            self._parent_gone(watch_pid)
        else:
            self._watched = watch_pid, watched
            loop.add_reader(watched, self._parent_gone, watch_pid)
        descriptor = self._engine.socket.get(zmq.FD)
        assert isinstance(descriptor, int)
        loop.add_reader(descriptor, self._from_engine)
        tasks = [loop.create_task(self._rank_monitor.run()), loop.create_task(self._watch())]
        try:
            code = await self._ended(tasks)
            (self._where / "frontend.json").unlink(missing_ok=True)  # who comes now waits for a successor
            if not await self._rank_monitor.wait_exited(LEAVE_S) and (killed := self._rank_monitor.kill()):
                logger.warning("killed the ranks that did not end: %s", ", ".join(map(str, killed)))
            return code
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)  # while their sockets are open
            loop.remove_reader(descriptor)
            self._watched = None
            if watched is not None:
                loop.remove_reader(watched)
                os.close(watched)

    def drain(self) -> None:
        """Let open requests finish, then end with exit code 0."""
        self._rank_monitor.perform(self._coordinator.drain(time.monotonic()))

    def fail(self, code: int, reason: str, advice: str = "") -> None:
        """End at once."""
        self._rank_monitor.perform(self._coordinator.fail(code, reason, time.monotonic(), advice))

    def close(self) -> None:
        """Close the sockets."""
        if self._remote_address is not None:
            self._zap_authenticator.close()
        self._rank_monitor.close()
        self._engine.close()

    async def _ended(self, tasks: list[asyncio.Task[None]]) -> int:
        """The exit code; raises what a task of ours raised."""
        waited: list[asyncio.Future[Any]] = [self._code, *tasks]
        await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            if task.done():
                await task
        return self._code.result()

    async def _watch(self) -> None:
        """See what no event tells: that a drain has nothing open any more, what waits in a socket, which nodes or ranks are
        missing."""
        said, compared = "", False
        while True:
            self._from_engine()
            if self.request_table.num_open == 0:
                self._rank_monitor.perform(self._coordinator.drained(time.monotonic()))
            slow = self._coordinator.state is EpochState.FORMING and time.monotonic() > self._started_s + SLOW_S
            if self._coordinator.state is not EpochState.FORMING and not compared:
                compared = True
                if lines := optional_mismatches(self._coordinator.hellos):
                    logger.warning("the ranks differ in what may matter")
                    for line in lines:
                        logger.warning(line)
            if slow and self._coordinator.phase != said:
                said = self._coordinator.phase
                logger.info(said)
            await asyncio.sleep(TICK_S)

    # The engine

    def _to_engine(self, inputs: list[EngineInput]) -> None:
        try:
            self._engine.send(inputs)
        except FrameTooLarge:  # of one request, which the request table refuses
            raise
        except EngineFailure as error:
            self.fail(1, str(error))
        asyncio.get_running_loop().call_soon(self._from_engine)  # sending may have swallowed the descriptor's news

    def _from_engine(self) -> None:
        try:
            outputs = self._engine.receive()
        except EngineFailure as error:
            self.fail(1, str(error))
            return
        try:
            self.request_table.receive(outputs)
        except Exception as error:  # of no request: the loop would log it and let clients wait for ever
            logger.exception("the request table failed")
            self.fail(1, f"the frontend failed with {type(error).__name__}: {error}")

    # What ends it

    def _look_at_parent(self) -> None:
        """Before the death of a rank is told, of which the parent's may be the reason."""
        if self._watched is not None and has_ended(self._watched[1]):
            self._parent_gone(self._watched[0])

    def _parent_gone(self, pid: int) -> None:
        why = (
            f"the agent (pid {pid}) that started the ranks has ended: it, or a rank that had not come yet, was killed or crashed"
        )
        gone = AgentFailure(1, why, KILLED_ADVICE)
        failure = read_failure(self._where) or gone
        self.fail(failure.code, failure.why, failure.advice)

    def _on_action(self, action: Action) -> None:
        match action:
            case EpochReady():
                self._engine.attach(self._coordinator.hellos[0].identity)
                if (found := numerics(self._coordinator.ranks)) not in (INVARIANT, NOT_PROMISED):
                    broken = found is not None and found.startswith(BROKEN)
                    level = logging.WARNING if broken else logging.INFO
                    logger.log(level, "a request's bits may depend on the batch: %s (docs/numerics.md)", found)
                self._tell(action)
            case ExpertLoad(_, _, layers, tokens):
                self.request_table.metrics.experts(layers, tokens)
            case LogLines(rank, start, lines, last_error) if 0 <= rank < len(self._rank_logs):
                self._rank_logs[rank].take(start, lines, last_error)
            case Draining():
                self._to_engine([EngineControl("drain")])
            case EpochFailed(code, reason, _):
                for line in required_mismatches(self._coordinator.hellos):
                    logger.error(line)
                self._end(action, code, reason, 500)
            case EpochFinished():
                self._end(action, 0, self._coordinator.reason or "the server is shutting down", 503)

    def _end(self, news: EpochFailed | EpochFinished, code: int, text: str, status: int) -> None:
        self._tell(news)
        self.request_table.fail_all(text, status)
        if not self._code.done():
            self._code.set_result(code)
