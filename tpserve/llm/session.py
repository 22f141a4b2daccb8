"""The frontend's part, played inside the caller's process: a thread with an event loop that owns the engine client to the ranks.

Owns the runtime directory, the thread, the child that starts the ranks, and the reason for their end. The caller is never a rank:
a caller that sits in a collective with a dead peer could neither raise nor be interrupted. Invariants: whatever the thread or the
ranks do, a waiting caller gets an answer or an exception; `close` leaves no process, no socket and no directory of this session,
nor does a SIGKILL (`TempdirReaper`).
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
from tpserve.config.schema import EngineConfig
from tpserve.coordinator.coordinator import EpochFailed, EpochFinished, EpochReady
from tpserve.engine_client.engine_client import EngineClient, EpochNews
from tpserve.errors import EngineFailure, UserError
from tpserve.llm.engine_process import EngineProcess
from tpserve.llm.rpc_server import RpcError, RpcReply, RpcServer
from tpserve.llm.tempdir_reaper import TempdirReaper
from tpserve.wire.curve import ConnectInfo

logger = logging.getLogger(__name__)

T = TypeVar("T")

LOOK_S = 0.1
"""How often a waiting caller looks up: for its progress bar, and whether the session lives."""
CHILD_S = 3.0
"""How long the agent has to end once its ranks have."""
TOLD_S = 5.0
"""How long other scripts of a torchrun job have to fetch the last answer."""
_CLOSED = EpochFailed(1, "the LLM is closed")
_TOLD = EpochFailed(1, "the ranks have ended: somebody sent them SIGTERM")


class Session:
    """See the module. Methods are for the caller's threads."""

    def __init__(
        self,
        config: EngineConfig,
        where: Path,
        start_ranks: Callable[[], EngineProcess],
        *,
        remote: str | None = None,
        followers: int = 0,
    ) -> None:
        """Nothing is begun yet. `where`: the runtime directory to make. `remote`: our address for ranks of other nodes.
        `followers`: scripts of the same torchrun job that fetch their answers here."""
        self._config = config
        self._where = where
        self._start_ranks = start_ranks
        self._remote = remote
        self._num_followers = followers
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

    def begin(self) -> None:
        """Start the thread; `wait_ready` follows. Whatever interrupts this, `close` takes back."""
        self._tempdir_reaper = TempdirReaper(self._where)
        make_runtime_dir(self._where)
        (self._where / "frontend.json").unlink(missing_ok=True)  # of a session that was killed with all its processes
        self._lock = acquire_lock(self._where)
        self._thread = threading.Thread(target=self._live, name="tpserve session", daemon=True)
        self._thread.start()

    def wait_bound(self) -> ConnectInfo | None:
        """Wait until the sockets are there; returns what followers of other nodes need to find us."""
        while not self._bound.wait(LOOK_S):
            self._raise_if_ended()
        if self._rpc_server is None or self._engine_client is None:
            return None
        return self._engine_client.connect_info(self._rpc_server.remote_endpoint)

    def wait_ready(self) -> None:
        """Wait until the ranks are. UserError or EngineFailure with the reason when they will not be."""
        while not self._ready.wait(LOOK_S):
            self._raise_if_ended()

    def run(self, work: Callable[[EngineClient], Coroutine[Any, Any, T]], look: Callable[[], None]) -> T:
        """Run `work` on the session's loop and wait for it, calling `look` now and then. An exception here, such as Ctrl-C,
        cancels it. EngineFailure when the ranks have ended."""
        self._raise_if_ended()
        assert self._loop is not None and self._engine_client is not None
        coroutine = work(self._engine_client)
        try:
            future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        except RuntimeError:  # the loop has closed
            coroutine.close()
            raise self._reason() from None
        try:
            while not _done(future, LOOK_S):
                look()
                if self._ended.is_set() and not _done(future, LOOK_S):
                    raise self._reason()
            return future.result()
        except CancelledError:
            raise self._reason() from None
        except BaseException:
            future.cancel()
            raise

    def tell_followers(self, message: RpcReply | RpcError) -> None:
        """Let the other scripts return or raise the same. Without any, or when all is over, nothing happens."""
        if self._rpc_server is not None and self._loop is not None:
            try:
                self._loop.call_soon_threadsafe(self._rpc_server.reply, message)
            except RuntimeError:  # the loop has closed meanwhile
                logger.debug("call %d was not told", message.call)

    def close(self) -> None:
        """End the ranks and wait for it. Again, or in a fork of the caller: nothing."""
        if os.getpid() != self._owner_pid or self._closed:
            return
        self._closed = True
        if self._thread is not None:
            self._end_thread(self._thread)
        if self._lock < 0:
            with contextlib.suppress(OSError):  # not made, or another's
                self._lock = acquire_lock(self._where)
        if self._lock >= 0:
            remove_runtime_dir(self._where)
            os.close(self._lock)
        if self._tempdir_reaper is not None:
            self._tempdir_reaper.end()

    def _end_thread(self, thread: threading.Thread) -> None:
        while not (self._bound.wait(LOOK_S) or self._ended.is_set()):  # it has just begun
            if thread.ident is None:
                return  # or was kept from it
        try:
            if self._loop is not None:
                self._loop.call_soon_threadsafe(self._close_bridge)
        except RuntimeError:
            logger.debug("the session ended by itself")
        thread.join()

    def _close_bridge(self) -> None:
        if self._engine_client is not None:
            self._engine_client.request_table.fail_all("the LLM was closed", 503)
            self._engine_client.drain()

    def _raise_if_ended(self) -> None:
        if os.getpid() != self._owner_pid:
            raise UserError("an LLM answers in the process that made it, and not in a fork of that: make one there")
        if self._failure is not None or self._ended.is_set():
            raise self._reason()

    def _reason(self) -> UserError | EngineFailure:
        why = self._failure or _CLOSED
        return UserError(why.reason) if why.code == 2 else EngineFailure(why.reason)

    # The thread

    def _live(self) -> None:
        """The edge of the thread: what fails here is what the caller gets."""
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
        with contextlib.closing(
            EngineClient(self._config, self._where, self._remote, time.monotonic(), self._tell)
        ) as self._engine_client:
            if not self._num_followers:
                await self._serve_ranks(self._engine_client)
                return
            rpc_server = RpcServer(self._num_followers, f"ipc://{self._where}/callers", self._engine_client.tcp_endpoint())
            with contextlib.closing(rpc_server) as self._rpc_server:
                hearing = self._loop.create_task(self._serve_followers(self._rpc_server, self._engine_client))
                await self._serve_ranks(self._engine_client)
                hearing.cancel()
                why = self._failure or _CLOSED
                reason = "rank 0's script has closed its LLM" if why is _CLOSED else why.reason
                self._rpc_server.end("user" if why.code == 2 else "engine", reason)
                await self._rpc_server.wait_delivered(TOLD_S)

    async def _serve_ranks(self, engine_client: EngineClient) -> None:
        engine_client.announce()
        self._bound.set()
        engine_process = self._start_ranks()
        try:
            await engine_client.serve(engine_process.pid)
        finally:
            engine_process.end(CHILD_S)

    async def _serve_followers(self, rpc_server: RpcServer, engine_client: EngineClient) -> None:
        """What the other scripts want, until cancelled."""
        while True:
            rpc_server.read()
            if rpc_server.left is not None:
                self._failure = self._failure or EpochFailed(1, rpc_server.left.text)
                engine_client.drain()
            await asyncio.sleep(LOOK_S / 10)

    def _tell(self, news: EpochNews) -> None:
        match news:
            case EpochReady():
                self._ready.set()
            case EpochFailed():
                self._failure = self._failure or news
            case EpochFinished():
                self._failure = self._failure or (_CLOSED if self._closed else _TOLD)


def _done(future: "Future[Any]", timeout_s: float) -> bool:
    """Whether the work has ended, by itself or not, within `timeout_s`."""
    try:
        future.exception(timeout_s)
    except TimeoutError:
        return future.done()
    except CancelledError:
        return True
    return True
