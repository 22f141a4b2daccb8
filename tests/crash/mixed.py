"""Requests of every kind, and their answers in a form that two runs must have alike."""

import asyncio
import json
import random
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import aiohttp

Body = dict[str, Any]

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "look_up", "parameters": SCHEMA, "strict": True}}
STARTS = ("Once upon a time", "The old lighthouse", "Tell me of the sea", "A fox and a hen", "In the harbour", "Every evening")


@dataclass(frozen=True)
class Call:
    """One request: `path` and `body`. `exact`: two runs give the same tokens."""

    path: str
    body: Body
    exact: bool = True


def calls(count: int, seed: int, max_tokens: int) -> list[Call]:
    """`count` requests of mixed features."""
    rng = random.Random(seed)
    return [_call(rng, index, max_tokens) for index in range(count)]


def _call(rng: random.Random, index: int, max_tokens: int) -> Call:
    prompt = f"{rng.choice(STARTS)} {index}" + rng.choice(
        ["", " there was a very small harbour with a light." * rng.randint(1, 12)]
    )
    length = rng.randint(max_tokens // 4, max_tokens)
    sampled: Body = {"temperature": rng.choice([0.5, 0.9, 1.2]), "seed": rng.randrange(1 << 40)}
    chat: Body = {"messages": [{"role": "user", "content": prompt}], "max_tokens": length}
    text: Body = {"prompt": prompt, "max_tokens": length, "ignore_eos": True}
    kinds: list[tuple[str, Body, bool]] = [
        ("/v1/completions", text | {"temperature": 0}, True),
        ("/v1/completions", text | sampled | {"top_p": 0.9, "top_k": 50}, True),
        ("/v1/completions", text | sampled | {"min_p": 0.02, "logprobs": 3}, True),
        (
            "/v1/completions",
            text | sampled | {"presence_penalty": 0.7, "frequency_penalty": 0.4, "repetition_penalty": 1.1},
            True,
        ),
        ("/v1/completions", text | sampled | {"min_tokens": length // 2, "stop": ["the ", ". "], "ignore_eos": False}, True),
        ("/v1/completions", text | sampled | {"echo": True, "logprobs": 2, "prompt": prompt * 3}, True),
        ("/v1/completions", text | sampled | {"n": 3, "priority": rng.randint(-2, 2)}, True),
        ("/v1/completions", text | sampled | {"n": 2, "best_of": 4, "max_tokens": length // 2}, True),
        ("/v1/completions", text | sampled | {"prompt": [prompt, prompt + " once"]}, True),
        ("/v1/completions", text | {"temperature": 1.0}, False),
        ("/v1/chat/completions", chat | sampled | {"logprobs": True, "top_logprobs": 2}, True),
        ("/v1/chat/completions", chat | sampled | _json_schema(), True),
        ("/v1/chat/completions", chat | sampled | {"tools": [TOOL], "tool_choice": "required", "max_tokens": 200}, True),
    ]
    path, body, exact = kinds[index % len(kinds)]
    if "best_of" not in body and rng.random() < 0.7:
        body = body | {"stream": True, "stream_options": {"include_usage": True}}
    return Call(path, body, exact)


def _json_schema() -> Body:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}}


async def answer(session: aiohttp.ClientSession, url: str, call: Call, *, again: bool = False) -> Body:
    """The answer: for each choice its text, log probabilities, calls and finish reason, and the usage. Raises on any error.

    `again`: the request is a stream that outlives its connection; come back when that breaks.
    """
    if again:
        return await _joined(_events_of_all(session, url, call))
    async with session.post(url + call.path, json=call.body) as response:
        if response.status != 200:
            raise AssertionError(f"status {response.status}: {await response.text()}")
        if not call.body.get("stream"):
            return _whole(await response.json())
        return await _joined(_events(response))


async def _events(response: aiohttp.ClientResponse) -> AsyncIterator[Body]:
    ended = False
    async for line in response.content:
        if line.startswith(b"data: [DONE]"):
            ended = True
        elif line.startswith(b"data: "):
            event: Body = json.loads(line[6:])
            if "error" in event:
                raise AssertionError(f"an error in the stream: {event}")
            yield event
    if not ended:
        raise AssertionError("the stream broke off")


async def _events_of_all(session: aiohttp.ClientSession, url: str, call: Call) -> AsyncIterator[Body]:
    """The events over as many connections as it takes."""
    stream_id, last, ended = "", "0", False
    while not ended:
        try:
            if stream_id:
                asked = session.get(f"{url}/v1/streams/{stream_id}", headers={"Last-Event-ID": last})
            else:
                asked = session.post(url + call.path, json=call.body, headers={"X-Resumable": "1"})
            async with asked as response:
                if response.status != 503:
                    assert response.status == 200, f"status {response.status}: {await response.text()}"
                    stream_id, event_id = response.headers["X-Stream-Id"], ""
                    async for line in response.content:
                        if line.startswith(b"id: "):
                            event_id = line[4:].strip().decode()
                        elif line.startswith(b"data: [DONE]"):
                            ended = True
                        elif line.startswith(b"data: ") and event_id:
                            yield json.loads(line[6:])
                            last, event_id = event_id, ""
        except (aiohttp.ClientError, ConnectionError):
            pass
        if not ended:
            await asyncio.sleep(0.1)


async def _joined(events: AsyncIterator[Body]) -> Body:
    choices: dict[int, Body] = {}
    usage: Body = {}
    async for event in events:
        usage = event.get("usage") or usage
        for part in event["choices"]:
            choice = choices.setdefault(part["index"], {"text": "", "logprobs": [], "calls": "", "finish": None})
            delta = part.get("delta", {})
            choice["text"] += part.get("text") or delta.get("content") or ""
            choice["calls"] += _calls(delta.get("tool_calls"))
            choice["logprobs"] += _logprobs(part.get("logprobs"))
            assert not (choice["finish"] and part.get("finish_reason")), "it ended twice"
            choice["finish"] = choice["finish"] or part.get("finish_reason")
    return {"choices": choices, "usage": _usage(usage)}


def _whole(body: Body) -> Body:
    choices = {}
    for choice in body["choices"]:
        message = choice.get("message", {})
        choices[choice["index"]] = {
            "text": choice.get("text") or message.get("content") or "",
            "logprobs": _logprobs(choice.get("logprobs")),
            "calls": _calls(message.get("tool_calls")),
            "finish": choice["finish_reason"],
        }
    return {"choices": choices, "usage": _usage(body["usage"])}


def _calls(calls: Any) -> str:
    """Names and arguments; ids are random."""
    return "".join((call["function"].get("name") or "") + (call["function"].get("arguments") or "") for call in calls or ())


def _logprobs(logprobs: Any) -> list[Any]:
    if not logprobs:
        return []
    if "content" in logprobs:
        return list(logprobs["content"] or ())
    fields = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
    return [list(row) for row in zip(*(logprobs[name] for name in fields), strict=True)]


def _usage(usage: Body) -> Body:
    """Without what depends on the load: how much of a prompt was in the cache."""
    return {name: usage.get(name) for name in ("prompt_tokens", "completion_tokens", "total_tokens")}
