"""Between whoever has requests and the ranks: the journal, the coordinator, and the sockets of both, on one event loop.

The HTTP frontend and the offline `LLM` each own one; what differs between them is who opens tickets and what is told to whom.
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

from tpserve.config.schema import EngineConfig
from tpserve.errors import EngineFailure
from tpserve.frontend.agreement import noted, refused
from tpserve.frontend.coordinator import Action, Coordinator, Draining, Failed, Finished, Ready, State
from tpserve.frontend.journal import Journal
from tpserve.frontend.ranks import KILLED_ADVICE, TICK_S, Ranks
from tpserve.frontend.server_info import BROKEN, INVARIANT, NOT_PROMISED, numerics, server_info
from tpserve.frontend.status import Status
from tpserve.observe.log import Kept
from tpserve.types.messages import Control, EngineInput, Experts, Said
from tpserve.wire.attach import Failure, Frontend, read_failure, write
from tpserve.wire.auth import FRONTEND, Doorkeeper, Invitation, Keyring
from tpserve.wire.channels import Door, EngineServer, tcp
from tpserve.wire.codec import FrameTooLarge
from tpserve.wire.lifetime import has_ended, open_pidfd

logger = logging.getLogger(__name__)

LEAVE_S = 4.0
"""How long ranks on this host have to end after Stop before they are killed; they end themselves after two seconds."""
SLOW_S = 1.0
"""A start that waits longer for ranks logs for which: within two seconds of `tpserve serve`, with the time that Python takes."""
NO_SECRET = (
    "the nodes share no --cluster-secret-file: the keys of this run travel over torchrun's store, and whoever can reach its port "
    "can take part (`tpserve secret FILE` makes a secret)"
)
_STATES: dict[State, Literal["starting", "running", "draining", "stopped"]] = {
    State.FORMING: "starting",
    State.STARTING: "starting",
    State.RUN: "running",
    State.DRAINING: "draining",
    State.STOPPED: "stopped",
}

News = Ready | Failed | Finished


class Bridge:
    """See the module. Made and used inside a running event loop."""

    def __init__(
        self,
        config: EngineConfig,
        where: Path,
        remote_address: str | None,
        started_s: float,
        tell: Callable[[News], None],
        kept: Kept | None = None,
    ) -> None:
        """Bind the sockets in the runtime directory `where` and, for ranks of other nodes, on `remote_address`.

        `tell` hears that the ranks are ready and why the service ended, before any open request does. `kept`: lines of the log,
        for operators. EngineFailure when a socket cannot be bound.
        """
        self._config = config
        self._where = where
        self._started_s = started_s
        self._tell = tell
        self._kept = kept
        self._watched: tuple[int, int] | None = None
        self._said = [Kept() for _ in range(config.layout.world_size)]
        self._coordinator = Coordinator(
            config.layout.world_size,
            time.monotonic(),
            form_timeout_s=config.start_timeout,
            drain_timeout_s=config.drain_timeout,
        )
        self._remote_address = remote_address
        if remote_address is not None:
            self._keyring = Keyring.open(config.cluster_secret_file)
            self._lock = self._keyring.lock(FRONTEND, config.layout.world_size)
            self._doorkeeper = Doorkeeper(self._lock.allowed)
            if config.cluster_secret_file is None:
                logger.warning(NO_SECRET)
        self._ranks = Ranks(self._coordinator, f"ipc://{where}/control", self.door(), self._on_action, self._look_at_parent)
        if (locked := self._ranks.remote_socket) is not None:
            self._doorkeeper.watch(locked)
        self._engine = EngineServer(f"ipc://{where}/engine")
        self.journal = Journal(self._to_engine, (config.served_model_name or (config.model,))[0])
        self._code: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    def door(self) -> Door | None:
        """A place for processes of other nodes to come in; None where there are none."""
        return None if self._remote_address is None else Door(tcp(self._remote_address, self._config.port_range), self._lock)

    def invitation(self, endpoint: str) -> Invitation | None:
        """What such processes must know to come in at `endpoint`, which was bound at a door."""
        if self._remote_address is None:
            return None
        return self._keyring.invitation(endpoint, with_secret=self._config.cluster_secret_file is None)

    def announce(self, url: str = "") -> None:
        """Tell the ranks where we are; `url`: where clients reach us, if they do."""
        ranks = self._ranks
        invitation = self.invitation(ranks.remote_endpoint)
        write(self._where, Frontend(os.getpid(), ranks.local_endpoint, invitation, self._engine.endpoint, url))

    def status(self) -> Status:
        """What may be said of the engine."""
        c, facts = self._coordinator, self._coordinator.facts
        return Status(_STATES[c.state], c.phase, c.percent, c.reason, facts.get("max_model_len"), facts.get("vocab_size"))

    def info(self) -> dict[str, Any]:
        """What operators may see: of the configuration, and of every rank as far as it is known."""
        c = self._coordinator
        return server_info(self._config, self.status(), c.epoch, c.seen, time.monotonic(), self._kept, self._said)

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
        tasks = [loop.create_task(self._ranks.run()), loop.create_task(self._watch())]
        try:
            code = await self._ended(tasks)
            (self._where / "frontend.json").unlink(missing_ok=True)  # who comes now waits for a successor
            if not await self._ranks.all_gone(LEAVE_S) and (killed := self._ranks.kill()):
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
        self._ranks.carry_out(self._coordinator.drain(time.monotonic()))

    def fail(self, code: int, reason: str, advice: str = "") -> None:
        """End at once."""
        self._ranks.carry_out(self._coordinator.fail(code, reason, time.monotonic(), advice))

    def close(self) -> None:
        """Close the sockets."""
        if self._remote_address is not None:
            self._doorkeeper.close()
        self._ranks.close()
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
        """See what no event tells: that a drain has nothing open any more, what waits in a socket, who is waited for."""
        said, compared = "", False
        while True:
            self._from_engine()
            if self.journal.num_open == 0:
                self._ranks.carry_out(self._coordinator.drained(time.monotonic()))
            slow = self._coordinator.state is State.FORMING and time.monotonic() > self._started_s + SLOW_S
            if self._coordinator.state is not State.FORMING and not compared:
                compared = True
                if lines := noted(self._coordinator.hellos):
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
        except FrameTooLarge:  # of one request, which the journal refuses
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
            self.journal.receive(outputs)
        except Exception as error:  # of no request: the loop would log it and let clients wait for ever
            logger.exception("the journal failed")
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
        gone = Failure(1, why, KILLED_ADVICE)
        failure = read_failure(self._where) or gone
        self.fail(failure.code, failure.why, failure.advice)

    def _on_action(self, action: Action) -> None:
        match action:
            case Ready():
                self._engine.attach(self._coordinator.hellos[0].identity)
                if (found := numerics(self._coordinator.seen)) not in (INVARIANT, NOT_PROMISED):
                    broken = found is not None and found.startswith(BROKEN)
                    level = logging.WARNING if broken else logging.INFO
                    logger.log(level, "a request's bits may depend on the batch: %s (docs/numerics.md)", found)
                self._tell(action)
            case Experts(_, _, layers, tokens):
                self.journal.metrics.experts(layers, tokens)
            case Said(rank, start, lines, last_error) if 0 <= rank < len(self._said):
                self._said[rank].take(start, lines, last_error)
            case Draining():
                self._to_engine([Control("drain")])
            case Failed(code, reason, _):
                for line in refused(self._coordinator.hellos):
                    logger.error(line)
                self._end(action, code, reason, 500)
            case Finished():
                self._end(action, 0, self._coordinator.reason or "the server is shutting down", 503)

    def _end(self, news: Failed | Finished, code: int, text: str, status: int) -> None:
        self._tell(news)
        self.journal.fail_all(text, status)
        if not self._code.done():
            self._code.set_result(code)
