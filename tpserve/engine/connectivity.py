"""Before the mesh: whether the nodes reach each other on ports that the kernel chooses, as gloo's and NCCL's are.

Neither knows a range of ports, and both wait for minutes without a word when a firewall swallows what they send. So every rank
listens as they would, and dials the ranks of other addresses first: it is the kernel who says what is wrong, within seconds.
Owns the listening for as long as that takes; speaks no protocol: the kernel accepts.
"""

import json
import socket
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from torch._C._distributed_c10d import PrefixStore, Store  # torch.distributed has them without their types

from tpserve.cluster.retry_log import CONNECT_S
from tpserve.errors import EngineFailure
from tpserve.host.network import LOOPBACK, host_port, kernel_ports, listen, os_error_text
from tpserve.parallel.store import gather

_SHOWN = 4


def check_connectivity(
    rank: int, world_size: int, address: str | None, store: Store, timeout_s: float, endpoints: Iterable[str] = ()
) -> None:
    """All ranks of an epoch call this. EngineFailure on all of them when a pair cannot connect.

    `address`: of this rank between nodes, or None where gloo or NCCL were told another interface than ours: then nothing is
    known of this rank. `endpoints`: what it listens at besides, for ranks of other nodes.
    """
    store = PrefixStore("reach", store)

    def exchange(name: str, mine: list[str]) -> list[list[str]]:
        return [json.loads(each) for each in gather(store, name, rank, range(world_size), json.dumps(mine).encode(), timeout_s)]

    with listen(address or LOOPBACK) as listener:
        mine = [] if address is None else [host_port(address, listener.getsockname()[1])]
        mine += [endpoint.removeprefix("tcp://") for endpoint in endpoints]
        doors = exchange("door", mine)
        others = [
            (i, tcp_endpoint)
            for i, each in enumerate(doors)
            for tcp_endpoint in each
            if address is not None and not _is_of(address, tcp_endpoint)
        ]
        with ThreadPoolExecutor(max_workers=max(1, len(others))) as pool:
            failed = [f"rank {rank} cannot reach {why}" for why in pool.map(lambda other: _dial(*other), others) if why]
        found = [why for each in exchange("failed", failed) for why in each]
    if found:
        more = f", and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        raise EngineFailure(
            f"{'; '.join(found[:_SHOWN])}{more}: gloo and NCCL listen on ports of the kernel's choice ({kernel_ports()} here, "
            "net.ipv4.ip_local_port_range): open those between the nodes, beside --port-range"
        )


def _is_of(address: str, tcp_endpoint: str) -> bool:
    return tcp_endpoint.rpartition(":")[0].strip("[]") == address


def _dial(rank: int, tcp_endpoint: str) -> str:
    """Which rank that is, and what the kernel says; empty when it can be reached."""
    host, _, port = tcp_endpoint.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_S).close()
    except OSError as error:
        return f"rank {rank} at {tcp_endpoint}: {os_error_text(error)}"
    return ""
