"""The frontend's part inside the caller's process: a thread with an event loop that owns the engine client.

Owns the runtime directory, the thread, the child process that starts the ranks, and the reason of their end. The caller is never
a rank, since a caller inside a collective with a dead peer could neither raise nor be interrupted. Invariants: whatever the
thread or the ranks do, a waiting caller gets outputs or an exception; `close` leaves no process, no socket and no directory of
this session, and neither does a SIGKILL (`TempdirReaper`).
"""

import asyncio
import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import CancelledError, Future, TimeoutError
from pathlib import Path
from typing import Any, TypeVar

import uvloop

from tpserve.cluster.discovery import acquire_lock, make_runtime_dir, remove_runtime_dir
from tpserve.config.engine_config import EngineConfig
from tpserve.coordinator.actions import EpochFailed, EpochFinished, EpochReady
from tpserve.engine_client.engine_client import EngineClient, EpochNews
from tpserve.errors import EngineFailure, UserError
from tpserve.llm.engine_process import EngineProcess
from tpserve.llm.rpc_server import RpcError, RpcReply, RpcServer
from tpserve.llm.tempdir_reaper import TempdirReaper
from tpserve.wire.curve import ConnectInfo

logger = logging.getLogger(__name__)

T = TypeVar("T")

POLL_S = 0.1
"""Interval at which a waiting caller updates its progress bar and checks that the session is alive."""
AGENT_EXIT_S = 3.0
"""Time for the agent to end after its ranks have ended."""
DELIVERY_S = 5.0
"""Time for the other scripts of a torchrun job to fetch the last reply."""
_CLOSED = EpochFailed(1, "the LLM is closed")
_TERMINATED = EpochFailed(1, "the ranks have ended: somebody sent them SIGTERM")


class Session:
    """The session of one `LLM`. Public methods are for the caller's threads."""

    def __init__(
        self,
        config: EngineConfig,
        runtime_dir: Path,
        start_ranks: Callable[[], EngineProcess],
        *,
        remote: str | None = None,
        num_followers: int = 0,
        restarts: bool = True,
    ) -> None:
        """Starts nothing yet. `runtime_dir`: the directory to create. `remote`: this host's address for ranks of other nodes.
        `num_followers`: scripts of the same torchrun job that fetch their replies here. `restarts`: an agent starts dead ranks
        again, which a script under torchrun does not do for its rank."""
        self._config = config
        self._runtime_dir = runtime_dir
        self._start_ranks = start_ranks
        self._remote = remote
        self._num_followers = num_followers
        self._restarts = restarts
        self._owner_pid = os.getpid()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._engine_client: EngineClient | None = None
        self._rpc_server: RpcServer | None = None
        self._bound = threading.Event()
        self._ready = threading.Event()
        self._ended = threading.Event()
        self._failure: EpochFailed | None = None
        self._thread: threading.Thread | None = None
        self._tempdir_reaper: TempdirReaper | None = None
        self._lock = -1
        self._closed = False

    def start(self) -> None:
        """Start the thread; the caller then calls `wait_ready`. After an exception here, `close` cleans up."""
        self._tempdir_reaper = TempdirReaper(self._runtime_dir)
        make_runtime_dir(self._runtime_dir)
        (self._runtime_dir / "frontend.json").unlink(missing_ok=True)  # of a session that was killed with all its processes
        self._lock = acquire_lock(self._runtime_dir)
        self._thread = threading.Thread(target=self._run_thread, name="tpserve session", daemon=True)
        self._thread.start()

    def wait_bound(self) -> ConnectInfo | None:
        """Wait until the sockets are bound. Returns the address and keys for followers of other nodes; None without followers."""
        while not self._bound.wait(POLL_S):
            self._raise_if_ended()
        if self._rpc_server is None or self._engine_client is None:
            return None
        return self._engine_client.connect_info(self._rpc_server.remote_endpoint)

    def wait_ready(self) -> None:
        """Wait until the ranks are ready. Raises UserError or EngineFailure with the reason when they fail."""
        while not self._ready.wait(POLL_S):
            self._raise_if_ended()

    def run(self, work: Callable[[EngineClient], Coroutine[Any, Any, T]], on_poll: Callable[[], None]) -> T:
        """Run `work` on the session's loop and wait for its result, calling `on_poll` every `POLL_S` seconds.

        An exception on this thread, such as KeyboardInterrupt, cancels the work. Raises EngineFailure when the ranks have ended.
        """
        self._raise_if_ended()
        assert self._loop is not None and self._engine_client is not None
        coroutine = work(self._engine_client)
        try:
            future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        except RuntimeError:  # the loop has closed
            coroutine.close()
            raise self._reason() from None
        try:
            while not _done(future, POLL_S):
                on_poll()
                if self._ended.is_set() and not _done(future, POLL_S):
                    raise self._reason()
            return future.result()
        except CancelledError:
            raise self._reason() from None
        except BaseException:
            future.cancel()
            raise

    def send_to_followers(self, message: RpcReply | RpcError) -> None:
        """Make the other scripts return or raise the same. Does nothing without followers or after the session has ended."""
        if self._rpc_server is not None and self._loop is not None:
            try:
                self._loop.call_soon_threadsafe(self._rpc_server.reply, message)
            except RuntimeError:  # the loop has closed
                logger.debug("the reply to call %d was not sent", message.call)

    def close(self) -> None:
        """End the ranks and wait until they have ended. A second call, or a call in a fork of the caller, does nothing."""
        if os.getpid() != self._owner_pid or self._closed:
            return
        self._closed = True
        if self._thread is not None:
            self._end_thread(self._thread)
        if self._lock < 0:
            with contextlib.suppress(OSError):  # no such directory, or another process holds it
                self._lock = acquire_lock(self._runtime_dir)
        if self._lock >= 0:
            remove_runtime_dir(self._runtime_dir)
            os.close(self._lock)
        if self._tempdir_reaper is not None:
            self._tempdir_reaper.close()

    def _end_thread(self, thread: threading.Thread) -> None:
        while not (self._bound.wait(POLL_S) or self._ended.is_set()):  # the thread may still be starting
            if thread.ident is None:
                return  # it never started
        try:
            if self._loop is not None:
                self._loop.call_soon_threadsafe(self._drain)
        except RuntimeError:
            logger.debug("the session ended by itself")
        thread.join()

    def _drain(self) -> None:
        if self._engine_client is not None:
            self._engine_client.request_table.fail_all("the LLM was closed", 503)
            self._engine_client.drain()

    def _raise_if_ended(self) -> None:
        if os.getpid() != self._owner_pid:
            raise UserError("an LLM works only in the process that made it, not in a fork: make another one there")
        if self._failure is not None or self._ended.is_set():
            raise self._reason()

    def _reason(self) -> UserError | EngineFailure:
        why = self._failure or _CLOSED
        return UserError(why.reason) if why.code == 2 else EngineFailure(why.reason)

    # On the session's thread

    def _run_thread(self) -> None:
        """The thread's main function. An exception here becomes the caller's."""
        try:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(self._serve())
        except BaseException as error:
            logger.debug("the session failed", exc_info=True)
            kind = 2 if isinstance(error, UserError) else 1
            self._failure = self._failure or EpochFailed(kind, str(error) or type(error).__name__)
        finally:
            self._ended.set()

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        client = EngineClient(
            self._config, self._runtime_dir, self._remote, time.monotonic(), self._on_news, restarts=self._restarts
        )
        with contextlib.closing(client) as self._engine_client:
            if not self._num_followers:
                await self._serve_ranks(self._engine_client)
                return
            rpc_server = RpcServer(self._num_followers, f"ipc://{self._runtime_dir}/callers", self._engine_client.tcp_endpoint())
            with contextlib.closing(rpc_server) as self._rpc_server:
                follower_task = self._loop.create_task(self._serve_followers(self._rpc_server, self._engine_client))
                await self._serve_ranks(self._engine_client)
                follower_task.cancel()
                why = self._failure or _CLOSED
                reason = "rank 0's script has closed its LLM" if why is _CLOSED else why.reason
                self._rpc_server.end("user" if why.code == 2 else "engine", reason)
                await self._rpc_server.wait_delivered(DELIVERY_S)

    async def _serve_ranks(self, engine_client: EngineClient) -> None:
        engine_client.announce()
        self._bound.set()
        engine_process = self._start_ranks()
        try:
            await engine_client.serve(engine_process.pid)
        finally:
            engine_process.terminate(AGENT_EXIT_S)

    async def _serve_followers(self, rpc_server: RpcServer, engine_client: EngineClient) -> None:
        """Answer the other scripts, until cancelled. When one leaves, the session drains."""
        while True:
            rpc_server.read()
            if rpc_server.first_close is not None:
                self._failure = self._failure or EpochFailed(1, rpc_server.first_close.text)
                engine_client.drain()
            await asyncio.sleep(POLL_S / 10)

    def _on_news(self, news: EpochNews) -> None:
        match news:
            case EpochReady():
                self._ready.set()
            case EpochFailed():
                self._failure = self._failure or news
            case EpochFinished():
                self._failure = self._failure or (_CLOSED if self._closed else _TERMINATED)


def _done(future: "Future[Any]", timeout_s: float) -> bool:
    """Whether the future is done, by its result, an exception or a cancellation, within `timeout_s`."""
    try:
        future.exception(timeout_s)
    except TimeoutError:
        return future.done()
    except CancelledError:
        return True
    return True
