"""Structured output of a real server: streams, bombs refused or served, and offline. `test_structured_fuzz` has layouts."""

import json
import re
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.server import Server, free_port, running, serve
from tpserve import LLM, SamplingParams, StructuredOutputsParams

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["red", "green"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
COMPACT = {"json": SCHEMA, "disable_any_whitespace": True}


def body(i: int, **more: Any) -> dict[str, Any]:
    form = (COMPACT, {"regex": "[a-f]{4,9}(!|\\?)"}, {"choice": ["left", "right", "straight on"]})[i % 3]
    fields = {"temperature": (0.0, 0.8, 1.4)[i // 3 % 3], "seed": i, "n": 1 + i % 2, "max_tokens": 150}
    return {"prompt": f"Once {i}", "structured_outputs": form, **fields, **more}


def satisfies(i: int, text: str) -> bool:
    if i % 3 == 0:
        value = json.loads(text)
        sizes = len(value["name"]) <= 12 and 0 <= value["age"] <= 120 and len(value["tags"]) <= 3
        return sizes and set(value) == {"name", "age", "tags"} and set(value["tags"]) <= {"red", "green"}
    return re.fullmatch("[a-f]{4,9}[!?]" if i % 3 == 1 else "left|right|straight on", text) is not None


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    port = free_port()
    with running([serve("-tp", "2", "--device", "cpu", port=port)], port, tmp_path_factory.mktemp("tp") / "log") as server:
        yield server


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_streamed_answer_is_the_whole_one(two_ranks: Server, path: str) -> None:
    more = {"messages": [{"role": "user", "content": "Hi"}], "prompt": None} if "chat" in path else {}
    whole = two_ranks.post(path, body(3, **more))[1]["choices"]
    events = two_ranks.stream(path, body(3, **more, stream=True))
    parts = [choice for event in events for choice in event["choices"]]
    for choice in whole:
        own = [part for part in parts if part["index"] == choice["index"]]
        text = "".join(part["delta"].get("content") or "" if "delta" in part else part["text"] for part in own)
        assert text == (choice["message"]["content"] if "message" in choice else choice["text"])
        assert own[-1]["finish_reason"] == "stop"


def test_bombs_are_refused_or_served_and_delay_nobody(two_ranks: Server) -> None:
    """While a stream runs, which reaches its end."""
    wide = {"enum": [f"{i:032x}" for i in range(25_000)]}
    levels: dict[str, Any] = {
        f"d{i}": {"anyOf": [{"type": "object", "properties": {name: {"$ref": f"#/$defs/d{i + 1}"} for name in "abc"}}] * 3}
        for i in range(30)
    }
    deep = {"$defs": {**levels, "d30": {"type": "string"}}, "$ref": "#/$defs/d0"}
    bombs = [
        {"json": wide},
        {"json": deep},
        {"regex": "(((a{1,300}){1,300}){1,300}b?){1,300}"},
        {"regex": "(" * 20_000 + ")" * 20_000},
        {"grammar": "start: start start | "},
        {"choice": ["x" * 3_000_000]},
    ]
    gaps: list[float] = []

    def watch() -> None:
        last = time.monotonic()
        for _ in two_ranks.stream("/v1/completions", {"prompt": "Once", "max_tokens": 1500, "ignore_eos": True, "stream": True}):
            now = time.monotonic()
            gaps.append(now - last)
            last = now

    stream = threading.Thread(target=watch)
    stream.start()
    answers = [two_ranks.post("/v1/completions", {"prompt": "a", "max_tokens": 2, "structured_outputs": bomb}) for bomb in bombs]
    many = [{"json": {"const": f"value {i}"}} for i in range(60)]
    answers += [two_ranks.post("/v1/completions", {"prompt": "a", "max_tokens": 2, "structured_outputs": form}) for form in many]
    stream.join(120)
    assert {status for status, _ in answers} <= {200, 400} and answers[3][0] == 400 and answers[-1][0] == 200
    refused = [answer["error"] for status, answer in answers if status == 400]
    assert all(error["code"] in ("invalid_grammar", "invalid_value", "body_too_complex") for error in refused), refused
    assert two_ranks.get("/health")[0] == 200 and len(gaps) > 100


def test_offline_in_vllms_words() -> None:
    params = [
        SamplingParams(max_tokens=150, seed=1, structured_outputs=StructuredOutputsParams(**COMPACT)),
        SamplingParams(max_tokens=20, seed=1, structured_outputs={"choice": ["left", "right"]}),
    ]
    with LLM(device="cpu", log_level="warning") as llm:
        first, second = (output.outputs[0] for output in llm.generate(["Once", "Once"], params))
    assert satisfies(0, first.text) and second.text in ("left", "right") and second.finish_reason == "stop"
