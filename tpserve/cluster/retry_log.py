"""What is said while nodes or ranks are waited for: when, for whom, and what the kernel says. Waits itself only in
`connect_with_retry`."""

import logging
import socket
import time
from collections.abc import Callable

from tpserve.errors import EngineFailure
from tpserve.host.network import host_port, os_error_text

SLOW_S = 1.5
"""A wait that is longer is logged, so that a start never seems to hang for two seconds, and again at growing intervals."""
CONNECT_S = 4.0
"""Longer than the kernel looks for a neighbour, so that it is the kernel who says why there is none."""
RETRY_S = 0.2


class RetryLog:
    """When to say again that we wait, and for how long already."""

    def __init__(self, timeout_s: float, logger: logging.Logger) -> None:
        """`logger`: whose lines they are."""
        self._logger = logger
        self._began_s = time.monotonic()
        self._timeout_s = timeout_s
        self._due_s = SLOW_S
        self._said = ""

    @property
    def waited_s(self) -> float:
        return time.monotonic() - self._began_s

    @property
    def connect_s(self) -> float:
        """How long to try a connection: the first one only until it is time to log that we wait."""
        return max(RETRY_S, SLOW_S - self.waited_s) if self.waited_s < SLOW_S else CONNECT_S

    @property
    def timed_out(self) -> bool:
        return self.waited_s > self._timeout_s

    def log_if_due(self, what: str, why: str = "") -> None:
        """Log it if it is time, or if `why` is another one."""
        waited_s = self.waited_s
        if waited_s < SLOW_S or (waited_s < self._due_s and why == self._said):
            return
        self._said = why
        while self._due_s <= waited_s:
            self._due_s += min(self._due_s, 60.0)
        self._logger.info("waiting for %s, %.0f s%s", what, waited_s, f": {why}" if why else "")


def connect_with_retry(
    host: str, port: int, what: str, timeout_s: float, logger: logging.Logger, vain: Callable[[], str] = lambda: ""
) -> None:
    """Wait until somebody can be reached there. EngineFailure with the kernel's words when the time is over, or with those of
    `vain` when it says why it is no use to wait."""
    retry_log = RetryLog(timeout_s, logger)
    while True:
        try:
            socket.create_connection((host, port), retry_log.connect_s).close()
            return
        except OSError as error:
            why = os_error_text(error)
        if gone := vain():
            raise EngineFailure(gone)
        if retry_log.timed_out:
            raise EngineFailure(
                f"{what} at {host_port(host, port)} could not be reached within {timeout_s:.0f} s ({why}): between the nodes "
                "open the ports of --port-range, or without it those of net.ipv4.ip_local_port_range"
            )
        retry_log.log_if_due(f"{what} at {host_port(host, port)}", why)
        time.sleep(RETRY_S)


def name_nodes(nodes: list[int], nnodes: int) -> str:
    """ "node 1 of 2", "nodes 1, 3 of 4"."""
    return f"node{'s' * (len(nodes) > 1)} {', '.join(map(str, nodes))} of {nnodes}"


def missing_ranks(missing: list[int], sizes: dict[int, int], world_size: int, nnodes: int) -> str:
    """Which ranks the missing nodes would have brought: "ranks 2-3 are". Only how many, when their sizes are not known."""
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
