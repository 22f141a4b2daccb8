"""`tpserve reload` on a real server under load: other flags, other weights, and what cannot be had. No client sees an error."""

import asyncio
import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.crash.mixed import Call, answer
from tests.crash.test_durable_answers import frontend_pid
from tests.server import BIN, Server, children, comm, free_port, running, serve
from tpserve import builtin

STREAMS = [
    Call(
        "/v1/completions",
        {"prompt": f"Story {i} of the sea", "max_tokens": 200, "ignore_eos": True, "temperature": 0.8 * (i % 2), "seed": i,
         "stream": True, "stream_options": {"include_usage": True}, "logprobs": 1},
    )
    for i in range(8)
]  # fmt: skip
SHORT = Call("/v1/completions", {"prompt": "The old mill", "max_tokens": 24, "temperature": 0, "logprobs": 1})


@pytest.fixture(scope="module")
def other_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built-in model's shape with other numbers."""
    place = tmp_path_factory.mktemp("other") / "model"
    shutil.copytree(builtin.path(), place)
    torch.manual_seed(5)
    for file in place.glob("*.safetensors"):
        tensors = load_file(file)
        save_file({name: t + 0.02 * torch.randn(t.shape).to(t.dtype) for name, t in tensors.items()}, file)
    return place


async def during(url: str, what: Callable[[], Awaitable[Any]], calls: list[Call]) -> tuple[list[Any], Any]:
    """The answers of `calls`, and of what happens once they are under way."""
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        under_way = [asyncio.create_task(answer(session, url, call)) for call in calls]
        await asyncio.sleep(0.2)
        happened = await what()
        return list(await asyncio.gather(*under_way)), happened


def alone(server: Server, calls: list[Call]) -> list[Any]:
    async def ask() -> list[Any]:
        async with aiohttp.ClientSession() as session:
            return list(await asyncio.gather(*(answer(session, server.url, call) for call in calls)))

    return asyncio.run(ask())


def metric(server: Server, name: str) -> float:
    lines = [line for line in server.get("/metrics")[1].splitlines() if line.startswith(name)]
    return sum(float(line.rpartition(" ")[2]) for line in lines)


def settled(server: Server, expected: list[Any]) -> None:
    """The server answers as it did, however it is disturbed."""
    deadline_s = time.monotonic() + 60
    while server.get("/readyz")[0] != 200:
        assert time.monotonic() < deadline_s, server.log
        time.sleep(0.05)
    assert alone(server, [SHORT]) == expected


def test_reload_under_load(other_weights: Path, tmp_path: Path) -> None:
    port = free_port()
    other_shape = tmp_path / "shape"
    shutil.copytree(builtin.path(), other_shape)
    config = json.loads((other_shape / "config.json").read_text())
    (other_shape / "config.json").write_text(json.dumps(config | {"intermediate_size": 2 * config["intermediate_size"]}))
    with running([serve("--nproc-per-node", "2", port=port)], port, tmp_path / "log") as server:
        expected, short = alone(server, STREAMS), alone(server, [SHORT])

        # other flags, then flags with which no rank can start: every stream is exact, and the first flags are back
        async def twice() -> list[tuple[int, Any]]:
            bodies = ({"max_num_seqs": 5, "max_queued_requests": 40}, {"max_num_seqs": 7, "kv_cache_memory": 0.0001})
            return [await asyncio.to_thread(server.post, "/reload", body) for body in bodies]

        answers, ((status, said), (failed, error)) = asyncio.run(during(server.url, twice, STREAMS))
        assert answers == expected
        assert (status, said["status"], said["resumption"]) == (200, "reloaded", "exact"), said
        assert (failed, error["error"]["code"]) == (500, "reload_failed") and "--max-model-len" in error["error"]["message"]
        info = server.get("/server_info")[1]
        assert (info["config"]["max_num_seqs"], info["recoveries"]) == (5, 0)
        assert [reload["outcome"] for reload in info["reloads"]] == ["done", "taken back"]
        assert server.post("/v1/completions", {"prompt": "a", "n": 46})[0] == 400, "46 sequences are more than 5 + 40"

        # what cannot be had changes nothing
        refused = {
            "no model directory": {"model": str(tmp_path / "missing")},
            "intermediate_size": {"model": str(other_shape)},
            "--tensor-parallel-size": {"tensor_parallel_size": 1},
            "less than the present": {"max_model_len": 100},
        }
        for text, body in refused.items():
            status, said = server.post("/reload", body)
            assert status == 400 and text in said["error"]["message"], said
        assert server.get("/server_info")[1]["epoch"] == info["epoch"]

        # other weights: streams go on, new requests are theirs, and nobody counts a mismatch
        command = [str(BIN / "tpserve"), "reload", "--url", server.url, "--model", str(other_weights)]

        async def by_command() -> str:
            done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, timeout=60)
            return done.stdout + done.stderr

        answers, text = asyncio.run(during(server.url, by_command, STREAMS))
        assert "reloaded in" in text and "seamless, not identical" in text, text
        assert [one["usage"]["completion_tokens"] for one in answers] == [200] * len(STREAMS) and answers != expected
        begun = [a["choices"][0]["text"][:20] == e["choices"][0]["text"][:20] for a, e in zip(answers, expected, strict=True)]
        assert sum(begun) >= 3, "what clients had of the streams in slots has changed"
        assert metric(server, "tpserve:resumed_requests_total") > 0 == metric(server, "tpserve:resume_mismatch_total")
        assert metric(server, 'tpserve:reloads_total{model_name="tidewick",outcome="done"}') == 2
        others = alone(server, [SHORT])
        assert others != short

        # whoever dies now comes back with them
        rank = server.rank_pids()[1]
        os.kill(rank, signal.SIGKILL)
        while server.rank_pids()[1:2] in ([], [rank]):
            time.sleep(0.02)
        settled(server, others)
        agent = next(pid for pid in children(server.processes[0].pid) if comm(pid) == "tpserve agent")
        os.kill(agent, signal.SIGKILL)
        while agent in children(server.processes[0].pid):
            time.sleep(0.02)
        settled(server, others)
        os.kill(frontend_pid(server), signal.SIGKILL)
        settled(server, others)
        assert server.get("/server_info")[1]["config"]["model"] == str(other_weights)

        # and back: the weights of the start give the answers of the start
        status, said = server.post("/reload", {"model": str(builtin.path())})
        assert status == 200 and said["resumption"] == "seamless, not identical", said
        assert alone(server, [SHORT]) == short
        num_open = [
            int(number) for number in re.findall(r"an operator reloads; epoch \d+ is over, open requests: (\d+)", server.log)
        ]
        assert num_open[0] > 0 < num_open[2], f"they were not there while it happened: {num_open}"
        assert server.stop() == [0]
        server.assert_nothing_left()
