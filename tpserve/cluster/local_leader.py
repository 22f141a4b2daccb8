"""Share what local rank 0 looked up with the other ranks of its agent, before torch is loaded and without files.

    local rank 0    leader = LocalLeader(env, model); ...; leader.publish(files)
    other ranks     files = ask_local_leader(env, model, timeout_s)

Owns a UNIX socket in the kernel's abstract namespace, named after the agent and the model that is asked for: ranks of a reload
are not told of the model before. It exists as long as local rank 0 does, so the other ranks notice at once when local rank 0 ends
without an answer, and one that is started again is told as it was the first time. Sends one answer to whoever asks.
"""

import contextlib
import hashlib
import os
import socket
import struct
import threading
import time
from collections.abc import Iterable
from itertools import count

from msgspec import Struct, json

from tpserve.cluster.discovery import runtime_dir
from tpserve.config.env import RankEnv
from tpserve.errors import EngineFailure, UserError
from tpserve.types.model_files import ModelFiles

_POLL_S = 0.02
_ERROR_WAIT_S = 0.3


class LeaderAnswer(Struct, frozen=True):
    """The model's files, or why there are none."""

    files: ModelFiles | None = None
    error: str = ""


class LocalLeader:
    """Local rank 0's end. Ranks that connect before the answer wait in the kernel's queue. `model`: what decides the files."""

    def __init__(self, env: RankEnv, model: str) -> None:
        self._num_peers = env.local_world_size - 1
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(_address(env, model))
        self._listener.listen(env.local_world_size)

    def publish(self, files: ModelFiles) -> None:
        """Send the files to every rank that asks, in the background, for as long as this process lives."""
        threading.Thread(target=self._answer, args=(LeaderAnswer(files), count()), name="local-leader", daemon=True).start()

    def publish_error(self, error: str) -> None:
        """Send an error to the ranks that are connected, once to each. The others see the end of this process."""
        self._listener.settimeout(_ERROR_WAIT_S)
        self._answer(LeaderAnswer(error=error), range(self._num_peers))

    def _answer(self, answer: LeaderAnswer, times: Iterable[int]) -> None:
        with self._listener, contextlib.suppress(TimeoutError):
            for _ in times:
                connection = self._listener.accept()[0]
                with connection, contextlib.suppress(OSError):  # the rank has ended
                    connection.sendall(json.encode(answer))


def ask_local_leader(env: RankEnv, model: str, timeout_s: float) -> ModelFiles:
    """The model's files from local rank 0. Raises its UserError, or EngineFailure when it does not answer."""
    deadline_s = time.monotonic() + timeout_s
    with socket.socket(socket.AF_UNIX) as connection:
        while True:
            try:
                connection.connect(_address(env, model))
                break
            except ConnectionRefusedError:  # it is still starting
                if time.monotonic() > deadline_s:
                    raise EngineFailure(f"the first rank of this node did not start within {timeout_s:g} s") from None
                time.sleep(_POLL_S)
        owner = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))[1]
        if owner != os.getuid():
            raise EngineFailure(f"user {owner} answers in the place of this node's first rank")
        reply = bytearray()
        try:
            connection.settimeout(max(deadline_s - time.monotonic(), _POLL_S))
            while part := connection.recv(1 << 16):
                reply += part
        except (TimeoutError, ConnectionResetError):
            reply.clear()
    if not reply:
        raise EngineFailure("the first rank of this node ended, or was too slow, before it had found the model")
    answer = json.decode(reply, type=LeaderAnswer)
    if answer.files is None:
        raise UserError(answer.error)
    return answer.files


def _address(env: RankEnv, model: str) -> str:
    """An abstract socket name that is unique to the ranks of this agent and what they look for."""
    return "\0tpserve-" + hashlib.sha256(bytes(runtime_dir(env)) + b"\0" + model.encode()).hexdigest()[:32]
