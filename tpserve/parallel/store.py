"""torch's TCPStore: host it, join it, and exchange small values between ranks over it.

Owns every TCPStore of a rank. Every wait is bounded, and its error names the missing ranks. torch resolves the name of each peer,
only to log it, on the thread that serves all ranks: when DNS does not answer, no rank gets a reply for ten seconds or more. So
while a rank creates or hosts a store, names resolve from /etc/hosts alone.
"""

import socket
import time
from collections.abc import Callable, Sequence
from datetime import timedelta

from torch._C._distributed_c10d import Store, TCPStore  # torch.distributed has them without their types

from tpserve.errors import EngineFailure, PeerLost, UserError
from tpserve.host.network import disable_dns, host_port, listen, without_dns
from tpserve.observe.table import of_ranks

DIAL_TIMEOUT_S = 3.0
"""The time a dead store costs. The store of an epoch is up before its address is published."""
WAIT_S = 0.25
"""How often a wait for other ranks looks whether the epoch is over."""


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
    """Other ranks: connect to the store at "host:port". PeerLost when it does not answer within `timeout_s` seconds."""
    host, _, port = address.rpartition(":")
    return _connect(host, int(port), timeout_s, retry=False)


def agent_store(
    master_addr: str, master_port: int, rank: int, hosted_by_agent: bool, timeout_s: float, *, listens: bool = False
) -> TCPStore:
    """The agents' store, used only to publish the frontend's address to the ranks of other nodes.

    `hosted_by_agent`: the agent of node 0 hosts it (the usual case); else rank 0 does. `listens`: the store has been reached
    before, so that a refused connection is its end. PeerLost then, or when it does not answer within `timeout_s` seconds.
    """
    if rank == 0 and not hosted_by_agent:
        with without_dns():
            return TCPStore(
                master_addr, master_port, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout_s)
            )
    return _connect(master_addr, master_port, timeout_s, retry=True, listens=listens)


def _connect(host: str, port: int, timeout_s: float, *, retry: bool, listens: bool = False) -> TCPStore:
    """Connect as a client. `retry`: the host may be out of reach for a while; unless it `listens`, it may not listen yet.

    A plain socket tries first, since torch logs each retry.
    """
    deadline_s = time.monotonic() + timeout_s
    while True:
        try:
            with socket.create_connection((host, port), min(timeout_s, DIAL_TIMEOUT_S)) as probe:
                address: str = probe.getpeername()[0]
            with without_dns():
                return TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=timeout_s))
        except (OSError, RuntimeError) as error:
            gone = not retry or (listens and isinstance(error, ConnectionRefusedError))
            if gone or time.monotonic() > deadline_s:
                raise PeerLost(f"the store at {host_port(host, port)} does not answer: {_first_line(error)}") from error
        time.sleep(0.2)


def gather(
    store: Store,
    name: str,
    rank: int,
    ranks: Sequence[int],
    value: bytes,
    timeout_s: float,
    is_over: Callable[[], bool] = lambda: False,
) -> list[bytes]:
    """All-gather over the store: the UTF-8 values of `ranks`, in their order. Each of them calls this, once per `name`.

    PeerLost when the store is gone, when `is_over()` says that nobody waits for the result any more, and after `timeout_s`
    seconds, with the ranks that have not called.
    """
    keys = [f"{name}{other}" for other in ranks]
    deadline_s = time.monotonic() + timeout_s
    try:
        store.set(f"{name}{rank}", value.decode())
        while not _wait(store, keys):
            if is_over():
                raise PeerLost("the epoch is over")
            if time.monotonic() > deadline_s:
                missing = [other for other, key in zip(ranks, keys, strict=True) if not store.check([key])]
                raise PeerLost(f"{of_ranks(missing)} did not come within {timeout_s:g} s")
        return [store.get(key) for key in keys]
    except RuntimeError as error:
        raise PeerLost(f"the store of rank 0 is gone: {_first_line(error)}") from error


def _wait(store: Store, keys: list[str]) -> bool:
    """Wait for `WAIT_S`; whether all keys are set. RuntimeError when the store is gone."""
    try:
        store.wait(keys, timedelta(seconds=WAIT_S))
    except RuntimeError:  # a dead store fails in `check` with the same error
        return store.check(keys)
    return True


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
