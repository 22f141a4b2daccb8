"""Scores of prompts, `best_of` and the prefix cache over sockets: all of `score_checks`, and what needs a hand on the engine."""

import http.client
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.http import checks, score_checks, tiny_tokenizer
from tests.http.inprocess import MAX_MODEL_LEN, Server, serving, until
from tpserve.frontend.openai import response_builder, sequences
from tpserve.types.messages import PromptLogprobsChunk


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("model")) as server:
        yield server


@pytest.fixture
def client(server: Server) -> checks.Client:
    return checks.Client(server.url)


def test_wrong_requests(server: Server) -> None:
    score_checks.wrong_requests(server.url)


def test_best_of(server: Server) -> None:
    score_checks.best_of(server.url)


def test_scored_prompts(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(response_builder, "TOKENS_AT_ONCE", 4)
    score_checks.scored_prompts(server.url, model_is_real=False)


def test_cached_tokens(server: Server) -> None:
    score_checks.cached_tokens(server.url)


def test_only_the_first_choice_is_scored(server: Server, client: checks.Client) -> None:
    client.completion(prompt=["The", "One"], n=2, best_of=3, echo=True, logprobs=1, prompt_logprobs=4, max_tokens=2)
    requests = [add.request for add in server.engine.requests[-6:]]
    assert [(r.choice, r.params.prompt_logprobs, r.params.logprobs) for r in requests] == [
        (0, 4, 1),
        (1, None, 1),
        (2, None, 1),
    ] * 2


def test_requests_that_fit_a_frame(client: checks.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sequences, "MAX_SENT_TOKENS", 20)
    assert client.completion(prompt=[[5] * 10] * 2, max_tokens=1).status == 200
    for fields, param in (({"n": 3}, "n"), ({"best_of": 3}, "best_of"), ({"prompt": [[5] * 7] * 3}, "prompt")):
        checks.is_error(client.completion(**{"prompt": [5] * 10} | fields), 400, param=param, says="20 at once")


def test_answers_of_a_readable_size(client: checks.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sequences, "MAX_SHOWN_SCORES", 60)
    prompt = {"prompt": [5] * 10, "max_tokens": 1}
    for fields, status in (({"prompt_logprobs": 5}, 200), ({"prompt_logprobs": 6}, 400), ({"prompt_logprobs": 2, "n": 3}, 400)):
        reply = client.completion(**prompt, **fields)
        assert reply.status == status
        if status == 400:
            checks.is_error(reply, 400, param="prompt_logprobs", says="60 at most")
    assert client.completion(**prompt, n=3, echo=True, logprobs=1).status == 200
    checks.is_error(client.completion(**prompt, n=3, echo=True, logprobs=2), 400, param="logprobs")
    checks.is_error(client.chat(prompt_logprobs=20), 400, param="prompt_logprobs")


def test_a_whole_context_may_be_scored(client: checks.Client) -> None:
    fields: checks.Json = {"prompt": [5] * MAX_MODEL_LEN, "echo": True, "logprobs": 0}
    assert len(client.completion(**fields, max_tokens=0).json["choices"][0]["logprobs"]["tokens"]) == MAX_MODEL_LEN
    checks.is_error(client.completion(**fields, max_tokens=1), 400, param="prompt", code="context_length_exceeded")
    fields["prompt"].append(5)
    checks.is_error(client.completion(**fields, max_tokens=0), 400, param="prompt", code="context_length_exceeded")


def test_leaving_while_the_prompt_is_scored(tmp_path: Path) -> None:
    """Two plans of 64 tokens score a part; the client goes, and nothing of its request stays."""
    with serving(tmp_path) as server:

        async def step() -> list[bool]:
            server.engine.step(time.monotonic())
            server.request_table.receive(outputs := server.engine.scheduler.take_outputs())
            return [isinstance(message, PromptLogprobsChunk) for message in outputs]

        fields: checks.Json = {"prompt": [5] * 200, "echo": True, "logprobs": 2, "max_tokens": 2, "n": 2}
        server.engine.paused = True
        connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=5)
        connection.request("POST", "/v1/completions", json.dumps(fields | {"stream": True}))
        answer = connection.getresponse()
        assert server.call(step()) == [True, True] and server.request_table.num_open == 2
        answer.close()
        connection.close()
        until(lambda: server.request_table.num_open == 0)
        server.engine.paused = False
        until(lambda: server.engine.scheduler.stats().blocks_used == 0)
        whole = checks.Client(server.url).completion(**fields).json["choices"]
        assert [len(choice["logprobs"]["tokens"]) for choice in whole] == [202, 202]


@pytest.mark.parametrize("kind", [tiny_tokenizer.byte_level, tiny_tokenizer.metaspace])
def test_text_is_what_the_tokenizer_decodes(kind: Callable[[], tiny_tokenizer.Tokenizer], tmp_path: Path) -> None:
    """Random tokens after prompts that end inside characters: echoed or not, whole or streamed, with logprobs or without."""
    with serving(tmp_path, kind=kind) as server:
        client, tokenizer = checks.Client(server.url), server.tokenizer
        alone = {tokenizer.token_bytes(id): id for id in reversed(range(tokenizer.vocab_size))}
        begun = [[alone[bytes([byte])] for byte in data] for data in (b"a\xf0\x9f", b"\xc3\xa9\xe6", b"\xff\xe6\xbc")]
        for seed, logprobs in ((1, None), (2, 2), (3, None), (4, 0)):
            fields: dict[str, Any] = {"prompt": begun, "max_tokens": 40, "seed": seed, "ignore_eos": True, "logprobs": logprobs}
            fields |= {"n": 2, "return_token_ids": True}
            plain, echoed = (client.completion(**fields, echo=echo).json["choices"] for echo in (False, True))
            for index, (own, choice) in enumerate(zip(plain, echoed, strict=True)):
                prompt = begun[index // 2]
                assert choice["text"] == tokenizer.decode(prompt + choice["token_ids"])
                assert choice["token_ids"] == own["token_ids"] and choice["text"].endswith(own["text"])
                if logprobs is not None:
                    lists = choice["logprobs"]
                    assert {len(lists[name]) for name in lists} == {len(prompt) + 40}
                    offsets = lists["text_offset"]
                    assert offsets == sorted(offsets) and offsets[-1] <= len(choice["text"])
                    assert all(len(top) >= logprobs for top in lists["top_logprobs"][1:])
            for echo, expected in ((False, plain), (True, echoed)):
                streamed_as_whole(client, fields | {"echo": echo}, expected)


def streamed_as_whole(client: checks.Client, fields: dict[str, Any], expected: list[dict[str, Any]]) -> None:
    chunks = [chunk["choices"][0] for chunk in client.completion(**fields, stream=True).events]
    for index, choice in enumerate(expected):
        own = [chunk for chunk in chunks if chunk["index"] == index]
        assert "".join(chunk["text"] for chunk in own) == choice["text"]
        assert [token for chunk in own for token in chunk["token_ids"]] == choice["token_ids"]
        if choice["logprobs"] is not None:
            for name, values in choice["logprobs"].items():
                assert [value for chunk in own if chunk["logprobs"] for value in chunk["logprobs"][name]] == values
