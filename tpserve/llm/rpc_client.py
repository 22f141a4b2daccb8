"""The `LLM` of a script other than rank 0's in a torchrun job: starts its rank, and returns what rank 0's script returns.

Owns the rank's process and the connection to rank 0's script. Never schedules and never computes. Invariant: a waiting caller
gets the outputs or an exception. When this script's rank ends, rank 0's script has `EXPLAIN_S` to send the reason.
"""

import os
import time
from collections.abc import Callable

from tpserve.errors import EngineFailure, UserError
from tpserve.llm.engine_process import EngineProcess
from tpserve.llm.outputs import RequestOutput
from tpserve.llm.rpc_server import REPOLL_S, RpcConnection, RpcReply
from tpserve.wire.curve import CurveClient

EXPLAIN_S = 2.0
"""Time for rank 0's script to send the reason why the ranks ended. It knows the reason at once or within some seconds."""
DRAIN_S = 30.0
"""Time for the open requests of other scripts after this one leaves: `drain_timeout` and a margin."""


class RpcClient:
    """The follower's part of an `LLM`."""

    def __init__(
        self, rank: int, endpoint: str, curve_client: CurveClient | None, start_rank: Callable[[], EngineProcess]
    ) -> None:
        """Start the rank and connect to rank 0's script at `endpoint`, over TCP with the keys `curve_client`. The caller then
        calls `wait(0)`."""
        self._rank = rank
        self._owner_pid = os.getpid()
        self._connection: RpcConnection | None = RpcConnection(rank, endpoint, curve_client)
        self._failure: Exception | None = None
        self._last_error: Exception | None = None
        """The last error from rank 0's script. It becomes the reason when that script has ended."""
        self._engine_process: EngineProcess | None = None
        try:
            self._engine_process = start_rank()
        except BaseException as error:
            self._leave(f"rank {rank}'s script cannot start its rank: {error}")
            raise

    def wait(self, call: int) -> list[RequestOutput]:
        """Returns the outputs of call `call` of rank 0's script, or raises its exception."""
        if self._failure is not None:
            raise self._failure
        if self._connection is None or self._engine_process is None:
            raise EngineFailure("the LLM is closed")
        polled_s, ended_s = -REPOLL_S, None
        while True:
            now = time.monotonic()
            if now - polled_s > REPOLL_S:
                polled_s = now
                self._connection.poll(call)
            message = self._connection.receive(call)
            if isinstance(message, RpcReply):
                self._connection.poll(call + 1)
                return message.outputs
            if message is not None:
                self._connection.poll(call + 1)
                self._last_error = UserError(message.text) if message.kind == "user" else EngineFailure(message.text)
                raise self._last_error
            if self._engine_process.exit_code is not None:
                ended_s = ended_s or now
            if ended_s is not None and now - ended_s > EXPLAIN_S:
                code = self._engine_process.exit_code
                text = f"rank {self._rank} ended (exit code {code}), and rank 0's script sent no reason"
                self._failure = self._last_error or EngineFailure(text)
                raise self._failure

    def close(self) -> None:
        """Leave the job, and wait until this rank has ended, as the ranks of all scripts do then. A second call, or a call in a
        fork of the caller, does nothing."""
        if os.getpid() == self._owner_pid:
            self._leave(f"the script of rank {self._rank} has closed its LLM")

    def _leave(self, text: str) -> None:
        if self._connection is None:
            return
        self._connection.leave(text)
        self._connection.close()
        self._connection = None
        if self._engine_process is not None:
            self._engine_process.wait(DRAIN_S)
            self._engine_process.terminate(0.0)
