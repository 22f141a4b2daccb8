"""A clock that jumps from event to event, and a network that loses, repeats, delays and cuts."""

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from random import Random
from typing import Any

CUT_NOTICED_S = 5.0
"""ZeroMQ reports a dead connection after this long (`wire.channels.HEARTBEAT_TIMEOUT_MS`)."""


class EventQueue:
    """Calls in the order of their times; those of one time in the order in which they were made."""

    def __init__(self) -> None:
        self.now = 0.0
        self.num_done = 0
        self._heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._numbers = count()

    def after(self, delay_s: float, call: Callable[..., None], *arguments: Any) -> None:
        self.at(self.now + delay_s, call, *arguments)

    def at(self, at_s: float, call: Callable[..., None], *arguments: Any) -> None:
        heapq.heappush(self._heap, (at_s, next(self._numbers), call, arguments))

    def run_until(self, end_s: float, done: Callable[[], bool] = lambda: False, every: int = 1) -> bool:
        """Run events up to `end_s`, or until `done` holds, which is asked after every `every` events; returns whether it does."""
        heap, since = self._heap, 0
        while heap and heap[0][0] <= end_s:
            self.now, _, call, arguments = heapq.heappop(heap)
            self.num_done += 1
            call(*arguments)
            since += 1
            if since >= every:
                since = 0
                if done():
                    return True
        self.now = max(self.now, end_s)
        return done()


@dataclass(frozen=True)
class Weather:
    """How bad the network is: shares of messages lost and repeated, and the longest delay in seconds."""

    loss: float = 0.0
    repeat: float = 0.0
    late_s: float = 0.0


@dataclass
class SimulatedNetwork:
    """The control connections between the frontend and the ranks. Nodes that are cut neither send nor receive."""

    events: EventQueue
    random: Random
    weather: Weather
    cut: set[int] = field(default_factory=set)
    """Nodes that nobody reaches."""
    num_messages: int = 0
    _held: list[tuple[int, Callable[..., None], tuple[Any, ...]]] = field(default_factory=list)

    def post(self, node: int, deliver: Callable[..., None], *arguments: Any) -> None:
        """Send a message from or to a process of `node`."""
        weather, random = self.weather, self.random
        self.num_messages += 1
        if node in self.cut:
            if random.random() < 0.5:  # the other half waits in the socket until the link is back
                self._held.append((node, deliver, arguments))
            return
        if weather.loss and random.random() < weather.loss:
            return
        for _ in range(2 if weather.repeat and random.random() < weather.repeat else 1):
            self.events.after(0.0005 + random.random() * weather.late_s, deliver, *arguments)

    def heal(self, node: int) -> None:
        self.cut.discard(node)
        held, self._held = self._held, []
        for other, deliver, arguments in held:
            self.post(other, deliver, *arguments)
