"""Log lines for a wait on another node or rank: at growing intervals, with the missing nodes or ranks and the kernel's error.

Owns the intervals and the wording. Only `connect_with_retry` waits itself.
"""

import logging
import socket
import time
from collections.abc import Callable

from tpserve.errors import EngineFailure
from tpserve.host.network import host_port, os_error_text

SLOW_S = 1.5
"""A longer wait is logged, so that a start never seems to hang for two seconds."""
CONNECT_S = 4.0
"""Longer than the kernel's neighbour discovery, so that the kernel's own error arrives first."""
RETRY_S = 0.2
"""The pause between two attempts."""


class RetryLog:
    """Decides when to log a wait again, and measures it."""

    def __init__(self, timeout_s: float, logger: logging.Logger, began_s: float | None = None) -> None:
        """`logger`: gets the lines. `began_s`: the beginning of the wait, a time of `time.monotonic`; by default now."""
        self._logger = logger
        self._began_s = time.monotonic() if began_s is None else began_s
        self._timeout_s = timeout_s
        self._due_s = SLOW_S
        self._last_why = ""

    @property
    def waited_s(self) -> float:
        """Seconds since the wait began."""
        return time.monotonic() - self._began_s

    @property
    def connect_s(self) -> float:
        """The timeout of the next connection attempt. The first one ends when the first line is due."""
        return max(RETRY_S, SLOW_S - self.waited_s) if self.waited_s < SLOW_S else CONNECT_S

    @property
    def timed_out(self) -> bool:
        """Whether the wait is longer than the timeout."""
        return self.waited_s > self._timeout_s

    def log_if_due(self, what: str, why: str = "") -> None:
        """Log "waiting for `what`" when a line is due or `why` has changed."""
        waited_s = self.waited_s
        if waited_s < SLOW_S or (waited_s < self._due_s and why == self._last_why):
            return
        self._last_why = why
        while self._due_s <= waited_s:
            self._due_s += min(self._due_s, 60.0)
        self._logger.info("waiting for %s, %.0f s%s", what, waited_s, f": {why}" if why else "")


def connect_with_retry(
    host: str, port: int, what: str, timeout_s: float, logger: logging.Logger, give_up: Callable[[], str] = lambda: ""
) -> None:
    """Wait until `host:port` accepts a connection.

    Raises EngineFailure after `timeout_s`, with the kernel's error, or as soon as `give_up` returns a reason.
    """
    retry_log = RetryLog(timeout_s, logger)
    while True:
        try:
            socket.create_connection((host, port), retry_log.connect_s).close()
            return
        except OSError as error:
            why = os_error_text(error)
        if reason := give_up():
            raise EngineFailure(reason)
        if retry_log.timed_out:
            raise EngineFailure(
                f"{what} at {host_port(host, port)} could not be reached within {timeout_s:.0f} s ({why}): between the nodes "
                "open the ports of --port-range, or without it those of net.ipv4.ip_local_port_range"
            )
        retry_log.log_if_due(f"{what} at {host_port(host, port)}", why)
        time.sleep(RETRY_S)


def name_nodes(nodes: list[int], nnodes: int) -> str:
    """Node numbers as text: "node 1 of 2", "nodes 1, 3 of 4"."""
    return f"node{'s' * (len(nodes) > 1)} {', '.join(map(str, nodes))} of {nnodes}"


def missing_ranks(missing: list[int], sizes: dict[int, int], world_size: int, nnodes: int) -> str:
    """The ranks of the missing nodes as text: "ranks 2-3 are". Only their number when the nodes' sizes are unknown.

    `sizes`: ranks per node of the nodes that are present.
    """
    left = world_size - sum(sizes.values())
    if left <= 0 or left % (nnodes - len(sizes)):
        return f"{max(left, 1)} of {world_size} ranks are"
    each = left // (nnodes - len(sizes))
    runs, first = [], 0
    for node in range(nnodes):
        size = sizes.get(node, each)
        if node in missing:
            runs.append(f"{first}-{first + size - 1}" if size > 1 else str(first))
        first += size
    return f"rank {runs[0]} is" if len(missing) * each == 1 else f"ranks {', '.join(runs)} are"
