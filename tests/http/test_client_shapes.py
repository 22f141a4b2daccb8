"""What well-known clients send, field by field and header by header, and what they read of the answer.

Open WebUI: backend/open_webui/routers/openai.py. Continue: core/llm/llms/{OpenAI,Vllm}.ts and its openai-adapters. LiteLLM and
openai: the headers of their SDKs. lm-eval: models/{api_models,openai_completions}.py. `make test-clients` runs those of Python.
"""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.http import checks
from tests.http.checks import Client
from tests.http.inprocess import MAX_MODEL_LEN, Server, serving

JSON = {"Content-Type": "application/json"}
OPEN_WEBUI = {
    **JSON,
    "Authorization": "Bearer sk-none",
    "X-OpenWebUI-User-Name": "Ada%20Lovelace",
    "X-OpenWebUI-User-Id": "42",
    "X-OpenWebUI-User-Email": "ada@example.org",
    "X-OpenWebUI-User-Role": "admin",
    "X-OpenWebUI-Chat-Id": "c0ffee",
}
CONTINUE = {**JSON, "Accept": "application/json", "x-api-key": "", "api-key": "", "Authorization": "Bearer undefined"}
SDK = {
    **JSON,
    "Accept": "application/json",
    "Accept-Encoding": "gzip, deflate, br, zstd",
    "Authorization": "Bearer none",
    "User-Agent": "AsyncOpenAI/Python 3.57.0",
    "X-Stainless-Lang": "python",
    "X-Stainless-Retry-Count": "0",
    "X-Stainless-Raw-Response": "true",
    "x-stainless-read-timeout": "600",
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("model")) as server:
        yield server


def send(server: Server, path: str, headers: dict[str, str], **body: Any) -> checks.Reply:
    return Client(server.url, headers).send("POST", path, json.dumps(body).encode())


def content(reply: checks.Reply) -> str:
    """The text of a streamed chat, read as both web clients do."""
    assert reply.status == 200, reply.body
    return "".join(event["choices"][0]["delta"].get("content") or "" for event in reply.events if event["choices"])


def test_open_webui_lists_models(server: Server) -> None:
    client = Client(server.url, OPEN_WEBUI)
    models = client.get("/v1/models").json
    assert [model["id"] for model in models["data"]] == ["tiny", "org/tiny"]
    for path in ("/api/version", "/api/tags", "/v1/api/tags"):  # a server of Ollama would answer
        checks.is_error(client.get(path), 404, code="not_found")


def test_open_webui_chats(server: Server) -> None:
    part = {"type": "text", "text": "hello", "cache_control": {"type": "ephemeral"}}
    reply = send(
        server,
        "/v1/chat/completions",
        OPEN_WEBUI,
        model="org/tiny",
        messages=[
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": ""},
            {"role": "user", "content": [part]},
        ],
        stream=True,
        stream_options={"include_usage": True},
        max_tokens=4,
        temperature=0.8,
        top_p=0.9,
        top_k=40,
        min_p=0.05,
        seed=0,
        frequency_penalty=0,
        presence_penalty=0.0,
        stop=[],
        logit_bias={"5": -100},
        ignore_eos=True,
        reasoning={"effort": "low"},
        user={"name": "Ada", "id": "42", "email": "ada@example.org", "role": "admin"},
        chat_id="c0ffee",
        session_id="s",
        id="m",
        background_tasks={"title_generation": True},
        features={"web_search": False},
        variables={"{{USER_NAME}}": "Ada"},
        files=None,
        tools=None,
        tool_ids=None,
    )
    *chunks, last = reply.events
    assert content(reply) and last["choices"] == [] and last["usage"]["completion_tokens"] == 4
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"


def test_open_webui_makes_a_title(server: Server) -> None:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "### Task:\nA title"}], "stream": False}
    reply = send(
        server, "/v1/chat/completions", OPEN_WEBUI, **body, max_completion_tokens=5, metadata={"task": "title_generation"}
    )
    (choice,) = reply.json["choices"]
    assert isinstance(choice["message"]["content"], str) and reply.json["usage"]["total_tokens"] > 5
    refused = send(server, "/v1/embeddings", OPEN_WEBUI, model="tiny", input=["a"])
    checks.is_error(refused, 400, code="unsupported_endpoint", says="embeddings")


def test_continue_finds_the_model(server: Server) -> None:
    card = Client(server.url, CONTINUE).get("/v1/models").json["data"][0]
    assert card["id"] == "tiny" and int(card["max_model_len"]) == MAX_MODEL_LEN


def test_continue_chats(server: Server) -> None:
    reply = send(
        server,
        "/v1/chat/completions",
        CONTINUE,
        model="tiny",
        messages=[
            {"role": "system", "content": "You are an agent."},
            {"role": "user", "content": "read it"},
            {"role": "assistant", "content": " "},
            {"role": "user", "content": "go on"},
        ],
        max_tokens=4,
        stream=True,
        stop=[f"</stop{number}>" for number in range(20)],
        stream_options={"include_usage": True},
        ignore_eos=True,
    )
    assert content(reply)


def test_continue_completes(server: Server) -> None:
    stops = ["<|endoftext|>", "\n\n", "/src/"]
    reply = send(
        server,
        "/v1/completions",
        CONTINUE,
        model="tiny",
        prompt="def f(",
        max_tokens=5,
        temperature=0.01,
        stop=stops,
        stream=True,
    )
    assert reply.status == 200 and all(isinstance(event["choices"][0]["text"], str) for event in reply.events)
    assert reply.events[-1]["choices"][0]["finish_reason"] in ("length", "stop")
    checks.is_error(send(server, "/v1/fim/completions", CONTINUE, prompt="a", suffix="b", stream=True), 404)
    checks.is_error(
        send(server, "/v1/rerank", CONTINUE, model="tiny", query="a", documents=["b"]), 400, code="unsupported_endpoint"
    )


def test_litellm_and_the_sdk(server: Server) -> None:
    messages = [{"role": "user", "content": "hi"}]
    body = {"model": "tiny", "messages": messages, "max_tokens": 3, "n": None, "stop": None, "tools": None, "extra_body": {}}
    reply = send(server, "/v1/chat/completions", SDK, **body, user=None, stream=False, response_format=None, seed=None)
    assert reply.status == 200 and reply.headers["content-type"] == "application/json"
    streamed = send(
        server, "/v1/chat/completions", SDK, **body, stream=True, stream_options={"include_usage": True}, ignore_eos=True
    )
    assert content(streamed) and streamed.headers["content-type"].startswith("text/event-stream")
    too_long = send(server, "/v1/completions", SDK, model="tiny", prompt="a b" * 1000)
    checks.is_error(too_long, 400, code="context_length_exceeded", says=f"maximum context length is {MAX_MODEL_LEN} tokens")


def test_lm_eval(server: Server) -> None:
    info = Client(server.url).get("/tokenizer_info").json
    assert {"eos_token", "chat_template"} <= set(info)
    ids = [send(server, "/tokenize", JSON, prompt=text, add_special_tokens=False).json["tokens"] for text in ("The red fox", "a")]
    scores = {"temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True}
    reply = send(server, "/v1/completions", {"Authorization": "Bearer "}, model="tiny", prompt=ids, **scores)
    for choice, prompt in zip(reply.json["choices"], ids, strict=True):
        logprobs = choice["logprobs"]
        assert len(logprobs["token_logprobs"][:-1]) == len(prompt) and logprobs["token_logprobs"][0] is None
        assert all(
            value <= max(top.values())
            for value, top in zip(logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True)
            if top
        )
    texts = {"max_tokens": 4, "temperature": 0, "stop": ["\n\n", "Q:"], "seed": 1234}
    reply = send(server, "/v1/completions", JSON, model="tiny", prompt=ids, **texts)
    assert [choice["index"] for choice in reply.json["choices"]] == [0, 1]
