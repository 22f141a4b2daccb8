"""Pauses over the lives of engines: sent again, waited for, and never confirmed by an engine that is gone."""

import asyncio
from collections.abc import Coroutine
from typing import Any

from tpserve.engine_client.control import EngineControl
from tpserve.types.messages import EngineInput, Pause, PauseMode, ResetPrefixCache, Resume, Stats


class Engine:
    """What an engine is sent, and a control over it."""

    def __init__(self, mode: PauseMode | None = None) -> None:
        self.sent: list[EngineInput] = []
        self.kept: list[PauseMode | None] = []
        self.control = EngineControl(self.sent.extend, self.kept.append, mode)

    def says(self, controls: int, paused: bool) -> None:
        self.control.on_stats(Stats(0, 0, 0, 0, 0, 0, 0, 0, controls=controls, paused=paused))


async def begun(work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
    task = asyncio.ensure_future(work)
    await asyncio.sleep(0)
    return task


async def is_done(task: "asyncio.Task[None]") -> bool:
    for _ in range(3):
        await asyncio.sleep(0)
    return task.done()


def test_a_pause_is_reached_when_the_engine_has_seen_it_and_rests() -> None:
    async def run() -> None:
        engine = Engine()
        engine.control.attach()
        pausing = await begun(engine.control.pause("keep"))
        assert engine.sent == [Pause("keep")] and engine.kept == ["keep"]
        engine.says(0, False)
        assert not await is_done(pausing)
        engine.says(1, False)
        assert not await is_done(pausing), "a plan is in flight"
        engine.says(1, True)
        assert await is_done(pausing)
        engine.control.resume()
        again = await begun(engine.control.pause("wait"))
        engine.says(1, True)
        assert not await is_done(again), "that was the first pause"
        engine.says(3, True)
        assert await is_done(again) and engine.sent == [Pause("keep"), Resume(), Pause("wait")]
        engine.control.resume()
        engine.control.resume()
        assert engine.sent[3:] == [Resume()] and engine.kept[-1] is None

    asyncio.run(run())


def test_a_new_engine_is_paused_before_anything_else() -> None:
    async def run() -> None:
        engine = Engine("wait")
        engine.control.attach()
        assert engine.sent == [Pause("wait")] and engine.control.mode == "wait" and not engine.kept
        reset = await begun(engine.control.reset_prefix_cache())
        pausing = await begun(engine.control.pause("keep"))
        engine.control.detach()
        assert await is_done(pausing) and await is_done(reset), "without an engine no step runs, and nothing is cached"
        engine.control.attach()
        assert engine.sent[-1] == Pause("keep")
        engine.control.detach()
        engine.control.resume()
        sent = list(engine.sent)
        engine.control.attach()
        assert engine.sent == sent, "nobody waits for an end of a pause that it has not seen"

    asyncio.run(run())


def test_the_death_of_an_engine_answers_who_waits_though_the_next_is_there_at_once() -> None:
    async def run() -> None:
        engine = Engine()
        engine.control.attach()
        reset = await begun(engine.control.reset_prefix_cache())
        engine.says(0, False)
        assert not await is_done(reset)
        engine.control.detach()
        engine.control.attach()
        assert await is_done(reset) and engine.sent == [ResetPrefixCache()]

    asyncio.run(run())


def test_pausing_without_an_engine_and_an_end_by_somebody_else() -> None:
    async def run() -> None:
        engine = Engine()
        assert await is_done(await begun(engine.control.pause("keep"))) and not engine.sent
        engine.control.attach()
        pausing = await begun(engine.control.pause("wait"))
        engine.control.resume()
        assert await is_done(pausing)

    asyncio.run(run())
