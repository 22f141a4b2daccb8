"""Flags of vLLM's that change what every answer has, and --root-path."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.http import checks
from tests.http.checks import Client
from tests.http.inprocess import Server, serving
from tpserve.frontend.openai.encoder import TIMES


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    flags = {"enable_force_include_usage": True, "enable_per_request_metrics": True, "return_tokens_as_token_ids": True}
    with serving(tmp_path_factory.mktemp("model"), root_path="/llm", api_key="k", **flags) as server:
        yield server


def client_of(server: Server, path: str = "") -> Client:
    return Client(server.url + path, {"Authorization": "Bearer k"})


def test_usage_in_every_chunk(server: Server) -> None:
    for send in (client_of(server).chat, client_of(server).completion):
        *chunks, last = send(stream=True, max_tokens=4, ignore_eos=True).events
        assert all(chunk["usage"]["prompt_tokens"] > 0 for chunk in chunks)
        assert last["choices"] == [] and last["usage"]["completion_tokens"] == 4


def test_times_of_an_answer(server: Server) -> None:
    client = client_of(server)
    for answer in (client.completion(max_tokens=4, ignore_eos=True).json, client.chat(max_tokens=4, stream=True).events[-1]):
        assert tuple(answer["metrics"]) == TIMES and answer["metrics"]["time_to_first_token_ms"] >= 0
    found = client.completion(max_tokens=1, ignore_eos=True).json["metrics"]
    assert found["mean_itl_ms"] is None and found["generation_time_ms"] == 0
    assert "metrics" not in client.completion(n=2, max_tokens=1).json


def test_tokens_are_named_by_their_ids(server: Server) -> None:
    choice = client_of(server).completion(max_tokens=2, logprobs=1, return_token_ids=True).json["choices"][0]
    assert choice["logprobs"]["tokens"] == [f"token_id:{token}" for token in choice["token_ids"]]
    names = client_of(server).completion(max_tokens=2, logprobs=1, return_tokens_as_token_ids=False).json["choices"][0]
    assert not any(name.startswith("token_id:") for name in names["logprobs"]["tokens"])
    assert client_of(server).post("/v1/responses", input="hi", max_output_tokens=1).status == 200


def test_a_path_of_a_proxy(server: Server) -> None:
    for path in ("/v1/models", "/llm/v1/models", "/llm/health?probe=1", "/llm", "/llm/", "/llm/v1/models/org/tiny"):
        assert client_of(server).get(path).status == 200, path
    for path in ("/llmv1/models", "/llm/llm/v1/models"):
        checks.is_error(client_of(server).get(path), 404)
    checks.is_error(Client(server.url).get("/llm/v1/models"), 401)
    posted = client_of(server).send("POST", "/llm/v1/completions", b'{"prompt": "a", "max_tokens": 1}')
    assert posted.status == 200
    document = client_of(server).get("/llm/openapi.json").json
    assert document["servers"] == [{"url": "/llm"}]


def test_without_the_flags(tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        answer = Client(server.url).completion(max_tokens=1).json
        assert "metrics" not in answer
        checks.is_error(Client(server.url).get("/llm/v1/models"), 404)
        assert Client(server.url).get("/openapi.json").json["servers"] == [{"url": "/"}]
