"""Check, before the mesh forms, that the nodes can connect on ports that the kernel chooses, as gloo and NCCL do.

gloo and NCCL accept no port range, and both wait for minutes in silence when a firewall drops their packets. So every rank first
listens on such a port and connects to the ranks at other addresses; the kernel's error then names the cause within seconds.
Owns the listening socket during the check. Uses no protocol: the kernel accepts the connections.
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
    """All ranks of an epoch call this. Raises EngineFailure on all of them when a pair cannot connect.

    `address`: this rank's address between nodes; None when the user chose the interface of gloo or NCCL, and then nobody connects
    to this rank. `endpoints`: tcp:// endpoints where this rank listens already, for ranks of other nodes.
    """
    store = PrefixStore("connectivity", store)

    def all_gather(name: str, values: list[str]) -> list[list[str]]:
        data = gather(store, name, rank, range(world_size), json.dumps(values).encode(), timeout_s)
        return [json.loads(each) for each in data]

    with listen(address or LOOPBACK) as listener:
        own = [] if address is None else [host_port(address, listener.getsockname()[1])]
        own += [endpoint.removeprefix("tcp://") for endpoint in endpoints]
        others = [
            (i, tcp_endpoint)
            for i, tcp_endpoints in enumerate(all_gather("endpoints", own))
            for tcp_endpoint in tcp_endpoints
            if address is not None and not _has_address(tcp_endpoint, address)
        ]
        with ThreadPoolExecutor(max_workers=max(1, len(others))) as pool:
            failed = [f"rank {rank} cannot reach {error}" for error in pool.map(lambda other: _connect(*other), others) if error]
        errors = [error for of_rank in all_gather("failed", failed) for error in of_rank]
    if errors:
        more = f", and {len(errors) - _SHOWN} more" if len(errors) > _SHOWN else ""
        raise EngineFailure(
            f"{'; '.join(errors[:_SHOWN])}{more}: gloo and NCCL listen on ports of the kernel's choice ({kernel_ports()} here, "
            "net.ipv4.ip_local_port_range): open those between the nodes, in addition to --port-range"
        )


def _has_address(tcp_endpoint: str, address: str) -> bool:
    return tcp_endpoint.rpartition(":")[0].strip("[]") == address


def _connect(rank: int, tcp_endpoint: str) -> str:
    """The rank, its endpoint and the kernel's error; "" when the connection succeeds."""
    host, _, port = tcp_endpoint.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_S).close()
    except OSError as error:
        return f"rank {rank} at {tcp_endpoint}: {os_error_text(error)}"
    return ""
