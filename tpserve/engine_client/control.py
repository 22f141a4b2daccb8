"""What operators ask of the engine: a pause, its end, a reset of the prefix cache.

Owns the pause, which outlives the engine: the next one gets it before any request. Never touches a socket; called from one event
loop. An engine counts the control messages that it has carried out (`Stats.controls`), so a message is done when its number is.
"""

import asyncio
from collections.abc import Callable

from tpserve.types.messages import EngineControlMessage, EngineInput, Pause, PauseMode, ResetPrefixCache, Resume, Stats


class EngineControl:
    """`send`: to the engine that runs. `keep`: writes the pause down, for the next frontend. `mode`: what the last one left."""

    def __init__(
        self,
        send: Callable[[list[EngineInput]], None],
        keep: Callable[[PauseMode | None], None] = lambda _: None,
        mode: PauseMode | None = None,
    ) -> None:
        self.mode = mode
        """Of the pause; None without one."""
        self._send, self._keep = send, keep
        self._engine = 0
        """The number of the engine; 0 while there is none."""
        self._num_engines = self._sent = self._done = 0
        self._paused = False
        self._news = asyncio.Event()

    async def pause(self, mode: PauseMode) -> None:
        """Begin a pause, or change its mode. Returns when no step runs any more: with `wait`, when all that had begun has ended.

        It also returns when somebody else ends or changes the pause meanwhile.
        """
        self._set(mode)
        engine, number = self._control(Pause(mode))
        await self._until(lambda: self.mode != mode or self._engine != engine or (self._done >= number and self._paused))

    def resume(self) -> None:
        """End the pause, if there is one."""
        if self.mode is not None:
            self._set(None)
            self._control(Resume())

    async def reset_prefix_cache(self) -> None:
        """Forget what is cached. An engine that has ended, or has not begun, has nothing."""
        engine, number = self._control(ResetPrefixCache())
        await self._until(lambda: self._engine != engine or self._done >= number)

    # Called by the engine client

    def attach(self) -> None:
        """There is a new engine; it has got nothing yet."""
        self._num_engines += 1
        self._engine, self._sent, self._done, self._paused = self._num_engines, 0, 0, False
        if self.mode is not None:
            self._control(Pause(self.mode))

    def detach(self) -> None:
        """There is no engine, so no step runs."""
        self._engine = 0
        self._wake()

    def on_stats(self, stats: Stats) -> None:
        """The engine tells how far it is."""
        if (stats.controls, stats.paused) != (self._done, self._paused):
            self._done, self._paused = stats.controls, stats.paused
            self._wake()

    def _set(self, mode: PauseMode | None) -> None:
        self.mode = mode
        self._keep(mode)
        self._wake()

    def _control(self, message: EngineControlMessage) -> tuple[int, int]:
        """Send it, if there is an engine; the engine and the number of the message."""
        if self._engine:
            self._sent += 1
            self._send([message])
        return self._engine, self._sent

    async def _until(self, done: Callable[[], bool]) -> None:
        while self._engine and not done():
            await self._news.wait()

    def _wake(self) -> None:
        self._news.set()
        self._news = asyncio.Event()
