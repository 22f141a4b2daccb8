"""The lab as a table: link, traffic and processes of each host, and /readyz of node 0's server."""

import http.client
import json
import time
from collections import Counter
from pathlib import Path

from launch.lab import links
from launch.lab.hosts import Host
from launch.lab.jobs import stopped_or_dead, what

HTTP_TIMEOUT_S = 0.5


class Table:
    """A table of the hosts. Keeps the traffic counters of its last call, to compute rates."""

    def __init__(self, hosts: list[Host], port: int) -> None:
        """`port`: the server's, for its /readyz."""
        self._hosts = hosts
        self._port = port
        self._bytes: dict[int, tuple[int, int]] = {}
        self._last_s = 0.0

    def lines(self) -> list[str]:
        """The lines of the table, now."""
        now, elapsed_s = time.monotonic(), max(time.monotonic() - self._last_s, 1e-3)
        rows: list[tuple[str, ...]] = [("host", "address", "link", "sent", "received", "processes")]
        for host in self._hosts:
            sent, received = _traffic(host)
            before = self._bytes.get(host.index, (sent, received))
            self._bytes[host.index] = sent, received
            rates = [_rate((new - old) / elapsed_s) for new, old in zip((sent, received), before, strict=True)]
            others = [other for other in self._hosts if other is not host]
            rows.append((host.name, host.address, links.state(host, others), *rates, _processes(host)))
        self._last_s = now
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        table = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return [*table, f"server  {ready(self._hosts[0], self._port)}"]


def ready(head: Host, port: int) -> str:
    """The response of /readyz of the server on `head`, or the reason why there is none."""
    errors = []
    for address in (head.address, head.address6):
        connection = http.client.HTTPConnection(address, port, timeout=HTTP_TIMEOUT_S)
        try:
            connection.request("GET", "/readyz")
            answer = connection.getresponse()
            return f"/readyz {answer.status} {_phase(answer.read())}"
        except OSError as error:
            errors.append(error.strerror or str(error))
        finally:
            connection.close()
    return f"no answer at port {port}: {errors[0]}"


def _phase(body: bytes) -> str:
    try:
        shown = json.loads(body)
        return ", ".join(f"{name} {shown[name]}" for name in ("status", "phase", "percent") if name in shown) or body.decode()
    except (ValueError, TypeError):
        return body.decode(errors="replace")


def _processes(host: Host) -> str:
    found = Counter(" ".join(filter(None, (what(pid), stopped_or_dead(pid)))) for pid in host.processes())
    return ", ".join(name if count == 1 else f"{count} x {name}" for name, count in found.items()) or "none"


def _traffic(host: Host) -> tuple[int, int]:
    """Bytes that the host has sent and received, from the counters of the link's other end, which are the reverse."""
    counters = Path("/sys/class/net", host.port, "statistics")
    try:
        return int((counters / "rx_bytes").read_text()), int((counters / "tx_bytes").read_text())
    except OSError:
        return 0, 0


def _rate(bytes_per_s: float) -> str:
    return f"{bytes_per_s / 1e6:.2f} MB/s" if bytes_per_s >= 1e4 else f"{bytes_per_s:.0f} B/s"
