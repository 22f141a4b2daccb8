"""Checks the connections between ranks: reachability, round-trip times and clock skew. Knows addresses only, no collectives.

Every rank listens (`PingServer`) and dials all others (`probe_all`) with plain sockets, so that errors come from the kernel.
"""

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from msgspec import Struct

from tpserve.doctor.verdict import Verdict, duration
from tpserve.host.network import host_port, listen, os_error_text

CONNECT_S = 4.0
"""Longer than the kernel's search for a neighbour, so that a missing one gives the kernel's error and no timeout."""
PINGS = 20
SLOW_ROUND_TRIP_S = 1e-3
MAX_SKEW_S = 1.0
MAX_SHOWN = 8
_CLOCK = struct.Struct("!d")


class ProbeResult(Struct, frozen=True):
    """The result of dialling `rank`: the shortest round trip and the lead of its clock in seconds, or an `error`."""

    rank: int
    error: str = ""
    round_trip_s: float = 0.0
    ahead_s: float = 0.0


class PingServer:
    """Answers every received byte with the time of this host, until closed."""

    def __init__(self, address: str, ports: tuple[int, int]) -> None:
        """Listen on a port of the range `ports`. Raises UserError when none is free."""
        self._listener = listen(address, ports)
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Stop listening."""
        with contextlib.suppress(OSError):  # wakes the accepting thread
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=_answer, args=(connection,), daemon=True).start()


def _answer(connection: socket.socket) -> None:
    with connection, contextlib.suppress(OSError):
        connection.settimeout(CONNECT_S)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while connection.recv(1):
            connection.sendall(_CLOCK.pack(time.time()))


def probe_all(rank: int, addresses: Sequence[tuple[str, int]]) -> list[ProbeResult]:
    """Dial all other ranks. `addresses`: address and port of every rank, in rank order."""
    others = [other for other in range(len(addresses)) if other != rank]
    with ThreadPoolExecutor(max_workers=max(1, min(16, len(others)))) as pool:
        dialled = list(pool.map(lambda other: _dial(other, *addresses[other]), others))
    return [_ping(result, connection) if connection is not None else result for result, connection in dialled]


def _dial(rank: int, address: str, port: int) -> tuple[ProbeResult, socket.socket | None]:
    try:
        return ProbeResult(rank), socket.create_connection((address, port), CONNECT_S)
    except OSError as error:
        return ProbeResult(rank, f"{host_port(address, port)}: {os_error_text(error)}"), None


def _ping(result: ProbeResult, connection: socket.socket) -> ProbeResult:
    """Measure round trips and clock of one connection; several at a time would disturb each other."""
    best = (float("inf"), 0.0)
    with connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(PINGS):
            before_s, begin_s = time.time(), time.perf_counter()
            try:
                connection.sendall(b"?")
                reply = connection.recv(_CLOCK.size, socket.MSG_WAITALL)
            except OSError as error:
                return ProbeResult(result.rank, f"was reached and then lost: {os_error_text(error)}")
            if len(reply) < _CLOCK.size:
                return ProbeResult(result.rank, "was reached and then closed the connection")
            took_s = time.perf_counter() - begin_s
            best = min(best, (took_s, _CLOCK.unpack(reply)[0] - before_s - took_s / 2))
    return ProbeResult(result.rank, "", *best)


def failed_probe(source: int, probe: ProbeResult, hosts: Sequence[str]) -> str:
    """A failed connection of rank `source` as a sentence. `hosts`: those of all ranks."""
    return f"rank {source} on {hosts[source]} -> rank {probe.rank} on {hosts[probe.rank]}: {probe.error}"


def judge(probes: Sequence[Sequence[ProbeResult]], hosts: Sequence[str]) -> list[Verdict]:
    """The verdicts on reachability and clocks. `probes` and `hosts`: of every rank, in rank order."""
    pairs = [(source, probe) for source, results in enumerate(probes) for probe in results]
    if not pairs:
        return [Verdict("good", "reachability", "one rank, which reaches itself")]
    failed = [failed_probe(source, probe, hosts) for source, probe in pairs if probe.error]
    if failed:
        remedy = (
            "open all ports between the nodes, or those of --port-range; check that --interface names a network they share, and "
            "that none of the addresses is one of a container"
        )
        more = [f"and {len(failed) - MAX_SHOWN} more"] if len(failed) > MAX_SHOWN else []
        *others, last = [*failed[:MAX_SHOWN], *more]
        return [*(Verdict("broken", "reachability", text) for text in others), Verdict("broken", "reachability", last, remedy)]
    source, slowest = max(pairs, key=lambda pair: pair[1].round_trip_s)
    text = (
        f"each of {len(probes)} ranks reaches all others; longest round trip {duration(slowest.round_trip_s)} "
        f"(rank {source} on {hosts[source]} -> rank {slowest.rank} on {hosts[slowest.rank]})"
    )
    if slowest.round_trip_s > SLOW_ROUND_TRIP_S:
        remedy = "keep tensor parallelism inside a node (-tp) and put pipeline stages across (-pp); look for what delays packets"
        return [Verdict("slow", "reachability", text, remedy), _skew(probes[0], hosts)]
    return [Verdict("good", "reachability", text), _skew(probes[0], hosts)]


def _skew(probes: Sequence[ProbeResult], hosts: Sequence[str]) -> Verdict:
    """The verdict on the clocks, from the results of rank 0."""
    worst = max(probes, key=lambda probe: abs(probe.ahead_s))
    found = f"at most {duration(abs(worst.ahead_s))} from rank 0's (rank {worst.rank} on {hosts[worst.rank]})"
    if abs(worst.ahead_s) > MAX_SKEW_S:
        remedy = (
            "run chrony or ntpd on every node: serving does not depend on clocks, but logs of several nodes cannot be compared"
        )
        return Verdict("slow", "clocks", found, remedy)
    return Verdict("good", "clocks", found)
