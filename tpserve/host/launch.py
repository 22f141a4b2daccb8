"""The launch flags of `tpserve serve`: whether they fit each other and this node, before anything is downloaded or started."""

import ipaddress
import logging
import socket

from tpserve.config import env
from tpserve.config.schema import Flags
from tpserve.errors import UserError
from tpserve.host.network import LOOPBACK, Interface, choose_interface, interfaces, os_error_text

logger = logging.getLogger("tpserve.launch")


def check_launch(flags: Flags) -> None:
    """The launch flags among themselves. Raises UserError."""
    if env.under_torchrun():
        logger.debug("RANK is set and ignored: `tpserve serve` starts ranks of its own")
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
            f"--master-addr {flags.master_addr} is no name and no address: no brackets, and the port is --master-port",
            param="master_addr",
        )


def node_interface(flags: Flags) -> Interface:
    """This node's interface, if other nodes can use it; what cannot is refused here, before anybody waits. Raises UserError."""
    master = flags.master_addr or LOOPBACK
    interface = choose_interface(flags.interface, flags.nnodes, master)
    if flags.nnodes == 1:
        return interface
    meant = _addresses(master)
    lead_back = all(ipaddress.ip_address(address).is_loopback for address in meant)
    if lead_back and flags.interface is None:
        raise UserError(
            f"--master-addr {master} is loopback, which other machines cannot reach: pass the address of node 0, or, when all "
            "nodes are on this machine, --interface lo",
            param="master_addr",
        )
    if interface.is_loopback and not lead_back:
        raise UserError(
            f"--interface {flags.interface} is loopback and --master-addr {master} is not: other nodes cannot reach this one",
            param="interface",
        )
    if flags.node_rank == 0 and flags.interface is None and not meant & {known.address for known in interfaces()}:
        there = ", ".join(str(known) for known in interfaces() if not known.is_loopback)
        raise UserError(
            f"--master-addr {master} is no address of this node, which is to be node 0 and has {there}: pass one of those on "
            "every node, give this one another --node-rank, or, if it is reached by another name, --interface",
            param="master_addr",
        )
    return interface


def rendezvous_address(flags: Flags, interface: Interface) -> str:
    """Where node 0 awaits the others: at the master address if that is its own, else on its interface."""
    own = {known.address for known in interfaces()}
    return next((address for address in sorted(_addresses(flags.master_addr or LOOPBACK)) if address in own), interface.address)


def _is_plain(address: str) -> bool:
    """Whether it is an address alone, or may be a name."""
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
