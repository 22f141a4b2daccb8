"""The nodes of `tpserve serve` after they have met: each agent sees by the connection of the meeting that another one has ended.

The kernel watches: it does not matter how busy either process is, and a cut of two seconds is not noticed. Owns no socket.
"""

import select
import socket
from collections.abc import Mapping
from typing import NamedTuple

from msgspec import Struct

from tpserve.host.network import os_error_text

ALIVE_S = 5
_CHUNK = 4096


class JoinRequest(Struct, frozen=True, tag=True):
    """A node wants in. `host`: its name; `machine`: equal for nodes on one; `address`: its own, as other nodes shall use it;
    `derived`: that is what the route to the master gave; `nonce`: for node 0 to prove itself; `proof`: empty without a secret."""

    node: int
    nnodes: int
    nproc: int
    version: str
    host: str
    machine: str
    address: str
    derived: bool
    nonce: str = ""
    proof: str = ""


class NodeExit(NamedTuple):
    """What became of a node after the meeting. `who`: "node 1 (host, address)"; `lost`: not ended, but out of reach."""

    who: str
    why: str
    lost: bool


def wait_node_exit(nodes: Mapping[socket.socket, JoinRequest]) -> NodeExit:
    """On node 0: wait, however long, until another node's agent has ended or cannot be reached."""
    while True:
        for connection in select.select(list(nodes), [], [])[0]:
            node = nodes[connection]
            who = f"node {node.node} ({node.host}, {node.address})"
            try:
                if not connection.recv(_CHUNK):
                    return NodeExit(who, "has ended", lost=False)
            except BlockingIOError:
                continue
            except ConnectionResetError:
                return NodeExit(who, "has ended", lost=False)
            except OSError as error:
                return NodeExit(who, f"cannot be reached: {os_error_text(error)}", lost=True)


def wait_head_exit(connection: socket.socket) -> str:
    """Wait, however long, until node 0's agent has ended or cannot be reached; why."""
    enable_keepalive(connection)
    connection.settimeout(None)
    try:
        while connection.recv(_CHUNK):
            pass
    except OSError as error:
        return f"node 0 cannot be reached: {os_error_text(error)}"
    return "node 0 has ended"


def head_exit(connection: socket.socket) -> str:
    """Whether that has come already, without waiting: why, or nothing. `connection` must be kept alive."""
    return wait_head_exit(connection) if select.select([connection], [], [], 0)[0] else ""


def enable_keepalive(connection: socket.socket) -> None:
    """Have the kernel ask a silent peer every second, and give it up when it has not answered for five."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    timeout_ms = ALIVE_S * 1000
    options = (socket.TCP_KEEPIDLE, 1), (socket.TCP_KEEPINTVL, 1), (socket.TCP_KEEPCNT, 4), (socket.TCP_USER_TIMEOUT, timeout_ms)
    for option, value in options:
        connection.setsockopt(socket.IPPROTO_TCP, option, value)
