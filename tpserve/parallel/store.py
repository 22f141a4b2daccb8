"""torch's TCPStore: host it, join it, and exchange small values between ranks over it.

Owns every TCPStore of a rank. Every wait is bounded, and its error names the missing ranks. torch resolves the name of each peer,
only to log it, on the thread that serves all ranks: when DNS does not answer, no rank gets a reply for ten seconds or more. So
while a rank creates or hosts a store, names resolve from /etc/hosts alone.
"""

import socket
import time
from collections.abc import Sequence
from datetime import timedelta

from torch._C._distributed_c10d import Store, TCPStore  # torch.distributed has them without their types

from tpserve.errors import EngineFailure, UserError
from tpserve.host.network import disable_dns, host_port, listen, without_dns
from tpserve.observe.table import of_ranks

DIAL_TIMEOUT_S = 3.0
"""The time a dead store costs. The store of an epoch is up before its address is published."""


def host_store(address: str = "127.0.0.1", ports: tuple[int, int] = (0, 0)) -> tuple[TCPStore, str]:
    """Rank 0: host a new store; returns it and its "host:port". From here on this process uses no DNS.

    It listens only on `address`, on the first free port of the range `ports`; by default the kernel chooses the port.
    EngineFailure when it cannot listen.
    """
    disable_dns()
    try:
        with listen(address, ports) as listener:
            port: int = listener.getsockname()[1]
            store = TCPStore(
                address,
                port,
                is_master=True,
                wait_for_workers=False,
                timeout=timedelta(seconds=DIAL_TIMEOUT_S),
                master_listen_fd=listener.detach(),
            )
    except (UserError, RuntimeError) as error:
        raise EngineFailure(f"cannot host a store at {address}: {_first_line(error)}") from error
    return store, f"{address}:{port}"


def join_store(address: str, timeout_s: float = DIAL_TIMEOUT_S) -> TCPStore:
    """Other ranks: connect to the store at "host:port". EngineFailure when it does not answer within `timeout_s` seconds."""
    host, _, port = address.rpartition(":")
    return _connect(host, int(port), timeout_s, retry=False)


def agent_store(master_addr: str, master_port: int, rank: int, hosted_by_agent: bool, timeout_s: float) -> TCPStore:
    """torchrun's own store, used only to publish the frontend's address to the ranks of other nodes.

    `hosted_by_agent`: the agent of node 0 hosts it (the usual case); else rank 0 does. EngineFailure when it does not answer
    within `timeout_s` seconds.
    """
    if rank == 0 and not hosted_by_agent:
        with without_dns():
            return TCPStore(
                master_addr, master_port, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout_s)
            )
    return _connect(master_addr, master_port, timeout_s, retry=True)


def _connect(host: str, port: int, timeout_s: float, *, retry: bool) -> TCPStore:
    """Connect as a client. `retry`: the host may not listen yet. A plain socket tries first, since torch logs each retry."""
    deadline_s = time.monotonic() + timeout_s
    while True:
        try:
            with socket.create_connection((host, port), timeout_s) as probe:
                address: str = probe.getpeername()[0]
            with without_dns():
                return TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=timeout_s))
        except (OSError, RuntimeError) as error:
            if not retry or time.monotonic() > deadline_s:
                raise EngineFailure(f"the store at {host_port(host, port)} does not answer: {_first_line(error)}") from error
        time.sleep(0.2)


def gather(store: Store, name: str, rank: int, ranks: Sequence[int], value: bytes, timeout_s: float) -> list[bytes]:
    """All-gather over the store: the UTF-8 values of `ranks`, in their order. Each of them calls this, once per `name`.

    EngineFailure that names the ranks that have not called within `timeout_s` seconds.
    """
    keys = [f"{name}{other}" for other in ranks]
    try:
        store.set(f"{name}{rank}", value.decode())
        store.wait(keys, timedelta(seconds=timeout_s))
        return [store.get(key) for key in keys]
    except RuntimeError as error:  # torch's error names no rank; a dead store fails in `check` with the same error
        missing = [other for other, key in zip(ranks, keys, strict=True) if not store.check([key])]
        raise EngineFailure(f"{of_ranks(missing)} did not come within {timeout_s:g} s") from error


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
