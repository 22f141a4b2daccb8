"""How the ranks of one agent learn what only the first of them looked up, before torch is there and with nothing on the disk.

    local rank 0    leader = LocalLeader(name, siblings); ...; leader.publish(answer)
    the others      ask(name, timeout_s)

The way is a UNIX socket in the kernel's abstract namespace, named after the agent: it exists as long as the first rank does,
and a rank that asks is told at once when the first one ends without an answer. Never carries more than one answer.
"""

import contextlib
import hashlib
import os
import socket
import struct
import threading
import time

from msgspec import Struct, json

from tpserve.cluster.discovery import runtime_dir
from tpserve.config.env import RankEnv
from tpserve.errors import EngineFailure, UserError
from tpserve.types.model_files import ModelFiles

_POLL_S = 0.02
_LAST_WORD_S = 0.3


class LeaderAnswer(Struct, frozen=True):
    """What the first rank found, or why it cannot be had."""

    files: ModelFiles | None = None
    error: str = ""


class LocalLeader:
    """The first rank's end. Those who ask before there is an answer wait in the kernel's queue."""

    def __init__(self, env: RankEnv) -> None:
        self._siblings = env.local_world_size - 1
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(_address(env))
        self._listener.listen(env.local_world_size)

    def publish(self, files: ModelFiles) -> None:
        """Answer everybody, now and when they come."""
        threading.Thread(target=self._answer, args=(LeaderAnswer(files),), name="local-leader", daemon=True).start()

    def publish_error(self, error: str) -> None:
        """Answer those who have asked; the others end with this process."""
        self._listener.settimeout(_LAST_WORD_S)
        self._answer(LeaderAnswer(error=error))

    def _answer(self, answer: LeaderAnswer) -> None:
        with self._listener, contextlib.suppress(TimeoutError):
            for _ in range(self._siblings):
                asking = self._listener.accept()[0]
                with asking, contextlib.suppress(OSError):  # it has ended
                    asking.sendall(json.encode(answer))


def ask_local_leader(env: RankEnv, timeout_s: float) -> ModelFiles:
    """What the first rank of this node found. UserError when it says so, EngineFailure when it says nothing."""
    deadline_s = time.monotonic() + timeout_s
    with socket.socket(socket.AF_UNIX) as asking:
        while True:
            try:
                asking.connect(_address(env))
                break
            except ConnectionRefusedError:  # it is still starting
                if time.monotonic() > deadline_s:
                    raise EngineFailure(f"the first rank of this node did not start within {timeout_s:g} s") from None
                time.sleep(_POLL_S)
        owner = struct.unpack("3i", asking.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))[1]
        if owner != os.getuid():
            raise EngineFailure(f"user {owner} answers in the place of this node's first rank")
        told = bytearray()
        try:
            asking.settimeout(max(deadline_s - time.monotonic(), _POLL_S))
            while part := asking.recv(1 << 16):
                told += part
        except (TimeoutError, ConnectionResetError):
            told.clear()
    if not told:
        raise EngineFailure("the first rank of this node ended, or was too slow, before it had found the model")
    answer = json.decode(told, type=LeaderAnswer)
    if answer.files is None:
        raise UserError(answer.error)
    return answer.files


def _address(env: RankEnv) -> str:
    """A name that only the ranks of this agent can mean."""
    return "\0tpserve-" + hashlib.sha256(bytes(runtime_dir(env))).hexdigest()[:32]
