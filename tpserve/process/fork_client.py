"""The caller's side of a forkserver (`tpserve.forkserver`): a process that has imported torch and forks others on request.

    caller        -> ForkRequest   in a memfd, since an environment may be large, with the descriptors for the new process
    forkserver    -> ForkReply     the process id, or why there is none; in the order of the requests

Owns the caller's end of a socket pair. The new process is adopted by the caller, which must be its nearest child subreaper and
waits for it as for its own child. It dies with the caller, and not with the forkserver.
"""

import contextlib
import ctypes
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence

import msgspec
from msgspec import Struct

MAX_REPLY_BYTES = 1 << 16
LAST_REPLY_S = 1.0
FIRST_DESCRIPTOR = 3
"""The number that the first of the further descriptors has in the new process; the others follow."""
_PR_SET_CHILD_SUBREAPER = 36


class ForkRequest(Struct, frozen=True):
    """Run `module.main(argv)` in a new process. `variables`: all of its environment. `name`: what `ps -o comm` shows."""

    module: str
    argv: list[str]
    variables: dict[bytes, bytes]
    parent_pid: int
    name: str

    @classmethod
    def of(cls, module: str, argv: Sequence[str], environ: Mapping[str, str], name: str) -> "ForkRequest":
        """A request of this process."""
        encoded = {os.fsencode(key): os.fsencode(value) for key, value in environ.items()}
        return cls(module, list(argv), encoded, os.getpid(), name)


class ForkReply(Struct, frozen=True):
    """The new process, or the `error` that prevents it."""

    pid: int = 0
    error: str = ""


class ForkserverLost(Exception):
    """The forkserver has ended."""


class ForkClient:
    """A running forkserver. `process` is set when it was started by `spawn`, and else this process has forked it."""

    def __init__(self, pid: int, connection: socket.socket, process: "subprocess.Popen[bytes] | None" = None) -> None:
        self.pid = pid
        self._connection = connection
        self._process = process
        connection.setblocking(False)

    @classmethod
    def spawn(cls, environ: Mapping[str, str], shown: Sequence[str] = ()) -> "ForkClient":
        """Start a forkserver as a new program. `shown`: arguments that have no effect but tell in `ps` whose it is."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            command = [sys.executable, "-m", "tpserve.forkserver", str(theirs.fileno()), str(os.getpid()), *shown]
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, env=environ, start_new_session=True, pass_fds=[theirs.fileno()]
            )
        return cls(process.pid, ours, process)

    def request(self, request: ForkRequest, stdin: bytes = b"", descriptors: Sequence[int] = ()) -> None:
        """Ask for a process. Its stdin has `stdin` (or is /dev/null). `descriptors` get the numbers from `FIRST_DESCRIPTOR` on.

        Raises ForkserverLost.
        """
        opened = [_memfd(msgspec.msgpack.encode(request)), _memfd(stdin) if stdin else os.open(os.devnull, os.O_RDONLY)]
        try:
            socket.send_fds(self._connection, [b"fork"], [*opened, *descriptors])
        except OSError as error:
            raise ForkserverLost(str(error)) from error
        finally:
            for descriptor in opened:
                os.close(descriptor)

    def receive(self) -> ForkReply | None:
        """The next reply; None when none has come yet. Raises ForkserverLost."""
        try:
            data = self._connection.recv(MAX_REPLY_BYTES)
        except (BlockingIOError, TimeoutError):
            return None
        except OSError as error:
            raise ForkserverLost(str(error)) from error
        if not data:
            raise ForkserverLost("it has ended")
        return msgspec.msgpack.decode(data, type=ForkReply)

    def remaining(self) -> list[ForkReply]:
        """The last replies of a forkserver that has ended. One may still come from the process that was forking for it."""
        self._connection.settimeout(LAST_REPLY_S)
        replies = []
        with contextlib.suppress(ForkserverLost):
            while (reply := self.receive()) is not None:
                replies.append(reply)
        return replies

    def fileno(self) -> int:
        """A descriptor that is readable when a reply has come, or the forkserver has ended."""
        return self._connection.fileno()

    def close(self, code: int | None = None) -> None:
        """Close the connection, which ends the forkserver. `code`: how it has ended, if the caller has waited for it."""
        self._connection.close()
        if self._process is not None and code is not None:
            self._process.returncode = code


def adopt_orphans() -> None:
    """Make this process the parent of orphans among its descendants (a child subreaper)."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)


def _memfd(data: bytes) -> int:
    memfd = os.memfd_create("tpserve-fork")
    with open(memfd, "wb", closefd=False) as file:
        file.write(data)
    os.lseek(memfd, 0, os.SEEK_SET)
    return memfd
