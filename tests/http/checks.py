"""What any tpserve server must do over HTTP, whatever runs behind it. Each check takes the base URL of a live server and asserts.

`Client` speaks plain HTTP, so that requests can be wrong; `openai_client` is the real one. Nothing here knows the engine.
"""

import asyncio
import http.client
import json
import random
import time
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import openai

Json = dict[str, Any]
MESSAGES = [{"role": "user", "content": "Where does the red fox live?"}]


@dataclass
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Json:
        value = json.loads(self.body)
        assert isinstance(value, dict)
        return value

    @property
    def events(self) -> list[Json]:
        """The chunks of a stream, which must end with [DONE] and hold nothing but data and comments."""
        parts = self.body.decode().split("\n\n")
        assert parts.pop() == "" and parts.pop() == "data: [DONE]", "a stream ends with [DONE]"
        assert all(part.startswith(("data: {", ":")) for part in parts)
        return [json.loads(part.removeprefix("data: ")) for part in parts if part.startswith("data:")]


@dataclass
class Client:
    """Plain HTTP/1.1, one connection a request."""

    base_url: str
    headers: dict[str, str] = field(default_factory=dict)

    def send(self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None) -> Reply:
        connection = http.client.HTTPConnection(urlsplit(self.base_url).netloc, timeout=60)
        try:
            connection.request(method, path, body, self.headers | (headers or {}))
            answer = connection.getresponse()
            return Reply(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())
        finally:
            connection.close()

    def get(self, path: str) -> Reply:
        return self.send("GET", path)

    def post(self, path: str, **body: Any) -> Reply:
        return self.send("POST", path, json.dumps(body).encode())

    def completion(self, **body: Any) -> Reply:
        return self.post("/v1/completions", **{"prompt": "The red fox", "seed": 3} | body)

    def chat(self, **body: Any) -> Reply:
        return self.post("/v1/chat/completions", **{"messages": MESSAGES, "seed": 3} | body)

    def gauge(self, name: str) -> float:
        lines = self.get("/metrics").body.decode().splitlines()
        (value,) = [line.split()[-1] for line in lines if line.startswith(f"tpserve:{name}{{")]
        return float(value)


def openai_client(base_url: str, api_key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{base_url}/v1", api_key=api_key, max_retries=0, timeout=60)


def is_error(reply: Reply, status: int, *, param: str | None = None, code: str | None = None, says: str = "") -> None:
    """The answer is the API's error body, with these facts in it."""
    assert reply.status == status, (reply.status, reply.body[:500])
    error = reply.json["error"]
    assert set(error) == {"message", "type", "param", "code"} and all(isinstance(error[k], str) for k in ("message", "type"))
    assert reply.headers["content-type"].startswith("application/json") and reply.headers["x-request-id"]
    assert "Traceback" not in error["message"] and len(error["message"]) < 600
    assert param is None or error["param"] == param, error
    assert code is None or error["code"] == code, error
    assert says in error["message"], error


def info_routes(base_url: str, model: str) -> None:
    client = Client(base_url)
    for path in ("/health", "/readyz"):
        reply = client.get(path)
        assert reply.status == 200 and reply.json["state"] == "running"
    assert client.get("/livez").status == client.get("/ping").status == 200
    assert client.get("/version").json["version"]
    card = client.get(f"/v1/models/{model}").json
    listed = client.get("/v1/models").json
    assert listed["object"] == "list" and card in listed["data"]
    assert (card["id"], card["object"], card["max_model_len"] > 0) == (model, "model", True)
    is_error(client.get("/v1/models/none"), 404, param="model", code="model_not_found", says="none")
    metrics = client.get("/metrics")
    assert metrics.headers["content-type"].startswith("text/plain") and b"tpserve:num_requests_running{" in metrics.body


def wrong_requests(base_url: str) -> None:
    """Every kind of bad input: a 4xx that names the thing, and the server goes on."""
    client = Client(base_url)
    raw = [b"", b"{", b"[1]", b'"a"', b"{'a': 1}", b"\xff\xfe", b'{"prompt": NaN}', b"[" * 100_000, b"null"]
    for path in ("/v1/completions", "/v1/chat/completions"):
        for body in raw:
            is_error(client.send("POST", path, body), 400, says="body")
    for wrong, param in wrong_fields():
        is_error(client.completion(**wrong), 400, param=param, says=param.split("[")[0])
        if not {"prompt", "suffix"} & wrong.keys():
            is_error(client.chat(**wrong), 400, param=param)
    for messages, param in wrong_messages():
        is_error(client.chat(messages=messages), 400, param=param)
    is_error(client.chat(top_logprobs=2), 400, param="top_logprobs")
    is_error(client.chat(echo=True), 400, param="echo", code="unsupported_parameter")
    is_error(client.chat(tools=[{"type": "function"}]), 400, param="tools[0].function.name")
    for reply in (client.completion(model="none"), client.chat(model="none")):
        is_error(reply, 404, param="model", code="model_not_found", says="none")
    is_error(client.get("/v1/nothing"), 404, says="/v1/nothing")
    reply = client.get("/v1/completions")
    is_error(reply, 405, says="POST")
    assert reply.headers["allow"] == "POST"
    zipped = client.send("POST", "/v1/completions", b"\x1f\x8b", {"Content-Encoding": "gzip"})
    is_error(zipped, 415, code="unsupported_encoding", says="gzip")
    form = client.send("POST", "/v1/completions", b'{"prompt":"a"}', {"Content-Type": "application/x-www-form-urlencoded"})
    is_error(form, 415, code="unsupported_media_type", says="Content-Type: application/json")
    typed = {"Content-Type": "application/JSON; charset=utf-8"}
    assert client.send("POST", "/v1/completions", b'{"prompt":"a","max_tokens":1.0}', typed).status == 200
    assert client.completion(max_tokens=1).status == 200


def wrong_fields() -> list[tuple[Json, str]]:
    return [
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": "many"}, "max_tokens"),
        ({"temperature": 3}, "temperature"),
        ({"n": 0}, "n"),
        ({"n": 10**6}, "n"),
        ({"seed": 2**70}, "seed"),
        ({"stop": [""]}, "stop[0]"),
        ({"stop_token_ids": [10**7]}, "stop_token_ids"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 1.1}, "min_p"),
        ({"frequency_penalty": 2.5}, "frequency_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"logit_bias": {"10000000": 1}}, "logit_bias"),
        ({"logit_bias": {"fox": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 101}}, "logit_bias[...]"),
        ({"allowed_token_ids": []}, "allowed_token_ids"),
        ({"allowed_token_ids": [10**7]}, "allowed_token_ids"),
        ({"bad_words": ["fox", " "]}, "bad_words[1]"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"structured_outputs": {"regex": "a", "json": {}}}, "structured_outputs"),
        ({"structured_outputs": {"regexp": "a"}}, "structured_outputs"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
        ({"guided_json": "{"}, "guided_json"),
        ({"structured_outputs": {"regex": "a", "whitespace_pattern": " "}}, "structured_outputs"),
        ({"structured_outputs": {"json": {}, "whitespace_pattern": 5}}, "structured_outputs.whitespace_pattern"),
        ({"suffix": "x", "truncate_prompt_tokens": 4}, "truncate_prompt_tokens"),
        ({"guided_regex": "a", "response_format": {"type": "json_object"}}, "guided_regex"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": [1, 2.5]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [10**7]}, "prompt"),
        ({"prompt": {}}, "prompt"),
        ({"suffix": "x"}, "suffix"),
        ({"echo": 1}, "echo"),
    ]


def wrong_messages() -> list[tuple[Any, str]]:
    image = {"type": "image_url", "image_url": {"url": "http://127.0.0.1/x.png"}}
    return [
        ([], "messages"),
        ("hi", "messages"),
        (["hi"], "messages[0]"),
        ([{"content": "hi"}], "messages[0].role"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"role": "user", "content": 5}], "messages[0].content"),
        ([{"role": "user", "content": [image]}], "messages[0].content[0]"),
        ([{"role": "function", "content": "x"}], "messages[0]"),
        ([{"role": "tool"}], "messages[0].content"),
        ([{"role": "assistant", "tool_calls": [{}]}], "messages[0].tool_calls[0]"),
        ([{"role": "critic", "content": "x"}], "messages"),
    ]


def too_long(base_url: str) -> None:
    """Over the context: refused with the model's length, however long, quickly, and without stopping others."""
    client = Client(base_url)
    longest = client.get("/v1/models").json["data"][0]["max_model_len"]
    says = f"This model's maximum context length is {longest} tokens"
    facts: dict[str, Any] = {"code": "context_length_exceeded", "says": says}
    is_error(client.completion(prompt=[5] * longest), 400, param="prompt", **facts)
    is_error(client.completion(prompt=[5], max_tokens=longest), 400, **facts)
    is_error(client.chat(max_tokens=longest), 400, **facts)
    started = time.monotonic()
    big = "the cat sat " * (2_000_000 // 12)
    is_error(client.completion(prompt=big), 400, param="prompt", **facts)
    is_error(client.chat(messages=[{"role": "user", "content": big}]), 400, param="messages", **facts)
    assert time.monotonic() - started < 20
    fitted = client.completion(prompt=[5] * (2 * longest), truncate_prompt_tokens=-1, max_tokens=1).json
    assert fitted["usage"]["prompt_tokens"] == longest - 1
    reply = client.completion(prompt=[5] * (longest - 3), ignore_eos=True)
    assert reply.json["usage"]["completion_tokens"] == 3, "the default of 16 tokens is cut to what is left"
    is_error(client.send("POST", "/v1/completions", b" " * (9 << 20)), 413, code="body_too_large", says="8 MiB")
    assert client.completion(max_tokens=1).status == 200


def completion_fields(base_url: str, model: str) -> None:
    client = Client(base_url)
    reply = client.completion(max_tokens=6, ignore_eos=True, return_token_ids=True, logprobs=2, user="me", colour="blue")
    answer = reply.json
    (choice,) = answer["choices"]
    assert answer["id"] == f"cmpl-{reply.headers['x-request-id']}" and answer["object"] == "text_completion"
    assert answer["model"] == model and answer["warnings"] == ["unknown field 'colour' ignored"]
    assert (choice["index"], choice["finish_reason"], choice["stop_reason"]) == (0, "length", None)
    assert len(choice["token_ids"]) == 6 and choice["prompt_token_ids"]
    logprobs = choice["logprobs"]
    assert {len(logprobs[k]) for k in ("tokens", "token_logprobs", "top_logprobs", "text_offset")} == {6}
    assert all(value <= 0 for value in logprobs["token_logprobs"]) and all(len(top) >= 1 for top in logprobs["top_logprobs"])
    counts = answer["usage"]
    assert counts["completion_tokens"] == 6 and counts["prompt_tokens"] == len(choice["prompt_token_ids"])
    assert counts["total_tokens"] == counts["prompt_tokens"] + 6
    by_ids = client.completion(prompt=choice["prompt_token_ids"], max_tokens=6, ignore_eos=True).json["choices"][0]
    assert by_ids["text"] == choice["text"], "token ids and text are the same prompt"
    echoed = client.completion(max_tokens=6, ignore_eos=True, echo=True).json["choices"][0]
    assert echoed["text"] == "The red fox" + choice["text"]
    ids = choice["prompt_token_ids"]
    for side, kept in (("left", ids[-2:]), ("right", ids[:2])):
        for prompt in ("The red fox", ids):
            cut = client.completion(
                prompt=prompt, truncate_prompt_tokens=2, truncation_side=side, max_tokens=1, return_token_ids=True
            )
            assert cut.json["choices"][0]["prompt_token_ids"] == kept
    spelled = client.completion(max_tokens=2, logprobs=1, return_tokens_as_token_ids=True, return_token_ids=True).json["choices"][
        0
    ]
    assert spelled["logprobs"]["tokens"] == [f"token_id:{token}" for token in spelled["token_ids"]]
    assert all(name.startswith("token_id:") for top in spelled["logprobs"]["top_logprobs"] for name in top)
    said = client.chat(max_tokens=2, logprobs=True, return_tokens_as_token_ids=True, truncate_prompt_tokens=3).json
    assert said["usage"]["prompt_tokens"] == 3
    assert all(entry["token"].startswith("token_id:") for entry in said["choices"][0]["logprobs"]["content"])
    named = client.completion(max_tokens=1, request_id="my-request")
    assert named.headers["x-request-id"] == "my-request" and named.json["id"] == "cmpl-my-request"


def many_choices(base_url: str) -> None:
    """n choices of several prompts, in order; each is what the same seed gives alone."""
    client = Client(base_url)
    prompts: list[Any] = ["The red fox", "The old mill"]
    answer = client.completion(prompt=prompts, n=2, max_tokens=5, ignore_eos=True, temperature=1).json
    texts = [choice["text"] for choice in answer["choices"]]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3] and answer["usage"]["completion_tokens"] == 20
    for index, prompt in enumerate(prompts):
        alone = client.completion(prompt=prompt, n=2, max_tokens=5, ignore_eos=True, temperature=1).json
        assert [choice["text"] for choice in alone["choices"]] == texts[2 * index : 2 * index + 2]
    ids = [[5, 6, 7], [8]]
    assert len(client.completion(prompt=ids, max_tokens=2).json["choices"]) == 2


def streaming_order(base_url: str) -> None:
    """Role chunks, deltas of which none is empty, one finish a choice, usage, [DONE]; and the text of the whole answer."""
    client = Client(base_url)
    fields: Json = {"n": 2, "max_tokens": 12, "ignore_eos": True, "temperature": 1, "return_token_ids": True}
    for send, logprobs in ((client.completion, 1), (client.chat, True)):
        whole = send(**fields, logprobs=logprobs).json
        options = {"include_usage": True}
        reply = send(**fields, logprobs=logprobs, stream=True, stream_options=options)
        assert reply.headers["content-type"].startswith("text/event-stream")
        *chunks, last = reply.events
        cached = {"prompt_tokens_details": {"cached_tokens": last["usage"]["prompt_tokens_details"]["cached_tokens"]}}
        assert last["choices"] == [] and last["usage"] == whole["usage"] | cached  # the first to ask fills the cache
        assert all(chunk["usage"] is None and len(chunk["choices"]) == 1 for chunk in chunks)
        assert len({(chunk["id"], chunk["object"], chunk["created"]) for chunk in [*chunks, last]}) == 1
        for index in (0, 1):
            own = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
            ids, text, entries = joined(own, chat=send == client.chat)
            expected = whole["choices"][index]
            assert ids == expected["token_ids"] and entries == 12
            assert text == (expected["message"]["content"] if send == client.chat else expected["text"])
    plain = client.completion(stream=True, max_tokens=3).events
    assert all("usage" not in chunk and chunk["choices"] for chunk in plain)
    only = {"continuous_usage_stats": True}
    assert all("usage" not in chunk for chunk in client.completion(stream=True, max_tokens=3, stream_options=only).events)
    for send in (client.completion, client.chat):
        counted = send(stream=True, max_tokens=3, ignore_eos=True, stream_options={"include_usage": True, **only}).events
        counts = [chunk["usage"]["completion_tokens"] for chunk in counted]
        assert counts == sorted(counts) and counts[-2:] == [3, 3] and len(set(counts[:-1])) == len(counts) - 1


def joined(choices: list[Json], chat: bool) -> tuple[list[int], str, int]:
    """Token ids, text and number of log probability entries of a choice's chunks, whose order is checked."""
    if chat:
        first = choices.pop(0)
        assert first["delta"] == {"role": "assistant", "content": ""} and first["finish_reason"] is None
    *deltas, end = choices
    assert end["finish_reason"] == "length" and all(choice["finish_reason"] is None for choice in deltas)
    texts = [choice["delta"].get("content", "") if chat else choice["text"] for choice in choices]
    assert all(texts[:-1]), "no delta is empty"
    shapes = [choice["logprobs"] for choice in choices if choice["logprobs"]]
    entries = sum(len(shape["content"] if chat else shape["tokens"]) for shape in shapes)
    return [token for choice in choices for token in choice["token_ids"]], "".join(texts), entries


def stop_strings(base_url: str) -> None:
    """A stop string ends the text before it, streamed or not, and usage counts the tokens up to it."""
    client = Client(base_url)
    fields: Json = {"max_tokens": 24, "ignore_eos": True, "temperature": 1, "return_token_ids": True}
    for seed in range(50):  # an untrained model says few characters in a row
        fields["seed"] = seed
        whole = client.completion(**fields).json["choices"][0]
        runs = [run for run in whole["text"][8:].split("\ufffd") if len(run) >= 4]
        if runs:
            break
    stop = runs[0][:4]
    expected = whole["text"][: whole["text"].index(stop)]
    answer = client.completion(**fields, stop=["\x00never", stop]).json
    (choice,) = answer["choices"]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == (expected, "stop", stop)
    length = answer["usage"]["completion_tokens"]
    assert choice["token_ids"] == whole["token_ids"][:length] and 0 < length < 24
    chunks = [chunk["choices"][0] for chunk in client.completion(**fields, stop=stop, stream=True).events]
    assert "".join(chunk["text"] for chunk in chunks) == expected and chunks[-1]["finish_reason"] == "stop"
    included = client.completion(**fields, stop=stop, include_stop_str_in_output=True).json["choices"][0]
    assert included["text"] == expected + stop
    token = whole["token_ids"][3]
    by_id = client.completion(**fields, stop_token_ids=[token]).json["choices"][0]
    assert by_id["stop_reason"] == token and by_id["token_ids"] == whole["token_ids"][: whole["token_ids"].index(token) + 1]


def openai_library(base_url: str, model: str, api_key: str = "none") -> None:
    """The real client: models, both calls, streaming, its own exceptions."""
    with openai_client(base_url, api_key) as client:
        assert model in [card.id for card in client.models.list()] and client.models.retrieve(model).id == model
        done = client.completions.create(
            model=model, prompt="The red fox", max_tokens=4, temperature=0, extra_body={"ignore_eos": True}
        )
        assert done.usage is not None and done.usage.completion_tokens == 4 and done.choices[0].finish_reason == "length"
        fields: Json = {"model": model, "messages": MESSAGES, "seed": 3, "max_completion_tokens": 8, "logprobs": True}
        chat = client.chat.completions.create(**fields, top_logprobs=2)
        assert chat.choices[0].message.role == "assistant" and chat.choices[0].logprobs is not None
        stream = client.chat.completions.create(**fields, stream=True, stream_options={"include_usage": True})
        chunks = list(stream)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert text == chat.choices[0].message.content and chunks[-1].usage is not None and chat.usage is not None
        assert chunks[-1].usage.total_tokens == chat.usage.total_tokens > 0
        for wrong, error in (({"top_p": 1.1}, openai.BadRequestError), ({"model": "none"}, openai.NotFoundError)):
            try:
                client.chat.completions.create(**fields | wrong)
                raise AssertionError("no error")
            except error as caught:
                assert caught.code in ("invalid_value", "model_not_found")


def tokens_and_text(base_url: str) -> None:
    client = Client(base_url)
    text = "The red fox lives — 漢字"
    answer = client.post("/tokenize", prompt=text, add_special_tokens=False, return_token_strs=True).json
    assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"]) and answer["max_model_len"] > 0
    assert client.post("/detokenize", tokens=answer["tokens"]).json["prompt"] == text
    chat = client.post("/tokenize", messages=MESSAGES).json["tokens"]
    assert chat == client.chat(max_tokens=1, return_token_ids=True).json["prompt_token_ids"]
    is_error(client.post("/detokenize", tokens=[-1]), 400, param="tokens")
    is_error(client.post("/tokenize"), 400, param="prompt")


def disconnects(base_url: str, count: int = 200, seed: int = 1) -> None:
    """`count` concurrent requests, streamed and not, of which half leave at a random time; then nothing is running or held."""
    chance = random.Random(seed)
    plans = [(chance.random() < 0.8, chance.uniform(0, 0.5) if chance.random() < 0.5 else None) for _ in range(count)]
    assert asyncio.run(_many(base_url, plans)) >= sum(leave_s is None for _, leave_s in plans)
    idle(base_url)


async def _many(base_url: str, plans: list[tuple[bool, float | None]]) -> int:
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=90)) as session:
        return sum(await asyncio.gather(*(_one(session, base_url, number, *plan) for number, plan in enumerate(plans))))


async def _one(session: aiohttp.ClientSession, base_url: str, number: int, stream: bool, leave_s: float | None) -> bool:
    """Whether the answer came whole. Who does not leave must get one."""
    body = {"prompt": f"The red fox {number}", "max_tokens": 40, "ignore_eos": True, "stream": stream}
    try:
        async with asyncio.timeout(leave_s):
            async with session.post(f"{base_url}/v1/completions", json=body) as answer:
                text = await answer.text()
    except TimeoutError:
        assert leave_s is not None, "a request hangs"
        return False
    assert answer.status == 200 and "error" not in text, text[:300]
    if stream:
        assert text.endswith("data: [DONE]\n\n") and text.count('"finish_reason":"length"') == 1
    return True


def idle(base_url: str, timeout_s: float = 10.0) -> None:
    """Soon nothing runs or waits, and no KV block is in use."""
    client, deadline = Client(base_url), time.monotonic() + timeout_s
    names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
    while any(values := [client.gauge(name) for name in names]):
        assert time.monotonic() < deadline, f"still in use: {dict(zip(names, values, strict=True))}"
        time.sleep(0.02)


def open_stream(base_url: str, **body: Any) -> Generator[bytes, None, None]:
    """The lines of a stream that the caller may leave at any time."""
    connection = http.client.HTTPConnection(urlsplit(base_url).netloc, timeout=60)
    try:
        connection.request("POST", "/v1/completions", json.dumps(body | {"stream": True}))
        yield from connection.getresponse()
    finally:
        connection.close()
