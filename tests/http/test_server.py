"""The HTTP side against real sockets: all of `checks`, and what needs a hand on the engine behind it."""

import asyncio
import json
import logging
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.http import checks
from tests.http.inprocess import MAX_MODEL_LEN, Server, serving, until
from tests.http.tiny_tokenizer import EOS
from tests.scheduling.simulator import continuation
from tpserve.engine_client.status import EngineStatus
from tpserve.frontend.openai import sse
from tpserve.types.packed import unpack
from tpserve.types.sampling import EngineSamplingParams, SamplingDefaults

MODEL = "tiny"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("model"), max_queued_requests=300) as server:
        yield server


@pytest.fixture
def client(server: Server) -> checks.Client:
    return checks.Client(server.url)


def test_info_routes(server: Server) -> None:
    checks.info_routes(server.url, MODEL)
    assert checks.Client(server.url).get("/v1/models/org/tiny").json["id"] == "org/tiny"


def test_wrong_requests(server: Server) -> None:
    checks.wrong_requests(server.url)


def test_too_long(server: Server) -> None:
    checks.too_long(server.url)


def test_completion_fields(server: Server) -> None:
    checks.completion_fields(server.url, MODEL)


def test_many_choices(server: Server) -> None:
    checks.many_choices(server.url)


def test_streaming_order(server: Server) -> None:
    checks.streaming_order(server.url)


def test_stop_strings(server: Server) -> None:
    checks.stop_strings(server.url)


def test_openai_library(server: Server) -> None:
    checks.openai_library(server.url, MODEL)


def test_tokens_and_text(server: Server) -> None:
    checks.tokens_and_text(server.url)


def test_disconnects_free_everything(server: Server) -> None:
    checks.disconnects(server.url)
    assert server.request_table.num_open == 0


def test_answers_are_the_engines_tokens(server: Server, client: checks.Client) -> None:
    """Ids in and out exactly: the ledger says what must come."""
    ids = client.completion(prompt=[5, 6, 7], max_tokens=30, return_token_ids=True, n=2).json["choices"]
    for choice, add in zip(ids, server.engine.requests[-2:], strict=True):
        assert list(unpack(add.request.prompt)) == [5, 6, 7] and add.request.seed == 3
        expected = continuation(add.request, 30, server.tokenizer.vocab_size)
        if EOS in expected:
            expected = expected[: expected.index(EOS) + 1]
        assert choice["token_ids"] == expected


def test_sampling_fields_reach_the_engine(server: Server, client: checks.Client) -> None:
    def params(**fields: Any) -> EngineSamplingParams:
        for reply in (client.completion(max_tokens=4, **fields), client.chat(max_tokens=4, **fields)):
            assert reply.status == 200 and "warnings" not in reply.json, reply.body
        completion, chat = (add.request.params for add in server.engine.requests[-2:])
        assert completion == chat
        return completion

    numbers = {"top_p": 0.5, "min_p": 0.1, "presence_penalty": -2, "frequency_penalty": 2, "repetition_penalty": 1.5}
    asked = params(**numbers, top_k=7, min_tokens=4, logit_bias={"9": -100, "5": 1.5}, allowed_token_ids=[9, 8, 9])
    assert asked == EngineSamplingParams(
        max_tokens=4, top_k=7, min_tokens=4, logit_bias=((5, 1.5), (9, -100.0)), allowed_token_ids=(8, 9), **numbers
    )
    neutral: checks.Json = {"top_p": 1, "top_k": -1, "min_p": 0, "presence_penalty": 0, "repetition_penalty": 1}
    neutral |= {"logit_bias": {}, "bad_words": []}
    assert params(**neutral) == params(top_k=10**30) == EngineSamplingParams(max_tokens=4)
    words = params(bad_words=["cat", " sat on"]).bad_words
    texts = {server.tokenizer.decode(word) for word in words}
    assert texts == {"cat", " cat", "sat on", " sat on"} and len(words) == 4
    assert params(prompt_logprobs=2, priority=-7, cache_salt="mine") == EngineSamplingParams(max_tokens=4, prompt_logprobs=2)
    assert {(add.request.priority, add.request.cache_salt) for add in server.engine.requests[-2:]} == {(-7, "mine")}
    no_words = {"allowed_token_ids": [words[0][0]], "bad_words": [server.tokenizer.decode(words[0][:1])]}
    for wrong, param in ((no_words, "bad_words"), ({"min_tokens": 5}, "min_tokens"), ({"min_tokens": 5, "n": 2}, "min_tokens")):
        checks.is_error(client.completion(max_tokens=4, **wrong), 400, param=param, code="invalid_value")


def test_what_a_request_does_not_say_is_the_models(tmp_path: Path) -> None:
    """Null is not said, and whatever is said wins; how much to generate has a default in chat only, cut to what fits."""
    neutral = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
    given = {"temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "repetition_penalty": 1.25}
    with serving(tmp_path, sampling_defaults=SamplingDefaults(max_tokens=5, **given)) as server:
        client = checks.Client(server.url)

        def asked(**fields: Any) -> list[EngineSamplingParams]:
            for reply in (client.completion(**fields), client.chat(**fields)):
                assert reply.status == 200 and "warnings" not in reply.json, reply.body
            return [add.request.params for add in server.engine.requests[-2:]]

        for fields in ({}, dict.fromkeys([*given, "max_tokens"])):
            assert asked(**fields) == [EngineSamplingParams(max_tokens=size, **given) for size in (16, 5)]
        for name, value in neutral.items():
            assert asked(**{name: value}) == [EngineSamplingParams(max_tokens=size, **given | {name: value}) for size in (16, 5)]
        assert asked(**neutral, max_tokens=9) == [EngineSamplingParams(max_tokens=9)] * 2
        assert client.chat(max_completion_tokens=8, max_tokens=3).status == 200
        assert server.engine.requests[-1].request.params.max_tokens == 8
        prompt = [{"role": "user", "content": "<s>" * (MAX_MODEL_LEN - 7)}]
        reply = client.chat(messages=prompt, ignore_eos=True)
        assert (reply.status, reply.json["usage"]["total_tokens"]) == (200, MAX_MODEL_LEN), reply.body


def test_no_stop_string_before_min_tokens(client: checks.Client) -> None:
    fields: checks.Json = {"max_tokens": 24, "ignore_eos": True, "return_token_ids": True}
    whole = client.completion(**fields).json["choices"][0]
    early = next(char for char in whole["text"] if whole["text"].count(char) == 1)
    at_once = client.completion(**fields, stop=early).json["choices"][0]
    number = len(at_once["token_ids"])
    assert at_once["stop_reason"] == early and number < 24
    assert client.completion(**fields, stop=early, min_tokens=number).json["choices"][0]["text"] == whole["text"]
    assert client.completion(**fields, stop=early, min_tokens=number - 1).json["choices"][0]["text"] == at_once["text"]


def test_eos_ends_without_text(server: Server, client: checks.Client) -> None:
    for seed in range(400):
        choice = client.completion(seed=seed, max_tokens=40, return_token_ids=True, skip_special_tokens=False).json["choices"][0]
        if choice["finish_reason"] == "stop":
            break
    assert choice["token_ids"][-1] == EOS and choice["stop_reason"] is None and not choice["text"].endswith("</s>")


def test_seeds_of_the_client_and_of_the_server(server: Server, client: checks.Client) -> None:
    client.completion(seed=-1, max_tokens=1)
    assert server.engine.requests[-1].request.seed == 2**64 - 1
    client.completion(seed=None, max_tokens=1, n=2)
    first, second = (add.request.seed for add in server.engine.requests[-2:])
    assert first != second


def test_chat_sees_the_template(server: Server, client: checks.Client) -> None:
    def prompt(**fields: Any) -> str:
        answer = client.chat(max_tokens=1, return_token_ids=True, **fields)
        assert answer.status == 200, answer.body
        return server.tokenizer.decode(answer.json["prompt_token_ids"], skip_special_tokens=False)

    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]
    assert prompt(messages=[{"role": "user", "content": parts, "name": None}]) == "<s><|user|>a b</s><|assistant|>"
    assert prompt(messages=[{"role": "user", "content": []}]) == "<s><|user|></s><|assistant|>"
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "so"}]
    assert prompt(messages=turns, add_generation_prompt=False, continue_final_message=True) == "<s><|user|>a</s><|assistant|>so"
    checks.is_error(client.chat(messages=[{"role": "x", "content": "a"}]), 400, param="messages", says="unknown role x")
    checks.is_error(client.chat(chat_template_kwargs={"messages": []}), 400, param="chat_template_kwargs")


def test_leaving_frees_the_blocks_within_a_step(tmp_path: Path) -> None:
    with serving(tmp_path, step_s=0.02) as server:
        stream = checks.open_stream(server.url, prompt="The", max_tokens=200, ignore_eos=True)
        next(stream)
        assert checks.Client(server.url).gauge("num_requests_running") == 1
        stream.close()
        until(lambda: server.engine.scheduler.stats().blocks_used == 0)
        assert server.request_table.num_open == 0 and server.engine.scheduler.stats().generation_tokens < 100


def test_keep_alive_while_nothing_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "KEEP_ALIVE_S", 0.05)
    with serving(tmp_path) as server:
        server.engine.paused = True
        stream = checks.open_stream(server.url, prompt="The", max_tokens=2)
        assert [next(stream) for _ in range(4)] == [b": keep-alive\n", b"\n"] * 2
        server.engine.paused = False
        rest = [line for line in stream if not line.startswith(b":")]
        assert rest[-2:] == [b"data: [DONE]\n", b"\n"]
        with checks.openai_client(server.url) as client:
            server.engine.paused = True
            events = client.completions.create(model=MODEL, prompt="The", max_tokens=2, stream=True)
            server.loop.call_later(0.2, setattr, server.engine, "paused", False)
            assert [event.choices[0].finish_reason for event in events][-1] == "length"


def test_full_queue_is_429(tmp_path: Path) -> None:
    with serving(tmp_path, max_num_seqs=2, max_queued_requests=2) as server:
        client, server.engine.paused = checks.Client(server.url), True
        with ThreadPoolExecutor(2) as pool:
            waiting = [pool.submit(client.completion, max_tokens=2, n=2) for _ in range(2)]
            until(lambda: server.request_table.num_open == 4)
            reply = client.completion()
            checks.is_error(reply, 429, code="queue_full", says="4 of 4")
            assert reply.headers["retry-after"] == "1"
            checks.is_error(client.completion(n=5), 400, param="n", says="5 sequences")
            checks.is_error(client.completion(n=2, best_of=5), 400, param="best_of", says="5 sequences")
            server.engine.paused = False
            assert [future.result().status for future in waiting] == [200, 200]
        assert client.completion(max_tokens=1).status == 200


def test_tokens_that_only_the_tokenizer_knows(tmp_path: Path) -> None:
    """Their ids would be beyond the embedding, and on a GPU beyond help."""
    with serving(tmp_path) as server:
        client = checks.Client(server.url)
        server.states.append(EngineStatus("running", max_model_len=MAX_MODEL_LEN, vocab_size=200))
        assert max(server.tokenizer.encode("The cat")) >= 200
        checks.is_error(client.completion(prompt="The cat"), 400, param="prompt", code="invalid_value", says="vocabulary of 200")
        checks.is_error(client.chat(), 400, param="messages", code="invalid_value")
        assert client.completion(prompt=[5, 199]).status == 200


def test_states_before_and_after_running(tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        client = checks.Client(server.url)
        server.states.append(EngineStatus("starting", "loading weights", 40))
        for reply in (client.get("/health"), client.get("/readyz"), client.completion(), client.chat()):
            checks.is_error(reply, 503, code="starting", says="loading weights (40%)")
            assert reply.headers["retry-after"]
        health = client.get("/readyz").json
        assert (health["state"], health["phase"], health["percent"]) == ("starting", "loading weights", 40)
        assert client.get("/livez").status == 200 and client.get("/v1/models").json["data"][0]["max_model_len"] is None
        server.states.append(EngineStatus("draining"))
        checks.is_error(client.completion(), 503, code="draining")
        server.states.append(EngineStatus("stopped", reason="rank 1 failed"))
        checks.is_error(client.get("/health"), 503, code="stopped", says="rank 1 failed")


def test_engine_failure_reaches_every_client_once(tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        server.engine.paused = True
        client = checks.Client(server.url)
        with ThreadPoolExecutor(2) as pool:
            whole, streamed = pool.submit(client.completion), pool.submit(client.chat, stream=True)
            until(lambda: server.request_table.num_open == 2)
            server.loop.call_soon_threadsafe(server.request_table.fail_all, "rank 1 failed: out of memory", 503)
        checks.is_error(whole.result(), 503, code="engine_unavailable", says="rank 1 failed")
        role, error = streamed.result().events
        assert role["choices"] and error["error"]["message"] == "rank 1 failed: out of memory"


def test_api_key(tmp_path: Path) -> None:
    with serving(tmp_path, api_key="s3cret") as server:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "s3cret"}, {"Authorization": "Bearer é"}):
            client = checks.Client(server.url, {k: v.encode().decode("latin-1") for k, v in headers.items()})
            for reply in (client.completion(), client.get("/v1/models"), client.get("/nothing")):
                checks.is_error(reply, 401, code="invalid_api_key", says="Bearer")
            assert [client.get(path).status for path in ("/health", "/readyz", "/livez", "/ping")] == [200] * 4
        assert checks.Client(server.url, {"Authorization": "Bearer s3cret"}).completion(max_tokens=1).status == 200
        checks.openai_library(server.url, MODEL, "s3cret")
        with pytest.raises(openai.AuthenticationError), checks.openai_client(server.url, "wrong") as library:
            library.models.list()


def asked(server: Server, key: str | None) -> checks.Reply:
    return checks.Client(server.url, {} if key is None else {"Authorization": f"Bearer {key}"}).get("/server_info")


def test_what_is_for_operators_is_closed_to_others(tmp_path: Path) -> None:
    with serving(tmp_path, exposed=True, api_key="s3cret") as server:
        for key in (None, "s3cret"):
            checks.is_error(asked(server, key), 403, code="admin_key_not_set", says="--admin-api-key")
    with serving(tmp_path, exposed=True, api_key="s3cret", admin_api_key="root") as server:
        for key in (None, "s3cret", "rootx"):
            checks.is_error(asked(server, key), 401, code="invalid_api_key", says="admin key")
        assert asked(server, "root").json == {"state": "running", "state_dir": None}
        checks.is_error(
            checks.Client(server.url, {"Authorization": "Bearer root"}).get("/v1/models"), 401, code="invalid_api_key"
        )


def test_what_is_for_operators_is_open_on_loopback_unless_it_has_a_key(tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        assert asked(server, None).status == 200
    with serving(tmp_path, api_key="s3cret") as server:
        assert [asked(server, key).status for key in (None, "s3cret")] == [401, 200]
    with serving(tmp_path, admin_api_key="root") as server:
        assert [asked(server, key).status for key in (None, "root")] == [401, 200]


def test_any_key_is_fine_without_one(client: checks.Client) -> None:
    client.headers["Authorization"] = "Bearer anything"
    assert client.completion(max_tokens=1).status == 200


@pytest.mark.parametrize("given", ["abc-123", "", "x" * 500, "two words", "é"])
def test_request_ids(client: checks.Client, given: str) -> None:
    reply = client.send("GET", "/livez", headers={"X-Request-Id": given})
    assert (reply.headers["x-request-id"] == given) == (given == "abc-123") and len(reply.headers["x-request-id"]) >= 7


def test_our_own_bug_is_a_500_without_details(
    server: Server, client: checks.Client, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("inner detail")

    monkeypatch.setattr(server.request_table, "open", broken)
    reply = client.completion()
    checks.is_error(reply, 500, code="internal_error", says=reply.headers["x-request-id"])
    assert b"inner detail" not in reply.body and "inner detail" in caplog.text


def test_prompts_are_never_logged(client: checks.Client, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        client.completion(prompt="zanzibar", max_tokens=2, colour="zanzibar")
        client.completion(prompt="zanzibar", max_tokens=-2)
        client.chat(messages=[{"role": "zanzibar", "content": "zanzibar"}])
        client.send("POST", "/v1/completions", b'{"prompt": "zanzibar" ')
    assert "zanzibar" not in caplog.text


def test_a_long_prompt_leaves_the_loop_free(server: Server, client: checks.Client) -> None:
    """Tokenizing happens in a thread: while a text is at work, others are answered."""
    text = "ab" * (MAX_MODEL_LEN * server.tokenizer.longest_token_chars // 2 - 1)

    async def both() -> float:
        big = asyncio.create_task(asyncio.to_thread(client.completion, prompt=text))
        started, worst = time.monotonic(), 0.0
        while not big.done() and time.monotonic() - started < 10:
            begin = time.monotonic()
            await asyncio.to_thread(client.get, "/livez")
            worst = max(worst, time.monotonic() - begin)
        checks.is_error(big.result(), 400, code="context_length_exceeded")
        return worst

    assert asyncio.run(both()) < 1


def test_a_stream_over_http_1_0_has_no_chunks(server: Server, client: checks.Client) -> None:
    """Its events end with the connection, and are those of HTTP/1.1."""
    host, port = server.url.removeprefix("http://").split(":")
    body = json.dumps({"prompt": "the cat", "max_tokens": 12, "stream": True, "seed": 5}).encode()
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.0\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        head, _, events = b"".join(iter(lambda: connection.recv(4096), b"")).partition(b"\r\n\r\n")
    assert b" 200 " in head and b"chunked" not in head.lower()
    *chunks, done, rest = events.split(b"\n\n")
    assert (done, rest) == (b"data: [DONE]", b"")
    text = "".join(json.loads(chunk.removeprefix(b"data: "))["choices"][0]["text"] for chunk in chunks)
    whole = client.completion(prompt="the cat", max_tokens=12, seed=5).json
    assert text == whole["choices"][0]["text"]


def test_not_http_at_all(server: Server, client: checks.Client, caplog: pytest.LogCaptureFixture) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    for junk in (
        b"\x16\x03\x01 hello\r\n\r\n",
        b"GET / HTTP/9\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nContent-Length: x\r\n\r\n",
    ):
        with socket.create_connection((host, int(port)), timeout=5) as connection:
            connection.sendall(junk)
            assert connection.recv(100).startswith((b"HTTP/1.1 400", b"HTTP/1.0 400"))
    truncated = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        connection.sendall(truncated)
        assert b" 400 " in connection.recv(100)
    assert client.get("/livez").status == 200 and "Traceback" not in caplog.text
