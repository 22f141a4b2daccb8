"""Notice that another node of `tpserve serve` has ended, by the connection that both keep open after the rendezvous.

TCP keepalive does the work in the kernel, so it does not matter how busy a process is, and a network cut of two seconds has no
effect. Owns no socket.
"""

import select
import socket

from msgspec import Struct

from tpserve.host.network import os_error_text

KEEPALIVE_S = 5
"""A peer that is silent for this long is out of reach."""
_CHUNK = 4096


class JoinRequest(Struct, frozen=True, tag=True):
    """A node asks to join.

    `host`: its host name. `machine`: equal for nodes on one machine. `address`: the address that other nodes should use.
    `derived`: the address comes from the route to the master. `nonce`: node 0 signs it. `proof`: empty without a secret.
    """

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


def wait_head_exit(connection: socket.socket) -> str:
    """Wait without a timeout until node 0's agent ends or is out of reach. Returns the reason."""
    enable_keepalive(connection)
    connection.settimeout(None)
    try:
        while connection.recv(_CHUNK):
            pass
    except OSError as error:
        return f"node 0 cannot be reached: {os_error_text(error)}"
    return "node 0 has ended"


def head_exit(connection: socket.socket) -> str:
    """The reason why node 0 is gone, or "". Never blocks. `connection` needs `enable_keepalive`."""
    return wait_head_exit(connection) if select.select([connection], [], [], 0)[0] else ""


def enable_keepalive(connection: socket.socket) -> None:
    """Make the kernel probe a silent peer every second, and close the connection after `KEEPALIVE_S` without an answer."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    timeout_ms = KEEPALIVE_S * 1000
    options = (socket.TCP_KEEPIDLE, 1), (socket.TCP_KEEPINTVL, 1), (socket.TCP_KEEPCNT, 4), (socket.TCP_USER_TIMEOUT, timeout_ms)
    for option, value in options:
        connection.setsockopt(socket.IPPROTO_TCP, option, value)
