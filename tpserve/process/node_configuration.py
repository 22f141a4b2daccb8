"""The flags of a node's ranks after a reload, in memory that the supervisor holds and that outlives agents and ranks.

    supervisor --descriptor--> agent --descriptor--> rank       TPSERVE_CONFIGURATION, a memfd
    rank --> the memfd       the last Reconfigure that came; the next process of each rank of this node begins with it

Owns the memfd's content: one line, which grows in number. Ranks of a node write and read under a lock of the kernel's.
"""

import fcntl
import os

import msgspec

from tpserve.types.messages import Reconfigure

_NAME = "tpserve-configuration"


def make_configuration_memory() -> int:
    """A descriptor of new, empty memory."""
    return os.memfd_create(_NAME)


def read_configuration(descriptor: int) -> Reconfigure | None:
    """The last Reconfigure that a rank of this node has got; None before the first. -1 is a node without reloads."""
    if descriptor < 0:
        return None
    fcntl.lockf(descriptor, fcntl.LOCK_SH)
    try:
        return _read(descriptor)
    finally:
        fcntl.lockf(descriptor, fcntl.LOCK_UN)


def write_configuration(descriptor: int, order: Reconfigure) -> None:
    """Keep `order`, unless a later one is there. Raises OSError."""
    fcntl.lockf(descriptor, fcntl.LOCK_EX)
    try:
        earlier = _read(descriptor)
        if earlier is None or earlier.number < order.number:
            line = msgspec.json.encode(order) + b"\n"
            os.pwrite(descriptor, line, 0)
            os.ftruncate(descriptor, len(line))
    finally:
        fcntl.lockf(descriptor, fcntl.LOCK_UN)


def _read(descriptor: int) -> Reconfigure | None:
    line, _, _ = os.pread(descriptor, os.fstat(descriptor).st_size, 0).partition(b"\n")
    return msgspec.json.decode(line, type=Reconfigure) if line else None
