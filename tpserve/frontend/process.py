"""The frontend as a process: its sockets, its event loop and its exit code.

    HTTP      clients          listening before anything else is looked at, so that a port in use is known at once
    control   every rank       `Ranks`, which runs the coordinator
    engine    rank 0           the journal's requests out, tokens in
    watched   the agent or the supervisor: a pidfd; when it ends, so does this process

Owns the order of coming and going and decides nothing about requests. Clients' sockets live here, so they outlive a crash of the
ranks. Invariants: frontend.json is written only once every socket is bound, or with the line that says why not; whatever ends the
service, open requests get their answer first, the ranks are told and given time to leave, and the runtime directory goes away.
"""

import asyncio
import contextlib
import errno
import ipaddress
import logging
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any, Literal

import msgspec
import uvloop
import zmq
from aiohttp import web

from tpserve.config.schema import EngineConfig
from tpserve.errors import EngineFailure, UserError
from tpserve.frontend.app import create_app, runner
from tpserve.frontend.coordinator import Action, Coordinator, Draining, Failed, Finished, Ready, State
from tpserve.frontend.journal import Journal
from tpserve.frontend.ranks import TICK_S, Ranks
from tpserve.frontend.status import Status
from tpserve.observe import log
from tpserve.text.chat import ChatTemplate
from tpserve.text.tokenizer import Tokenizer
from tpserve.types.messages import Control, EngineInput
from tpserve.wire.attach import Frontend, hold_lock, remove_runtime_dir, write
from tpserve.wire.channels import EngineServer, tcp
from tpserve.wire.control import SAME_SIGNAL_S, SIGNALS, unblock_signals
from tpserve.wire.lifetime import open_pidfd

logger = logging.getLogger(__name__)

LEAVE_S = 4.0
"""How long ranks on this host have to end after Stop before they are killed; they end themselves after two seconds."""
ANSWER_S = 2.0
"""How long the last answers have to reach their clients."""
SLOW_S = 5.0
"""Who starts all nodes at once hears nothing of waiting; who waits longer than this is told for whom."""
_STATES: dict[State, Literal["starting", "running", "draining", "stopped"]] = {
    State.FORMING: "starting",
    State.STARTING: "starting",
    State.RUN: "running",
    State.DRAINING: "draining",
    State.STOPPED: "stopped",
}


def main(arguments: list[str]) -> int:
    """Serve until told to end; returns the exit code: 0 after a drain, 1 engine failure, 2 user error."""
    started_s = time.monotonic()
    unblock_signals()  # inherited from the rank that started us
    where, watch_pid, nnodes, address = Path(arguments[0]), int(arguments[1]), int(arguments[2]), arguments[3]
    config = msgspec.json.decode(sys.stdin.buffer.read(), type=EngineConfig)
    log.setup(config.log_level, "frontend")
    try:
        lock = hold_lock(where)
    except BlockingIOError:
        logger.error("another frontend lives in %s", where)
        return 1
    try:
        code = uvloop.run(_run(config, where, watch_pid, nnodes, address, started_s))
    except UserError as error:
        return _report(where, str(error), 2)
    except EngineFailure as error:
        return _report(where, str(error), 1)
    remove_runtime_dir(where)
    os.close(lock)
    return code


def _report(where: Path, error: str, code: int) -> int:
    """Tell whoever spawned us why nothing came of it; it prints the line and clears the directory."""
    write(where, Frontend(os.getpid(), error=error, code=code))
    return code


async def _run(config: EngineConfig, where: Path, watch_pid: int, nnodes: int, address: str, started_s: float) -> int:
    with listen(config.host, config.port) as listener:
        url = http_url(config.host, listener.getsockname()[1])
        service = Service(config, where, nnodes, address, url, started_s)
        server = runner(service.app)
        await server.setup()
        await web.SockSite(server, listener).start()
        if config.api_key is None and not ipaddress.ip_address(listener.getsockname()[0]).is_loopback:
            logger.warning("anyone who can reach %s may use it: set --api-key, or listen on 127.0.0.1", url)
        service.announce()
        code = await service.serve(watch_pid)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(server.cleanup(), ANSWER_S)
        service.close()
        return code


class Service:
    """Everything between the application and the ranks."""

    def __init__(self, config: EngineConfig, where: Path, nnodes: int, address: str, url: str, started_s: float) -> None:
        """Bind the sockets and load the tokenizer. UserError or EngineFailure when that cannot be."""
        self._config = config
        self._where = where
        self._nnodes = nnodes
        self._url = url
        self._started_s = started_s
        self._signalled_s: float | None = None
        self._coordinator = Coordinator(
            config.layout.world_size,
            time.monotonic(),
            form_timeout_s=config.start_timeout,
            drain_timeout_s=config.drain_timeout,
        )
        remote = tcp(address) if nnodes > 1 else None
        self._ranks = Ranks(self._coordinator, f"ipc://{where}/control", remote, self._on_action)
        self._engine = EngineServer(f"ipc://{where}/engine")
        self._journal = Journal(self._to_engine, (config.served_model_name or (config.model,))[0])
        tokenizer, template = Tokenizer.load(config.tokenizer), ChatTemplate.load(config.tokenizer, config.chat_template)
        self.app = create_app(config, self._journal, self.status, tokenizer, template)
        self._code: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    def announce(self) -> None:
        """Tell the ranks where we are."""
        ranks = self._ranks
        write(self._where, Frontend(os.getpid(), ranks.local_endpoint, ranks.remote_endpoint, self._engine.endpoint, self._url))

    def status(self) -> Status:
        """What the HTTP side may say of the engine."""
        c, facts = self._coordinator, self._coordinator.facts
        return Status(_STATES[c.state], c.phase, c.percent, c.reason, facts.get("max_model_len"), facts.get("vocab_size"))

    async def serve(self, watch_pid: int) -> int:
        """Run until the service has ended and the ranks on this host are gone; returns the exit code."""
        loop = asyncio.get_running_loop()
        for number in SIGNALS:
            loop.add_signal_handler(number, self._on_signal)
        watched = open_pidfd(watch_pid)
        if watched is None:
            self._agent_gone(watch_pid)
        else:
            loop.add_reader(watched, self._agent_gone, watch_pid)
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
            loop.remove_reader(descriptor)
            if watched is not None:
                loop.remove_reader(watched)

    def close(self) -> None:
        """Close the sockets."""
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
        said = ""
        while True:
            self._from_engine()
            if self._journal.num_open == 0:
                self._ranks.carry_out(self._coordinator.drained(time.monotonic()))
            slow = self._coordinator.state is State.FORMING and time.monotonic() > self._started_s + SLOW_S
            if slow and self._coordinator.phase != said:
                said = self._coordinator.phase
                logger.info(said)
            await asyncio.sleep(TICK_S)

    # The engine

    def _to_engine(self, inputs: list[EngineInput]) -> None:
        try:
            self._engine.send(inputs)
        except EngineFailure as error:
            self._fail(1, str(error))
        asyncio.get_running_loop().call_soon(self._from_engine)  # sending may have swallowed the descriptor's news

    def _from_engine(self) -> None:
        try:
            outputs = self._engine.receive()
        except EngineFailure as error:
            self._fail(1, str(error))
            return
        try:
            self._journal.receive(outputs)
        except Exception:  # the edge towards the loop, which would log it and let clients wait for ever
            logger.exception("the journal failed")
            self._fail(1, "the server met an error of its own (see its log)")

    # What ends it

    def _on_signal(self) -> None:
        now = time.monotonic()
        if self._signalled_s is None:
            self._signalled_s = now
            logger.info("draining: %d open requests", self._journal.num_open)
            self._ranks.carry_out(self._coordinator.drain(now))
        elif now - self._signalled_s > SAME_SIGNAL_S:
            self._fail(1, "ended at once by a second signal")

    def _agent_gone(self, pid: int) -> None:
        self._fail(1, f"the agent (pid {pid}) that started the ranks is gone")

    def _fail(self, code: int, reason: str) -> None:
        self._ranks.carry_out(self._coordinator.fail(code, reason, time.monotonic()))

    def _on_action(self, action: Action) -> None:
        match action:
            case Ready():
                incarnation = self._coordinator.hellos[0].incarnation
                self._engine.attach(incarnation)
                logger.info(ready_line(self._config, self._nnodes, self._url, time.monotonic() - self._started_s))
            case Draining():
                self._to_engine([Control("drain")])
            case Failed(code, reason):
                if code == 2:
                    sys.stderr.write(log.user_error(reason) + "\n")
                else:
                    logger.error(reason)
                self._end(code, reason, 500)
            case Finished():
                self._end(0, self._coordinator.reason or "the server is shutting down", 503)

    def _end(self, code: int, text: str, status: int) -> None:
        self._journal.fail_all(text, status)
        if not self._code.done():
            self._code.set_result(code)


def listen(host: str, port: int) -> socket.socket:
    """Open the HTTP port, so that clients can connect from the first moment. UserError when it is taken or not ours."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.socket(family, kind, proto)
    except socket.gaierror as error:
        raise UserError(f"--host {host} is no address of this machine: {error.strerror}", param="host") from error
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        listener.listen(1024)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise UserError(f"port {port} on {host} is in use: choose another with --port", param="port") from error
        raise UserError(f"cannot listen on {host} port {port}: {error.strerror}", param="port") from error
    listener.setblocking(False)
    return listener


def http_url(host: str, port: int) -> str:
    """The address to paste."""
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{shown}:{port}"


def ready_line(config: EngineConfig, nnodes: int, url: str, took_s: float) -> str:
    """The line that says it is done: what is served, where, and on what."""
    layout = config.layout
    noun = "GPU" if config.device == "cuda" else "CPU rank"
    ranks = f"{layout.world_size} {noun}{'s' * (layout.world_size > 1)} on {nnodes} node{'s' * (nnodes > 1)}"
    model = (config.served_model_name or (config.model,))[0]
    return f"tpserve ready: {model} on {url}, {ranks}, TP {layout.tp} x PP {layout.pp}, {took_s:.0f} s"
