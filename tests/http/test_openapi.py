"""/openapi.json and /docs: every route, every body, and no reference into the void."""

import json
import re
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest

from tests.http import checks
from tests.http.inprocess import Server, serving

HI = {"role": "user", "content": "hi"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("model")) as server:
        yield server


@pytest.fixture(scope="module")
def document(server: Server) -> Any:
    return checks.Client(server.url).get("/openapi.json").json


def body_schema(document: Any, path: str) -> Any:
    schema = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    return {**schema, "components": document["components"]}


def test_every_route_is_there(document: Any) -> None:
    assert document["openapi"] == "3.1.0"
    posts = {path for path, operations in document["paths"].items() if "post" in operations and "{" not in path}
    assert {"/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages", "/tokenize", "/detokenize"} <= posts
    without = {path for path in posts if "requestBody" not in document["paths"][path]["post"]}
    assert without == {"/pause", "/resume", "/reset_prefix_cache"} and document["paths"]["/pause"]["post"]["parameters"]
    assert {"/v1/models/{id}", "/openapi.json", "/docs", "/health", "/metrics"} <= set(document["paths"])
    operations = [operation for each in document["paths"].values() for operation in each.values()]
    assert len({operation["operationId"] for operation in operations}) == len(operations)
    assert not [operation["operationId"] for operation in operations if not operation["summary"]]


def test_references_lead_somewhere(document: Any) -> None:
    schemas = document["components"]["schemas"]
    for name in re.findall(r"#/components/schemas/(\w+)", str(document)):
        assert name in schemas
    for schema in schemas.values():
        jsonschema.Draft202012Validator.check_schema(schema)


@pytest.mark.parametrize(
    ("path", "body", "valid"),
    [
        ("/v1/completions", {"prompt": "a", "temperature": None, "max_tokens": 3, "unknown": 1}, True),
        ("/v1/completions", {"prompt": "a", "temperature": -1}, False),
        ("/v1/completions", {"prompt": 3}, False),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}], "top_p": 0.5}, True),
        ("/v1/chat/completions", {"messages": []}, False),
        ("/tokenize", {"prompt": "a"}, True),
        ("/detokenize", {"tokens": [1, 2]}, True),
        ("/detokenize", {"tokens": "a"}, False),
    ],
)
def test_schemas_say_what_the_server_says(server: Server, document: Any, path: str, body: Any, valid: bool) -> None:
    assert jsonschema.Draft202012Validator(body_schema(document, path)).is_valid(body) == valid
    reply = checks.Client(server.url).post(path, **body)
    assert (reply.status != 400) == valid, reply.json


def test_docs_need_nothing_else(server: Server) -> None:
    reply = checks.Client(server.url).get("/docs")
    text = reply.body.decode()
    assert reply.status == 200 and "POST /v1/completions" in text and "<script" not in text
    assert not re.search(r"(src|href)=.?https?:", text) and "default-src 'none'" in str(reply.headers)


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "/v1/completions", {"prompt": ["a", "b"], "max_tokens": 2, "logprobs": 1, "echo": True, "prompt_logprobs": 1}),
        ("POST", "/v1/chat/completions", {"messages": [HI], "max_tokens": 2, "logprobs": True, "top_logprobs": 2}),
        ("POST", "/v1/responses", {"input": "hi", "max_output_tokens": 2}),
        ("POST", "/v1/messages", {"messages": [HI], "max_tokens": 2}),
        ("POST", "/v1/messages/count_tokens", {"messages": [HI]}),
        ("POST", "/v1/responses/input_tokens", {"input": "hi"}),
        ("POST", "/tokenize", {"prompt": "hi"}),
        ("POST", "/detokenize", {"tokens": [5]}),
        ("POST", "/v1/completions", {"prompt": "a", "temperature": -1}),
        ("POST", "/v1/messages", {}),
        ("GET", "/v1/models", None),
        ("GET", "/health", None),
        ("GET", "/load", None),
        ("GET", "/tokenizer_info", None),
        ("GET", "/server_info", None),
    ],
)
def test_answers_are_as_declared(server: Server, document: Any, method: str, path: str, body: Any) -> None:
    reply = checks.Client(server.url).send(method, path, None if body is None else json.dumps(body).encode())
    declared = document["paths"][path][method.lower()]["responses"]
    schema = declared[str(reply.status)]["content"]["application/json"]["schema"]
    jsonschema.Draft202012Validator({**schema, "components": document["components"]}).validate(reply.json)


def test_links_lead_to_operations(document: Any) -> None:
    operations = {operation["operationId"]: operation for each in document["paths"].values() for operation in each.values()}
    links = [
        link
        for operation in operations.values()
        for response in operation["responses"].values()
        for link in response.get("links", {}).values()
    ]
    assert len(links) > 10 and all(link["operationId"] in operations for link in links)
    for link in links:
        assert {"id"} == {each["name"] for each in operations[link["operationId"]]["parameters"] if each["in"] == "path"}
