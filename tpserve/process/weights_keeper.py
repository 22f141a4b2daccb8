"""A rank's packed weights in the hands of its agent, which gives them to the rank's next process.

    agent --fork--> rank       the rank's end of a socket pair, `TPSERVE_WEIGHTS_SOCKET`; what the agent has kept waits in it
    rank --> agent             a description and the memfd: these are the rank's weights now
    rank --> agent             a description without a memfd: what is kept is of no use

Neither side waits for the other, and the agent never looks into what it keeps.
"""

import contextlib
import os
import socket
from collections.abc import Sequence

MAX_BYTES = 1 << 12


class KeptWeights:
    """The agent's side, for one rank. Owns the descriptor of what it keeps, and of the socket to the rank's present process."""

    def __init__(self) -> None:
        self._socket: socket.socket | None = None
        self._kept: tuple[bytes, int] | None = None

    def offer(self) -> socket.socket:
        """The end for the next process of the rank, which the caller closes. Raises OSError."""
        self.take()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        if self._socket is not None:
            self._socket.close()
        self._socket = ours
        if self._kept is not None:
            description, descriptor = self._kept
            socket.send_fds(ours, [description], [descriptor])
        return theirs

    def fileno(self) -> int | None:
        """Readable when `take` has something to do; None when it never will."""
        return None if self._socket is None else self._socket.fileno()

    def take(self) -> None:
        """Take what the rank has sent."""
        while self._socket is not None:
            try:
                description, descriptors, _, _ = socket.recv_fds(self._socket, MAX_BYTES, 1, socket.MSG_CMSG_CLOEXEC)
            except BlockingIOError:
                return
            except ConnectionResetError:  # it has ended without taking what was offered; what it sent comes next
                continue
            if not description:  # the process has ended
                self._socket.close()
                self._socket = None
                return
            self.drop()
            if descriptors:
                self._kept = description, descriptors[0]

    def drop(self) -> None:
        """Keep nothing; the memory is free when no process maps it."""
        if self._kept is not None:
            os.close(self._kept[1])
        self._kept = None

    def close(self) -> None:
        """Let go of everything."""
        self.drop()
        if self._socket is not None:
            self._socket.close()
        self._socket = None


class WeightsKeeper:
    """The rank's side. Owns the socket."""

    def __init__(self, descriptor: int) -> None:
        """`descriptor`: of the socket. Raises OSError when it is none."""
        self._socket = socket.socket(fileno=descriptor)
        self._socket.setblocking(False)

    def kept(self) -> tuple[bytes, int] | None:
        """What the process before has left: its description and a descriptor, which the caller closes; None without one."""
        try:
            description, descriptors, _, _ = socket.recv_fds(self._socket, MAX_BYTES, 1, socket.MSG_CMSG_CLOEXEC)
        except OSError:
            return None
        return (description, descriptors[0]) if descriptors else None

    def keep(self, description: bytes, descriptor: int) -> None:
        """Leave this for the next process, instead of what was kept. Raises OSError."""
        self._send(description, [descriptor])

    def forget(self) -> None:
        """What is kept is of no use."""
        with contextlib.suppress(OSError):  # the agent has ended, and this process ends with it
            self._send(b"-", [])

    def _send(self, description: bytes, descriptors: Sequence[int]) -> None:
        socket.send_fds(self._socket, [description], descriptors)
