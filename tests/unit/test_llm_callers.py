"""The scripts of a torchrun job among themselves: who comes late, who asks again, and what an end tells."""

import asyncio
from pathlib import Path

from tpserve.errors import UserError
from tpserve.llm.callers import Answer, Callers, Link, Trouble, trouble


async def heard(callers: Callers, link: Link, call: int) -> Answer | Trouble | None:
    """Ask once, let rank 0 read, and hear."""
    link.ask(call)
    for _ in range(50):
        callers.read()
        if (message := link.hear(call)) is not None:
            return message
        await asyncio.sleep(0.01)
    return None


def test_calls_are_numbered_and_kept_until_all_have_them(tmp_path: Path) -> None:
    async def scene() -> None:
        callers = Callers(2, f"ipc://{tmp_path}/callers", None)
        one, two = (Link(rank, f"ipc://{tmp_path}/callers") for rank in (1, 2))
        callers.answer(Answer(0, []))  # before anybody has come
        callers.answer(trouble(1, UserError("no")))
        assert await heard(callers, one, 0) == Answer(0, [])
        assert await heard(callers, one, 0) == Answer(0, []), "who missed it asks again"
        assert await heard(callers, one, 1) == Trouble(1, "user", "no")
        assert await heard(callers, two, 0) == Answer(0, []), "the slower one finds all of them"
        assert await heard(callers, two, 1) == Trouble(1, "user", "no")
        one.ask(2)
        two.ask(2)
        await callers.all_told(2.0)
        callers.end("engine", "rank 1 is dead")
        for link in (one, two):
            assert link.hear(2) == Trouble(2, "engine", "rank 1 is dead"), "who waits is told"
            assert await heard(callers, link, 3) == Trouble(3, "engine", "rank 1 is dead")
        one.leave("closed")
        while callers.left is None:
            callers.read()
        assert (callers.left.rank, callers.left.text) == (1, "closed")
        for end in (callers, one, two):
            end.close()

    asyncio.run(asyncio.wait_for(scene(), 20))
