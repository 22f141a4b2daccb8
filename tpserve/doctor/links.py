"""Who reaches whom, how long a word takes there and back, and how far apart the clocks are. Knows addresses, not ranks' work.

Every rank listens (`PingServer`) and dials all others (`probe_all`) with plain sockets, so that it is the kernel who says what
is wrong.
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
"""Longer than the kernel looks for a neighbour, so that it is the kernel who says why there is none."""
PINGS = 20
FAR_S = 1e-3
SKEW_S = 1.0
SHOWN = 8
_CLOCK = struct.Struct("!d")


class ProbeResult(Struct, frozen=True):
    """What came of dialling a rank: the shortest round trip and its clock ahead of ours, or why there is none."""

    rank: int
    error: str = ""
    round_trip_s: float = 0.0
    ahead_s: float = 0.0


class PingServer:
    """Answers every byte with this host's clock, until closed."""

    def __init__(self, address: str, ports: tuple[int, int]) -> None:
        """UserError when no port can be had."""
        self._listener = listen(address, ports)
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Nobody dials any more."""
        with contextlib.suppress(OSError):  # wakes the thread that accepts
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                line, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=_answer, args=(line,), daemon=True).start()


def _answer(line: socket.socket) -> None:
    with line, contextlib.suppress(OSError):
        line.settimeout(CONNECT_S)
        line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while line.recv(1):
            line.sendall(_CLOCK.pack(time.time()))


def probe_all(rank: int, places: Sequence[tuple[str, int]]) -> list[ProbeResult]:
    """What this rank hears of all others at `places` (address and port of every rank)."""
    others = [other for other in range(len(places)) if other != rank]
    with ThreadPoolExecutor(max_workers=max(1, min(16, len(others)))) as pool:
        dialled = list(pool.map(lambda other: _probe(other, *places[other]), others))
    return [_ping(result, line) if line is not None else result for result, line in dialled]


def _probe(rank: int, address: str, port: int) -> tuple[ProbeResult, socket.socket | None]:
    try:
        return ProbeResult(rank), socket.create_connection((address, port), CONNECT_S)
    except OSError as error:
        return ProbeResult(rank, f"{host_port(address, port)}: {os_error_text(error)}"), None


def _ping(result: ProbeResult, line: socket.socket) -> ProbeResult:
    """One after the other: together they would measure each other."""
    best = (float("inf"), 0.0)
    with line:
        line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(PINGS):
            before_s, begin_s = time.time(), time.perf_counter()
            try:
                line.sendall(b"?")
                told = line.recv(_CLOCK.size, socket.MSG_WAITALL)
            except OSError as error:
                return ProbeResult(result.rank, f"was reached and then lost: {os_error_text(error)}")
            if len(told) < _CLOCK.size:
                return ProbeResult(result.rank, "was reached and then hung up")
            took_s = time.perf_counter() - begin_s
            best = min(best, (took_s, _CLOCK.unpack(told)[0] - before_s - took_s / 2))
    return ProbeResult(result.rank, "", *best)


def judge(heard: Sequence[Sequence[ProbeResult]], hosts: Sequence[str]) -> list[Verdict]:
    """`result`: by every rank, in rank order; `hosts`: where the ranks are."""
    pairs = [(i, each) for i, all_ in enumerate(heard) for each in all_]
    if not pairs:
        return [Verdict("good", "reachability", "one rank, which reaches itself")]
    lost = [(i, each) for i, each in pairs if each.error]
    if lost:
        shown = [f"rank {i} on {hosts[i]} -> rank {each.rank} on {hosts[each.rank]}: {each.error}" for i, each in lost]
        remedy = (
            "open all ports between the nodes, or those of --port-range; check that --interface names a network they share, and "
            "that none of the addresses is one of a container"
        )
        more = [f"and {len(lost) - SHOWN} more"] if len(lost) > SHOWN else []
        found = [Verdict("broken", "reachability", text) for text in [*shown[:SHOWN], *more]]
        return [*found[:-1], Verdict("broken", "reachability", found[-1].found, remedy)]
    i, slowest = max(pairs, key=lambda pair: pair[1].round_trip_s)
    text = (
        f"each of {len(heard)} ranks reaches all others; longest round trip {duration(slowest.round_trip_s)} "
        f"(rank {i} on {hosts[i]} -> rank {slowest.rank} on {hosts[slowest.rank]})"
    )
    if slowest.round_trip_s > FAR_S:
        remedy = "keep tensor parallelism inside a node (-tp) and put pipeline stages across (-pp); look for what delays packets"
        return [Verdict("slow", "reachability", text, remedy), _skew(heard, hosts)]
    return [Verdict("good", "reachability", text), _skew(heard, hosts)]


def _skew(heard: Sequence[Sequence[ProbeResult]], hosts: Sequence[str]) -> Verdict:
    """Of rank 0's clock."""
    worst = max(heard[0], key=lambda each: abs(each.ahead_s))
    found = f"at most {duration(abs(worst.ahead_s))} from rank 0's (rank {worst.rank} on {hosts[worst.rank]})"
    if abs(worst.ahead_s) > SKEW_S:
        remedy = "run chrony or ntpd on every node: nothing here waits by the clock, but logs cannot be laid side by side"
        return Verdict("slow", "clocks", found, remedy)
    return Verdict("good", "clocks", found)
