"""The anthropic library against a live server, as its guide uses it (`make test-clients`)."""

import asyncio
import os
from typing import Any

import anthropic
import pytest
from anthropic import Anthropic

URL = os.environ["TPSERVE_URL"].removesuffix("/v1")
client = Anthropic(base_url=URL, api_key="none", max_retries=0)
MODEL = os.environ["TPSERVE_MODEL"]
ASK: Any = [{"role": "user", "content": "What is the weather in Paris?"}]
CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOL: Any = {"name": "weather", "description": "Ask for the weather", "input_schema": CITY}
MORE: Any = {"extra_body": {"seed": 1}}


def test_a_message() -> None:
    message = client.messages.create(model=MODEL, max_tokens=12, messages=ASK, system="Be brief.", extra_body={"temperature": 0})
    assert message.content[0].type == "text" and message.content[0].text
    assert message.stop_reason in ("end_turn", "max_tokens") and message.usage.output_tokens <= 12
    counted = client.messages.count_tokens(model=MODEL, messages=ASK, system="Be brief.")
    cached = message.usage.cache_read_input_tokens or 0
    assert counted.input_tokens == message.usage.input_tokens + cached


def test_a_stream() -> None:
    with client.messages.stream(model=MODEL, max_tokens=30, messages=ASK, **MORE) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert final.content[0].type == "text" and final.content[0].text == text and len(text) > 10
    stopped = client.messages.create(model=MODEL, max_tokens=30, messages=ASK, stop_sequences=[text[5:8]], **MORE)
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", text[5:8])


def test_a_call_and_its_result() -> None:
    choice: Any = {"type": "any", "disable_parallel_tool_use": True}
    options: Any = {"model": MODEL, "max_tokens": 200, "tools": [TOOL], "tool_choice": choice, **MORE}
    first = client.messages.create(messages=ASK, **options)
    (use,) = [block for block in first.content if block.type == "tool_use"]
    assert first.stop_reason == "tool_use" and use.input["city"] in ("Paris", "Rome")  # type: ignore[index]
    result = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": use.id, "content": "sunny"}]}
    history: Any = [*ASK, {"role": "assistant", "content": first.content}, result]
    assert client.messages.create(model=MODEL, max_tokens=8, messages=history, tools=[TOOL]).usage.output_tokens <= 8
    with client.messages.stream(messages=ASK, **options) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_message()
    assert "input_json" in kinds and final.content[-1].type == "tool_use"
    assert final.content[-1].input["city"] in ("Paris", "Rome")  # type: ignore[index]


def test_what_is_wrong_is_said() -> None:
    image: Any = [{"role": "user", "content": [{"type": "image", "source": {"type": "url", "url": "http://x/y.png"}}]}]
    with pytest.raises(anthropic.BadRequestError, match="image"):
        client.messages.create(model=MODEL, max_tokens=8, messages=image)
    with pytest.raises(anthropic.NotFoundError) as caught:
        client.messages.create(model="none", max_tokens=8, messages=ASK)
    assert caught.value.request_id and caught.value.body["error"]["type"] == "not_found_error"  # type: ignore[index]


def test_async() -> None:
    async def ask() -> list[Any]:
        async with anthropic.AsyncAnthropic(base_url=URL, auth_token="none") as own:
            calls = [own.messages.create(model=MODEL, max_tokens=8, messages=ASK, extra_body={"top_k": 40}) for _ in range(3)]
            return list(await asyncio.gather(*calls))

    assert all(message.type == "message" for message in asyncio.run(ask()))
