"""Clients of the API against a live server: openai, langchain-openai, LiteLLM and pydantic-ai, as their own guides use them.

`make test-clients` starts the server and an environment with these clients; docs/clients.md has the results. The model is the
built-in one: what it says is of no use, but it must have the form that was asked for.
"""

import asyncio
import json
import os
from typing import Any, Literal

import litellm
import pytest
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from openai import AsyncOpenAI, BadRequestError, OpenAI, pydantic_function_tool
from pydantic import BaseModel, Field
from pydantic_ai import Agent, NativeOutput
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

URL = os.environ["TPSERVE_URL"]
"""Of the server, with /v1."""
client = OpenAI(base_url=URL, api_key="none", max_retries=0)
MODEL = next(iter(client.models.list())).id
ASK: list[Any] = [{"role": "user", "content": "What is the weather in Paris?"}]


class Weather(BaseModel):
    """Ask for the weather of a city."""

    city: str = Field(max_length=12)
    unit: Literal["celsius", "fahrenheit"]


class Answer(BaseModel):
    """An answer of bounded size."""

    text: str = Field(max_length=16)
    sure: bool
    scores: list[int] = Field(max_length=3)


TOOL: dict[str, Any] = {
    "type": "function",
    "function": {"name": "Weather", "description": "Ask for the weather", "parameters": Weather.model_json_schema()},
}


def test_openai_parse() -> None:
    completion = client.chat.completions.parse(model=MODEL, messages=ASK, response_format=Answer, max_tokens=1500, seed=1)
    message = completion.choices[0].message
    assert completion.choices[0].finish_reason == "stop" and isinstance(message.parsed, Answer)


def test_openai_stream_of_an_answer() -> None:
    with client.chat.completions.stream(model=MODEL, messages=ASK, response_format=Answer, max_tokens=1500, seed=1) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_completion()
    assert kinds.count("content.delta") > 3 and kinds[-1] == "content.done"
    assert isinstance(final.choices[0].message.parsed, Answer)


def test_openai_stream_of_a_call() -> None:
    options: dict[str, Any] = {"tools": [pydantic_function_tool(Weather)], "tool_choice": "required", "max_tokens": 1500}
    with client.chat.completions.stream(model=MODEL, messages=ASK, seed=1, **options) as stream:
        events = list(stream)
        final = stream.get_final_completion()
    deltas = [event for event in events if event.type == "tool_calls.function.arguments.delta"]
    (done, *_) = [event for event in events if event.type == "tool_calls.function.arguments.done"]
    call = (final.choices[0].message.tool_calls or [])[0]
    assert len(deltas) > 3 and isinstance(done.parsed_arguments, Weather)
    assert final.choices[0].finish_reason == "tool_calls" and isinstance(call.function.parsed_arguments, Weather)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "Weather"}}])
def test_openai_calls_and_their_answers(choice: Any) -> None:
    first = client.chat.completions.create(model=MODEL, messages=ASK, tools=[TOOL], tool_choice=choice, max_tokens=1500, seed=2)
    message = first.choices[0].message
    assert message.tool_calls and message.content is None
    assert first.choices[0].finish_reason == ("tool_calls" if choice == "required" else "stop")
    answers = [{"role": "tool", "tool_call_id": call.id, "content": "sunny"} for call in message.tool_calls]
    history = [*ASK, message.model_dump(), *answers]
    second = client.chat.completions.create(model=MODEL, messages=history, tools=[TOOL], max_tokens=8)
    assert second.usage is not None and first.usage is not None and second.usage.prompt_tokens > first.usage.prompt_tokens


def test_openai_strict_tools_and_one_call() -> None:
    strict = {"type": "function", "function": {**TOOL["function"], "strict": True}}
    for seed in range(4):
        completion = client.chat.completions.create(
            model=MODEL,
            messages=ASK,
            tools=[strict],
            tool_choice="required",
            parallel_tool_calls=False,
            seed=seed,
            max_tokens=1500,
        )
        (call,) = completion.choices[0].message.tool_calls or []
        Weather.model_validate_json(call.function.arguments)  # type: ignore[union-attr]


def test_openai_says_what_is_wrong() -> None:
    with pytest.raises(BadRequestError) as caught:
        client.chat.completions.create(model=MODEL, messages=ASK, tool_choice="required")
    assert caught.value.param == "tool_choice"


def test_openai_async() -> None:
    async def ask() -> Any:
        async with AsyncOpenAI(base_url=URL, api_key="none") as own:
            calls = [own.chat.completions.parse(model=MODEL, messages=ASK, response_format=Answer, seed=n) for n in range(4)]
            return await asyncio.gather(*calls)

    assert all(isinstance(completion.choices[0].message.parsed, Answer) for completion in asyncio.run(ask()))


@tool
def get_weather(city: Literal["Paris", "Rome"], days: Literal[1, 2]) -> str:
    """Ask for the weather of a city for some days."""
    return f"sunny in {city} for {days}"


def chat_openai(**more: Any) -> ChatOpenAI:
    return ChatOpenAI(base_url=URL, api_key="none", model=MODEL, seed=3, max_tokens=1500, **more)  # type: ignore[arg-type]


def test_langchain_binds_tools() -> None:
    model = chat_openai().bind_tools([get_weather], tool_choice="any", strict=True)
    message = model.invoke([HumanMessage("The weather in Paris?")])
    (call, *_) = message.tool_calls
    assert call["name"] == "get_weather" and call["args"]["city"] in ("Paris", "Rome")
    answers = [ToolMessage(get_weather.invoke(each["args"]), tool_call_id=each["id"]) for each in message.tool_calls]
    assert chat_openai().bind(max_tokens=4).invoke([HumanMessage("The weather?"), message, *answers]).content is not None
    chunks = list(model.stream("The weather in Rome?"))
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole += chunk
    assert len(chunks) > 3 and whole.tool_calls[0]["args"]["days"] in (1, 2)  # type: ignore[attr-defined]


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_langchain_structured_output(method: Any) -> None:
    structured = chat_openai().with_structured_output(Weather, method=method)
    assert isinstance(structured.invoke("The weather in Paris?"), Weather)


def test_langchain_json_mode() -> None:
    model = chat_openai().bind(response_format={"type": "json_object"}, max_tokens=20)
    assert str(model.invoke("Answer in JSON").content).startswith("{")


def test_litellm() -> None:
    options: dict[str, Any] = {"model": f"openai/{MODEL}", "api_base": URL, "api_key": "none", "seed": 4, "max_tokens": 1500}
    strict = {"type": "function", "function": {**TOOL["function"], "strict": True}}
    options |= {"parallel_tool_calls": False}
    called = litellm.completion(messages=ASK, tools=[strict], tool_choice="required", **options)
    assert json.loads(called.choices[0].message.tool_calls[0].function.arguments)
    chunks = list(litellm.completion(messages=ASK, tools=[strict], tool_choice="required", stream=True, **options))
    rebuilt = litellm.stream_chunk_builder(chunks, messages=ASK)
    assert rebuilt is not None and json.loads(rebuilt.choices[0].message.tool_calls[0].function.arguments)  # type: ignore[union-attr]
    options.pop("parallel_tool_calls")
    parsed = litellm.completion(messages=ASK, response_format=Answer, **options)
    Answer.model_validate_json(parsed.choices[0].message.content)
    with pytest.raises(litellm.exceptions.ContextWindowExceededError):
        litellm.completion(messages=[{"role": "user", "content": "word " * 9000}], **options)


@pytest.mark.parametrize("output", [Weather, NativeOutput(Weather)], ids=["tool", "native"])
def test_pydantic_ai(output: Any) -> None:
    model = OpenAIChatModel(MODEL, provider=OpenAIProvider(base_url=URL, api_key="none"))
    agent: Agent[None, Weather] = Agent(model, output_type=output, model_settings={"max_tokens": 1500, "seed": 5})
    result = agent.run_sync("The weather in Paris?")
    assert isinstance(result.output, Weather)

    async def stream() -> Weather:
        async with agent.run_stream("The weather in Rome?") as run:
            return await run.get_output()

    assert isinstance(asyncio.run(stream()), Weather)
