"""Random requests with structured output: every `stop` validates, and tokens are equal at all layouts, alone and in a crowd.

The short form is part of `make test`; `make fuzz-structured` runs the long one, COUNT requests at four layouts.
"""

import os
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.server import Server, free_port, running, serve
from tests.structured_requests import StructuredRequest, message_text, requests
from tests.unit import chat_templates

CROWD = 12
COUNT, SEED = int(os.environ.get("COUNT", "1000")), int(os.environ.get("SEED", "0"))
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
"""Of a small model: ranks then do not wait for each other's threads. No token depends on it."""
SERVED = ("--dtype", "float32", "--chat-template", getattr(chat_templates, os.environ.get("TEMPLATE", "QWEN3")))
"""In float32, in which no layout differs from another. The chat template: with reasoning and calls, in a family's style."""
LAYOUTS = {"TP 1": (), "TP 2": ("-tp", "2"), "TP 3": ("-tp", "3"), "PP 2": ("-pp", "2")}


def answer(server: Server, request: StructuredRequest) -> Any:
    """Token ids, text and end of each choice, or the error of a refusal."""
    status, body = server.post(request.path, request.body, timeout_s=300)
    assert status in (200, 400), (status, body, request.body)
    if status == 400:
        return body["error"]["message"]
    return [(choice["token_ids"], said(request, choice), choice["finish_reason"]) for choice in body["choices"]]


def said(request: StructuredRequest, choice: dict[str, Any]) -> str:
    message = choice.get("message", {"content": choice.get("text")})
    calls = [(call["function"]["name"], call["function"]["arguments"]) for call in message.get("tool_calls", ())]
    return message_text(message["content"], calls) if "tools" in request.body else message["content"] or ""


def streamed(server: Server, request: StructuredRequest) -> Any:
    """The same, from a stream."""
    ids, texts, calls, ends = (dict[int, Any]() for _ in range(4))
    for event in server.stream(request.path, {**request.body, "stream": True}, timeout_s=300):
        for choice in event["choices"]:
            index, delta = choice["index"], choice.get("delta", {})
            ids[index] = ids.get(index, []) + (choice.get("token_ids") or [])
            texts[index] = texts.get(index, "") + (delta.get("content") or choice.get("text") or "")
            ends[index] = choice["finish_reason"] or ends.get(index)
            for call in delta.get("tool_calls", ()):
                own = calls.setdefault(index, [])
                if "id" in call:
                    own.append((call["function"]["name"], ""))
                own[-1] = (own[-1][0], own[-1][1] + call["function"]["arguments"])
    with_tools = "tools" in request.body
    shown = {index: message_text(texts[index], calls.get(index, [])) if with_tools else texts[index] for index in ids}
    return [(ids[index], shown[index], ends[index]) for index in sorted(ids)]


def alone(server: Server, asked: Sequence[StructuredRequest]) -> list[Any]:
    return [answer(server, request) for request in asked]


def crowd(server: Server, asked: Sequence[StructuredRequest], reference: Sequence[Any]) -> list[Any]:
    """All at once as far as `CROWD` goes, in another order, every second one of those that are answered streamed."""

    def one(index: int) -> Any:
        stream = index % 2 and isinstance(reference[index], list)
        return (streamed if stream else answer)(server, asked[index])

    order = sorted(range(len(asked)), key=lambda index: index * 7919 % 1009)
    with ThreadPoolExecutor(CROWD) as pool:
        answers = dict(zip(order, pool.map(one, order), strict=True))
    return [answers[index] for index in range(len(asked))]


def wrong(asked: Sequence[StructuredRequest], answers: Sequence[Any]) -> list[str]:
    """The answers that ended with `stop` and are not in the language."""
    found = []
    for request, choices in zip(asked, answers, strict=True):
        for _, text, end in choices if isinstance(choices, list) else []:
            if end in ("stop", "tool_calls") and (error := request.check(text)):
                found.append(f"{text!r}: {error}: {request.body}")
    return found


def differences(asked: Sequence[StructuredRequest], one: Sequence[Any], other: Sequence[Any]) -> list[str]:
    return [f"{a} != {b}: {request.body}" for request, a, b in zip(asked, one, other, strict=True) if a != b]


def counted(answers: Sequence[Any]) -> Counter[str]:
    return Counter(end for each in answers for end in ([e for _, _, e in each] if isinstance(each, list) else ["refused"]))


def test_ends_satisfy_and_do_not_depend_on_layout_or_company(tmp_path: Path) -> None:
    asked = requests(40, seed=1)
    port, port2 = free_port(), free_port()
    with running([serve(*SERVED, "-tp", "2", "--device", "cpu", port=port)], port, tmp_path / "tp", env=ONE_THREAD) as server:
        reference = alone(server, asked)
    with running([serve(*SERVED, "-pp", "2", "--device", "cpu", port=port2)], port2, tmp_path / "pp", env=ONE_THREAD) as server:
        other = crowd(server, asked, reference)
    assert not wrong(asked, reference)
    assert not differences(asked, reference, other)
    counts = counted(reference)
    assert counts["stop"] >= 25 and counts["tool_calls"] >= 5, counts


@pytest.mark.long
def test_a_thousand_requests_at_four_layouts(tmp_path: Path) -> None:
    asked, reference = requests(COUNT, SEED), None
    for name, layout in LAYOUTS.items():
        port, begin = free_port(), time.monotonic()
        log = tmp_path / name.replace(" ", "")
        with running([serve(*SERVED, *layout, "--device", "cpu", port=port)], port, log, env=ONE_THREAD) as server:
            if reference is None:
                reference = alone(server, asked)
                print(f"\n{name}: alone {time.monotonic() - begin:.0f} s, {dict(counted(reference))}", flush=True)
                print({text for text in reference if isinstance(text, str)}, flush=True)
                assert not (bad := wrong(asked, reference)), "\n".join(bad[:5])
            other = crowd(server, asked, reference)
            print(f"{name}: in a crowd of {CROWD}, {time.monotonic() - begin:.0f} s with the start", flush=True)
            assert not (bad := differences(asked, reference, other)), "\n".join(bad[:5])
            assert server.get("/health")[0] == 200
    assert reference is not None and counted(reference)["stop"] > COUNT / 2
