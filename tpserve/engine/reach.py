"""Before the mesh: whether the nodes reach each other on ports that the kernel chooses, as gloo's and NCCL's are.

Neither knows a range of ports, and both wait for minutes without a word when a firewall swallows what they send. So every rank
listens as they would, and dials the ranks of other addresses first: it is the kernel who says what is wrong, within seconds.
Owns the listening for as long as that takes; speaks no protocol: the kernel accepts.
"""

import json
import socket
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

from torch._C._distributed_c10d import PrefixStore, Store  # torch.distributed has them without their types

from tpserve.errors import EngineFailure
from tpserve.host.network import at, describe, kernel_ports
from tpserve.wire.waiting import CONNECT_S

_SHOWN = 4


def check(rank: int, world_size: int, address: str | None, store: Store, timeout_s: float, endpoints: Iterable[str] = ()) -> None:
    """All ranks of an epoch call this. EngineFailure on all of them when a pair cannot connect.

    `address`: of this rank between nodes, or None where gloo or NCCL were told another interface than ours: then nothing is
    known of this rank. `endpoints`: what it listens at besides, for ranks of other nodes.
    """
    store = PrefixStore("reach", store)
    with _listen(address) as listener:
        mine = [] if address is None else [at(address, listener.getsockname()[1])]
        mine += [endpoint.removeprefix("tcp://") for endpoint in endpoints]
        doors = _exchange(rank, world_size, mine, "door", store, timeout_s)
        others = [(i, door) for i, each in enumerate(doors) for door in each if address is not None and not _is_of(address, door)]
        with ThreadPoolExecutor(max_workers=max(1, len(others))) as pool:
            failed = [f"rank {rank} cannot reach {why}" for why in pool.map(lambda other: _dial(*other), others) if why]
        found = [why for each in _exchange(rank, world_size, failed, "failed", store, timeout_s) for why in each]
    if found:
        more = f", and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        raise EngineFailure(
            f"{'; '.join(found[:_SHOWN])}{more}: gloo and NCCL listen on ports of the kernel's choice ({kernel_ports()} here, "
            "net.ipv4.ip_local_port_range): open those between the nodes, beside --port-range"
        )


def _listen(address: str | None) -> socket.socket:
    listener = socket.socket(socket.AF_INET6 if ":" in (address or "") else socket.AF_INET, socket.SOCK_STREAM)
    if address is not None:
        listener.bind((address, 0))
        listener.listen(1024)
    return listener


def _is_of(address: str, door: str) -> bool:
    return door.rpartition(":")[0].strip("[]") == address


def _dial(rank: int, door: str) -> str:
    """Which rank that is, and what the kernel says; empty when it can be reached."""
    host, _, port = door.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_S).close()
    except OSError as error:
        return f"rank {rank} at {door}: {describe(error)}"
    return ""


def _exchange(rank: int, world_size: int, mine: list[str], name: str, store: Store, timeout_s: float) -> list[list[str]]:
    """What every rank has to say, in rank order."""
    store.set(f"{name}{rank}", json.dumps(mine))
    keys = [f"{name}{i}" for i in range(world_size)]
    try:
        store.wait(keys, timedelta(seconds=timeout_s))
    except RuntimeError as error:
        missing = [str(i) for i, key in enumerate(keys) if not store.check([key])]
        raise EngineFailure(f"rank {', '.join(missing)} did not come within {timeout_s:g} s") from error
    return [json.loads(store.get(key)) for key in keys]
