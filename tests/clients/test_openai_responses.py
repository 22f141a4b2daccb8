"""openai's Responses API against a live server, as its guide uses it (`make test-clients`)."""

import json
import os
import time
from typing import Any, Literal

import openai
import pytest
from openai import OpenAI
from pydantic import BaseModel, Field

URL = os.environ["TPSERVE_URL"]
client = OpenAI(base_url=URL, api_key="none", max_retries=0)
MODEL = next(iter(client.models.list())).id
ASK = "What is the weather in Paris?"


class Forecast(BaseModel):
    """A forecast of bounded size."""

    city: Literal["Paris", "Rome"]
    text: str = Field(max_length=16)
    scores: list[int] = Field(max_length=3)


TOOL: Any = openai.pydantic_function_tool(Forecast)
FUNCTION: Any = {"type": "function", "strict": True, **{name: TOOL["function"][name] for name in ("name", "parameters")}}
MORE: Any = {"extra_body": {"seed": 1}}


def test_create_retrieve_and_delete() -> None:
    made = client.responses.create(model=MODEL, input=ASK, instructions="Be brief.", max_output_tokens=20, **MORE)
    assert made.output_text and made.usage is not None and made.usage.output_tokens <= 20
    assert client.responses.retrieve(made.id).output_text == made.output_text
    next_one = client.responses.create(model=MODEL, input="And in Rome?", previous_response_id=made.id, max_output_tokens=8)
    items = list(client.responses.input_items.list(next_one.id, order="asc", limit=2))
    assert [item.type for item in items] == ["message"] * 3
    client.responses.delete(made.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(made.id)


def test_parse_a_schema() -> None:
    parsed = client.responses.parse(model=MODEL, input=ASK, text_format=Forecast, max_output_tokens=1500, **MORE)
    assert parsed.status == "completed" and isinstance(parsed.output_parsed, Forecast)


def test_stream_and_its_snapshots() -> None:
    with client.responses.stream(model=MODEL, input=ASK, text_format=Forecast, max_output_tokens=1500, **MORE) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert kinds[:2] == ["response.created", "response.in_progress"] and kinds[-1] == "response.completed"
    assert kinds.count("response.output_text.delta") > 3 and isinstance(final.output_parsed, Forecast)


def test_a_call_and_its_output() -> None:
    options: Any = {"tools": [FUNCTION], "tool_choice": "required", "parallel_tool_calls": False, "max_output_tokens": 1500}
    first = client.responses.create(model=MODEL, input=ASK, **options, **MORE)
    (call,) = [item for item in first.output if item.type == "function_call"]
    Forecast.model_validate_json(call.arguments)
    output: Any = {"type": "function_call_output", "call_id": call.call_id, "output": json.dumps({"sky": "clear"})}
    stored = client.responses.create(model=MODEL, input=[output], previous_response_id=first.id, max_output_tokens=8, **MORE)
    history: Any = [{"role": "user", "content": ASK}, *first.output, output]
    sent = client.responses.create(model=MODEL, input=history, max_output_tokens=8, store=False, **MORE)
    assert sent.output_text == stored.output_text
    with client.responses.stream(model=MODEL, input=ASK, **options, **MORE) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert "response.function_call_arguments.done" in kinds and final.output[-1].type == "function_call"


def test_in_the_background() -> None:
    options: Any = {"max_output_tokens": 60, "extra_body": {"ignore_eos": True}}
    made = client.responses.create(model=MODEL, input=ASK, background=True, **options)
    assert made.status in ("queued", "in_progress")
    while made.status in ("queued", "in_progress"):
        time.sleep(0.1)
        made = client.responses.retrieve(made.id)
    assert made.status == "incomplete" and made.output_text
    seen: list[Any] = []
    for event in client.responses.create(model=MODEL, input=ASK, background=True, stream=True, **options):
        seen.append(event)
        if len(seen) == 10:
            break
    rest = list(client.responses.retrieve(seen[0].response.id, stream=True, starting_after=seen[-1].sequence_number))
    assert [event.sequence_number for event in [*seen, *rest]] == list(range(10 + len(rest)))
    assert rest[-1].type == "response.incomplete"
    long = client.responses.create(
        model=MODEL, input=ASK, background=True, max_output_tokens=1500, extra_body={"ignore_eos": True}
    )
    assert client.responses.cancel(long.id).status == "cancelled"


def test_what_is_wrong_is_said() -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(model=MODEL, input=ASK, tools=[{"type": "web_search"}])
    assert caught.value.param == "tools[0].type"
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(model=MODEL, input=ASK, previous_response_id="resp_none")
    assert caught.value.code == "previous_response_not_found"
    assert client.responses.input_tokens.count(model=MODEL, input=ASK).input_tokens > 0
