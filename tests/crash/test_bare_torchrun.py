"""Bare `torchrun --max-restarts N`: a killed rank costs time, and no answer."""

import asyncio
import os
import re
import signal
import time
from pathlib import Path

from tests.crash.chaos import baseline, calls
from tests.server import free_port, running, torchrun


def test_a_killed_rank_changes_no_answer(tmp_path: Path) -> None:
    port = free_port()
    options = ("--master-port", str(free_port()), "--max-restarts", "3")
    with running([torchrun(ranks=2, port=port, options=options)], port, tmp_path / "log") as server:
        todo = [call for call in calls(13, 3, 200) if call.exact]
        expected = asyncio.run(baseline(server.url, todo))

        async def disturbed() -> list[object]:
            answers = asyncio.create_task(baseline(server.url, todo))
            await asyncio.sleep(0.3)
            os.kill(server.rank_pids()[1], signal.SIGKILL)
            assert not answers.done()
            return list(await answers)

        began_s = time.monotonic()
        assert asyncio.run(disturbed()) == expected
        took = re.findall(r"recovered in ([\d.]+) s", server.log)
        assert len(took) == 1, server.log
        print(f"recovered in {took[0]} s, all answered in {time.monotonic() - began_s:.1f} s")
        server.stop()
        server.assert_nothing_left()
