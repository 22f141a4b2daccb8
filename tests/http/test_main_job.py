"""The main job: real ranks of a bare torchrun, real HTTP, the built-in model, one server per layout, and all say the same."""

import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.http import checks, score_checks
from tests.server import Server, free_port, running, torchrun
from tpserve import builtin

LAYOUTS = {"tp1": (1, 1), "tp2": (2, 1), "tp3": (3, 1), "pp2": (1, 2), "pp3": (1, 3), "tp2pp2": (2, 2)}
FLOAT32 = ["--dtype", "float32"]
"""In bfloat16 each rank rounds its part of a sum, so that tensor-parallel sizes can part at a near tie (docs/numerics.md)."""
QUESTIONS: list[dict[str, Any]] = [
    {"prompt": "Once upon a time", "max_tokens": 40, "temperature": 0},
    {"prompt": [17, 300, 5, 42], "max_tokens": 20, "temperature": 0, "ignore_eos": True, "logprobs": 3},
    {"prompt": "The lighthouse", "max_tokens": 40, "temperature": 1.0, "seed": 7},
    {"prompt": "The baker " * 90, "max_tokens": 10, "temperature": 0.7, "seed": 2**64 - 1},
    {"prompt": "One day", "max_tokens": 30, "temperature": 0.9, "seed": 3, "n": 3},
    {"prompt": "A boat", "max_tokens": 30, "seed": 5, "top_k": 40, "top_p": 0.95, "repetition_penalty": 1.2, "min_tokens": 20},
    {"prompt": "A boat", "max_tokens": 30, "temperature": 0, "frequency_penalty": 0.5, "bad_words": ["the", "and"]},
]
SCORED = ["Once upon a time there was a lighthouse. " * 20, "漢字 🎉"]
Scores = list[list[float]]
Answers = list[list[tuple[list[int], str]]]


def answers(server: Server) -> Answers:
    """Token ids and finish reasons of every choice of every question."""
    result = []
    for question in QUESTIONS:
        status, body = server.post("/v1/completions", {**question, "return_token_ids": True})
        assert status == 200, body
        result.append([(choice["token_ids"], choice["finish_reason"]) for choice in body["choices"]])
    return result


def scores(server: Server) -> Scores:
    """The log probability of every token but the first of texts that are not continued."""
    status, body = server.post("/v1/completions", {"prompt": SCORED, "echo": True, "logprobs": 0, "max_tokens": 0})
    assert status == 200, body
    return [choice["logprobs"]["token_logprobs"][1:] for choice in body["choices"]]


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> tuple[Answers, Scores]:
    """What one rank says."""
    port = free_port()
    with running([torchrun(*FLOAT32, ranks=1, port=port)], port, tmp_path_factory.mktemp("tp1") / "log") as server:
        check_scores(server)
        return answers(server), scores(server)


def check_scores(server: Server) -> None:
    """What scoring, the choice of the best and the prefix cache owe a client, on ranks."""
    score_checks.scored_prompts(server.url)
    score_checks.best_of(server.url)
    score_checks.cached_tokens(server.url)


@pytest.fixture(scope="module", params=["tp2", "tp3", "pp2", "pp3", "tp2pp2"])
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, expected: tuple[Answers, Scores]
) -> Iterator[tuple[str, Server, Path]]:
    directory, port = tmp_path_factory.mktemp(request.param), free_port()
    tp, pp = LAYOUTS[request.param]
    flags = [*FLOAT32, "-tp", str(tp), "--pipeline_parallel_size", str(pp), "--step-trace", str(directory / "trace")]
    with running([torchrun(*flags, ranks=tp * pp, port=port)], port, directory / "log") as server:
        yield request.param, server, directory
        server.stop()
        server.assert_nothing_left()
        assert "Traceback" not in server.log.partition("SignalException")[0].partition("death signal")[0]


def test_every_layout_says_the_same(served: tuple[str, Server, Path], expected: tuple[Answers, Scores]) -> None:
    _, server, _ = served
    assert answers(server) == expected[0]
    for values, others in zip(scores(server), expected[1], strict=True):
        score_checks.assert_close(values, others)


def test_log_lines(served: tuple[str, Server, Path]) -> None:
    name, server, _ = served
    tp, pp = LAYOUTS[name]
    log = server.log
    assert f"tpserve ready: {builtin.NAME} on {server.url}, {tp * pp} CPU ranks on 1 node, TP {tp} x PP {pp}, " in log
    assert "CPU KV cache size: " in log and "Maximum concurrency for " in log and "GB/s" in log
    for question in QUESTIONS:
        assert str(question["prompt"]) not in log, "prompts are not logged"


def test_the_api_over_ranks(served: tuple[str, Server, Path]) -> None:
    """The whole of the client checks where stages and shards both exist; the parts that touch ranks elsewhere."""
    name, server, _ = served
    checks.streaming_order(server.url)
    check_scores(server)
    if name != "tp2pp2":
        return
    checks.info_routes(server.url, builtin.NAME)
    checks.openai_library(server.url, builtin.NAME)
    checks.completion_fields(server.url, builtin.NAME)
    checks.stop_strings(server.url)
    checks.wrong_requests(server.url)
    score_checks.wrong_requests(server.url)
    checks.too_long(server.url)


def test_a_pause_changes_no_token(served: tuple[str, Server, Path]) -> None:
    name, server, _ = served
    if name not in ("tp2", "tp2pp2"):
        return
    body = {"prompt": "The lighthouse", "max_tokens": 100, "temperature": 1.0, "seed": 7, "ignore_eos": True}
    expected = server.complete(body["prompt"], **{name: value for name, value in body.items() if name != "prompt"})["text"]
    stream = server.stream("/v1/completions", body | {"stream": True})
    text = next(stream)["choices"][0]["text"]
    assert server.post("/pause", b"")[0] == 200 and server.get("/readyz")[1]["state"] == "paused"
    steps = []
    for _ in range(2):
        time.sleep(0.7)  # longer than a heartbeat
        steps.append([rank["last_step"] for rank in server.get("/server_info")[1]["ranks"]])
    assert steps[0] == steps[1], "no rank has anything to do"
    assert server.post("/resume", b"")[0] == 200
    assert text + "".join(event["choices"][0]["text"] for event in stream) == expected


def test_200_streams_with_disconnects(served: tuple[str, Server, Path]) -> None:
    name, server, _ = served
    if name in ("tp2", "pp2"):
        checks.disconnects(server.url, 200)
    checks.idle(server.url)


def test_plans_in_flight(served: tuple[str, Server, Path]) -> None:
    """Stage 0 runs plan n + 1 before the last stage ends plan n; with one stage, plan n + 1 is sent before result n applies."""
    name, _, directory = served
    tp, pp = LAYOUTS[name]
    first, last = events(directory, 0), events(directory, tp * (pp - 1))
    if pp == 1:
        ahead = [n for n in first["applied"] if n + 1 in first["sent"] and first["sent"][n + 1][0] < first["applied"][n][0]]
        assert len(ahead) > len(first["applied"]) / 2
    else:
        overlap = [n for n in last["run"] if n + 1 in first["run"] and first["run"][n + 1][0] < last["run"][n][1]]
        assert len(overlap) > 10, f"of {len(last['run'])} steps"


def events(directory: Path, rank: int) -> dict[str, dict[int, tuple[float, float]]]:
    """By name and step: begin and end in microseconds."""
    found: dict[str, dict[int, tuple[float, float]]] = {"sent": {}, "run": {}, "applied": {}}
    for line in (directory / "trace" / f"rank{rank}.jsonl").read_text().splitlines():
        entry = json.loads(line)
        found[entry["name"]][entry["args"]["step"]] = (entry["ts"], entry["ts"] + entry.get("dur", 0.0))
    return found


def test_a_stream_outlives_the_request_to_end(tmp_path: Path) -> None:
    """SIGTERM drains: what is open is answered whole, what comes is refused, and nothing is left."""
    port = free_port()
    with running([torchrun("-tp", "2", ranks=2, port=port)], port, tmp_path / "log") as server:
        stream = checks.open_stream(server.url, prompt="Once", max_tokens=150, ignore_eos=True, stream=True)
        next(stream)
        for process in server.processes:
            process.send_signal(signal.SIGTERM)
        lines = list(stream)
        assert any(b"[DONE]" in line for line in lines) and not any(b'"error"' in line for line in lines)
        server.wait()
        server.assert_nothing_left()
