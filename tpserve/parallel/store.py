"""torch's TCPStore: hosting it, joining it, and what the ranks of a job tell each other over it.

Owns every TCPStore of a rank. Every wait is bounded, and names the ranks that are missing. torch asks the resolver for the name
of each peer, only to log it, and on the thread that answers all ranks: where DNS is silent, no rank hears anything for ten
seconds or more. So while a store is made, and for as long as one is hosted, names come from /etc/hosts alone.
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
"""Dialling a store that is dead costs this; the epoch's store is up before its address is told to anybody."""


def host_store(address: str = "127.0.0.1", ports: tuple[int, int] = (0, 0)) -> tuple[TCPStore, str]:
    """Rank 0: a fresh store that listens on `address` alone, on the first free one of `ports` or, by default, on a port that the
    kernel chooses; and its "host:port". This process asks no DNS any more. EngineFailure when it cannot be hosted."""
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
    """Another rank: the store at "host:port" of Start. EngineFailure when it is dead or does not answer in time."""
    host, _, port = address.rpartition(":")
    return _dial(host, int(port), timeout_s, patient=False)


def agent_store(master_addr: str, master_port: int, rank: int, hosted_by_agent: bool, timeout_s: float) -> TCPStore:
    """torchrun's own store, only to tell the ranks of other nodes where the frontend is.

    `hosted_by_agent`: the agent of node 0 hosts it (the usual case); else rank 0 does.
    """
    if rank == 0 and not hosted_by_agent:
        with without_dns():
            return TCPStore(
                master_addr, master_port, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout_s)
            )
    return _dial(master_addr, master_port, timeout_s, patient=True)


def _dial(host: str, port: int, timeout_s: float, *, patient: bool) -> TCPStore:
    """Connect as a client. `patient`: nobody may listen there yet. Tried with a plain socket first: torch retries noisily."""
    deadline_s = time.monotonic() + timeout_s
    while True:
        try:
            with socket.create_connection((host, port), timeout_s) as probe:
                address: str = probe.getpeername()[0]
            with without_dns():
                return TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=timeout_s))
        except (OSError, RuntimeError) as error:
            if not patient or time.monotonic() > deadline_s:
                raise EngineFailure(f"the store at {host_port(host, port)} does not answer: {_first_line(error)}") from error
        time.sleep(0.2)


def gather(store: Store, name: str, rank: int, ranks: Sequence[int], value: bytes, timeout_s: float) -> list[bytes]:
    """What each of `rank_monitor` has for `name`, in their order. All of them call this, once a name, with a `value` of their
    own.

    EngineFailure that names the ranks that have not come within `timeout_s`.
    """
    keys = [f"{name}{other}" for other in ranks]
    try:
        store.set(f"{name}{rank}", value.decode())
        store.wait(keys, timedelta(seconds=timeout_s))
        return [store.get(key) for key in keys]
    except RuntimeError as error:  # of torch's: it names no rank, and a store that has gone says the same to `check`
        missing = [other for other, key in zip(ranks, keys, strict=True) if not store.check([key])]
        raise EngineFailure(f"{of_ranks(missing)} did not come within {timeout_s:g} s") from error


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
