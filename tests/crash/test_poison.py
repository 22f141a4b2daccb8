"""A request that makes a rank fail ends alone, after its second failure; a hundred others around it are exact."""

import asyncio
import json
from pathlib import Path

import aiohttp
import pytest

from tests.crash.mixed import Call, answer
from tests.server import free_port, running, serve
from tpserve import builtin

ROOT = Path(__file__).resolve().parents[2]
POISON = "zzz qqq zzz"
INNOCENT = [
    Call(
        "/v1/completions",
        {"prompt": f"Story {i} of the sea", "max_tokens": 150, "ignore_eos": True, "temperature": 0.8, "seed": i, "stream": True,
         "stream_options": {"include_usage": True}},
    )
    for i in range(100)
]  # fmt: skip


async def play(url: str) -> tuple[list[object], list[object], int, dict[str, str]]:
    """The answers of the innocent alone and beside the poison, and the poison's status and error."""
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        alone = await asyncio.gather(*(answer(session, url, call) for call in INNOCENT))
        beside = [asyncio.create_task(answer(session, url, call)) for call in INNOCENT]
        await asyncio.sleep(0.5)
        body = {"prompt": POISON, "max_tokens": 40, "ignore_eos": True}
        async with session.post(url + "/v1/completions", json=body) as response:
            status, error = response.status, json.loads(await response.read())["error"]
        return list(alone), list(await asyncio.gather(*beside)), status, error


@pytest.mark.parametrize(
    ("how", "after", "deaths"),
    [
        ("raise", 0, 2),
        pytest.param("raise", 7, 2, marks=pytest.mark.long),
        pytest.param("exit", 0, 2, marks=pytest.mark.long),
        pytest.param("segv", 0, 2, marks=pytest.mark.long),
        pytest.param("segv", 7, 9, marks=pytest.mark.long),
    ],
)
def test_poison(how: str, after: int, deaths: int, tmp_path: Path) -> None:
    port = free_port()
    environ = {
        "POISON": f"{how}:{POISON}:{after}",
        "POISON_TOKENIZER": str(builtin.path()),
        "PYTHONPATH": f"{ROOT / 'tests' / 'crash' / 'poisonous'}:{ROOT}:{ROOT / 'kernels'}",
    }
    with running([serve("--nproc-per-node", "2", port=port)], port, tmp_path / "log", env=environ) as server:
        alone, beside, status, error = asyncio.run(play(server.url))
        assert (status, error["code"]) == (500, "request_quarantined"), error
        assert beside == alone
        recoveries = server.get("/server_info")[1]["recoveries"]
        assert 1 <= recoveries <= deaths, server.log
        assert server.stop() == [0]
        server.assert_nothing_left()
