"""Checks the launch flags of `tpserve serve` against each other and this node, before any download or start."""

import ipaddress
import logging
import socket

from tpserve.config import env
from tpserve.config.flags import Flags
from tpserve.errors import UserError
from tpserve.host.network import LOOPBACK, Interface, choose_interface, interfaces, os_error_text

logger = logging.getLogger("tpserve.launch")


def check_launch(flags: Flags) -> None:
    """Check the launch flags against each other. Raises UserError."""
    if env.under_torchrun():
        logger.debug("RANK is set and ignored: `tpserve serve` starts its own ranks")
    if flags.node_rank >= flags.nnodes:
        raise UserError(
            f"--node-rank {flags.node_rank} with --nnodes {flags.nnodes}: nodes count from 0 to {flags.nnodes - 1}",
            param="node_rank",
        )
    if flags.headless and flags.node_rank == 0:
        raise UserError(
            "--headless on node 0, which answers HTTP: leave it out there, or give this node --node-rank 1 or more",
            param="headless",
        )
    if flags.nnodes > 1 and flags.master_addr is None:
        raise UserError(f"--nnodes {flags.nnodes} needs --master-addr, the address of node 0, on each node", param="master_addr")
    if flags.master_addr is not None and not _is_plain(flags.master_addr):
        raise UserError(
            f"--master-addr {flags.master_addr} is neither a name nor an address: no brackets, and the port is --master-port",
            param="master_addr",
        )


def node_interface(flags: Flags) -> Interface:
    """This node's interface. Raises UserError when other nodes cannot reach it, before any node waits for another."""
    master = flags.master_addr or LOOPBACK
    interface = choose_interface(flags.interface, flags.nnodes, master)
    if flags.nnodes == 1:
        return interface
    master_addresses = _addresses(master)
    master_is_loopback = all(ipaddress.ip_address(address).is_loopback for address in master_addresses)
    if master_is_loopback and flags.interface is None:
        raise UserError(
            f"--master-addr {master} is loopback, which other machines cannot reach: pass the address of node 0, or, when all "
            "nodes are on this machine, --interface lo",
            param="master_addr",
        )
    if interface.is_loopback and not master_is_loopback:
        raise UserError(
            f"--interface {flags.interface} is loopback and --master-addr {master} is not: other nodes cannot reach this one",
            param="interface",
        )
    if flags.node_rank == 0 and flags.interface is None and not master_addresses & {known.address for known in interfaces()}:
        own = ", ".join(str(known) for known in interfaces() if not known.is_loopback)
        raise UserError(
            f"--master-addr {master} is not an address of this node, and --node-rank is 0. Its addresses are {own}: pass one of "
            "them on every node, or another --node-rank here, or --interface if the address is translated on the way",
            param="master_addr",
        )
    return interface


def rendezvous_address(flags: Flags, interface: Interface) -> str:
    """The address on which node 0 listens for the others: the master address if this host has it, else its interface's."""
    own = {known.address for known in interfaces()}
    return next((address for address in sorted(_addresses(flags.master_addr or LOOPBACK)) if address in own), interface.address)


def _is_plain(address: str) -> bool:
    """Whether it is a bare address or possibly a name: no brackets, port or URL."""
    try:
        ipaddress.ip_address(address)
    except ValueError:
        return not set("[]:/") & set(address)
    return True


def _addresses(name: str) -> set[str]:
    try:
        return {str(found[4][0]) for found in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)}
    except OSError as error:
        raise UserError(f"--master-addr {name}: {os_error_text(error)}", param="master_addr") from error
