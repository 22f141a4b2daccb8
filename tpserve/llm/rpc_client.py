"""Another script of a torchrun job than rank 0's: starts its rank, and returns what rank 0's script returns.

Owns the rank's process and the link to rank 0's script. It plans nothing and computes nothing. Invariant: a waiting caller gets
the answer or an exception; when its own rank ends, rank 0 has a moment to tell why.
"""

import os
import time
from collections.abc import Callable

from tpserve.errors import EngineFailure, UserError
from tpserve.llm.engine_process import EngineProcess
from tpserve.llm.outputs import RequestOutput
from tpserve.llm.rpc_server import ASK_S, RpcConnection, RpcReply
from tpserve.wire.curve import CurveClient

EXPLAIN_S = 2.0
"""How long rank 0's script has to tell why the ranks ended, which it knows at once or within some seconds."""
DRAIN_S = 30.0
"""How long after we leave the other scripts' requests may take: `drain_timeout` and some."""


class RpcClient:
    """See the module."""

    def __init__(
        self, rank: int, endpoint: str, curve_client: CurveClient | None, start_rank: Callable[[], EngineProcess]
    ) -> None:
        """Start the rank; `endpoint`: where rank 0's script is, `curve_client` to get in over TCP. `wait` for call 0 follows."""
        self._rank = rank
        self._owner_pid = os.getpid()
        self._connection: RpcConnection | None = RpcConnection(rank, endpoint, curve_client)
        self._failure: Exception | None = None
        self._told: Exception | None = None
        """What rank 0's script told last; its words for an end, once it is gone."""
        self._engine_process: EngineProcess | None = None
        try:
            self._engine_process = start_rank()
        except BaseException as error:
            self._leave(f"rank {rank}'s script cannot start its rank: {error}")
            raise

    def wait(self, call: int) -> list[RequestOutput]:
        """The answer to a call of rank 0's script, or its exception."""
        if self._failure is not None:
            raise self._failure
        if self._connection is None or self._engine_process is None:
            raise EngineFailure("the LLM is closed")
        asked_s, ended_s = -ASK_S, None
        while True:
            now = time.monotonic()
            if now - asked_s > ASK_S:
                asked_s = now
                self._connection.poll(call)
            message = self._connection.receive(call)
            if isinstance(message, RpcReply):
                self._connection.poll(call + 1)
                return message.outputs
            if message is not None:
                self._connection.poll(call + 1)
                self._told = UserError(message.text) if message.kind == "user" else EngineFailure(message.text)
                raise self._told
            if self._engine_process.code is not None:
                ended_s = ended_s or now
            if ended_s is not None and now - ended_s > EXPLAIN_S:
                code = self._engine_process.code
                said = f"rank {self._rank} ended (exit code {code}), and rank 0's script does not tell why"
                self._failure = self._told or EngineFailure(said)
                raise self._failure

    def close(self) -> None:
        """Leave, and wait for the end that all scripts' ranks come to then. Again, or in a fork of the caller: nothing."""
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
            self._engine_process.end(0.0)
