"""No body, whatever it holds, keeps the event loop: other clients are answered and other streams go on.

`loop_gaps` says what a gap is.
"""

import asyncio
import gc
import http.client
import json
from collections.abc import Iterator
from functools import partial
from urllib.parse import urlsplit

import pytest

from tests.http import checks
from tests.http.inprocess import MAX_MODEL_LEN, Server, serving
from tests.http.loop_gaps import MAX_GAP_S, without_gap
from tpserve.engine_client.status import EngineStatus
from tpserve.frontend.openai.body import MAX_BODY_BYTES
from tpserve.frontend.openai.json_scan import MAX_WEIGHT

ROOM = MAX_BODY_BYTES - 100
COMPLETIONS, CHAT, TOKENIZE, DETOKENIZE = "/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"
RESPONSES, MESSAGES = "/v1/responses", "/v1/messages"
LONG_MODEL = 1 << 20


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    gc.collect()
    gc.freeze()  # what the tests themselves hold is not the server's to go through
    with serving(tmp_path_factory.mktemp("model")) as server:
        yield server
    gc.unfreeze()


def many(head: str, item: str, tail: str, count: int | None = None) -> bytes:
    """`count` items with commas between them, by default as many as a body may hold."""
    count = ROOM // (len(item) + 1) if count is None else count
    return (head + ",".join([item] * count) + tail).encode()


def keys(head: str, tail: str, count: int) -> bytes:
    return (head + ",".join(f'"{i}":1' for i in range(count)) + tail).encode()


MESSAGE = '{"role":"user","content":"a"}'
PART = '{"type":"text","text":"a"}'
HOSTILE: dict[str, tuple[str, bytes]] = {
    "lists of 0.6 MB": (COMPLETIONS, many('{"prompt":[', "[]", "]}", 200_000)),
    "lists": (COMPLETIONS, many('{"prompt":[', "[]", "]}")),
    "objects": (COMPLETIONS, many('{"prompt":[', "{}", "]}")),
    "lists that pass the scan": (COMPLETIONS, many('{"prompt":[', "[]", "]}", MAX_WEIGHT // 17)),
    "ids that pass the scan": (COMPLETIONS, many('{"prompt":[', "123", "]}", MAX_WEIGHT - 100)),
    "texts that pass the scan": (COMPLETIONS, many('{"prompt":[', '"a"', "]}", MAX_WEIGHT // 3 - 100)),
    "unknown names": (COMPLETIONS, keys('{"prompt":"a",', "}", 500_000)),
    "unknown names that pass the scan": (COMPLETIONS, keys('{"prompt":"a","n":129,', "}", MAX_WEIGHT // 19 - 100)),
    "an unknown list": (COMPLETIONS, many('{"prompt":"a","x":[', "0", "]}")),
    "logit_bias": (COMPLETIONS, keys('{"prompt":"a","logit_bias":{', "}}", 500_000)),
    "logit_bias that passes the scan": (COMPLETIONS, keys('{"prompt":"a","logit_bias":{', "}}", MAX_WEIGHT // 19 - 100)),
    "stop": (COMPLETIONS, many('{"prompt":"a","stop":[', '"a"', "]}")),
    "stop that passes the scan": (COMPLETIONS, many('{"prompt":"a","stop":[', '"a"', "]}", MAX_WEIGHT // 3 - 100)),
    "allowed ids": (COMPLETIONS, many('{"prompt":"a","allowed_token_ids":[', "5", "]}", MAX_WEIGHT - 100)),
    "deep lists": (COMPLETIONS, b'{"prompt":' + b"[" * ROOM),
    "deep objects": (COMPLETIONS, b'{"prompt":' + b'{"a":' * (ROOM // 5)),
    "a long number": (COMPLETIONS, b'{"prompt":"a","seed":' + b"1" * ROOM + b"}"),
    "long numbers": (COMPLETIONS, many('{"prompt":[', "1" * 4000, "]}")),
    "numbers of 39 digits": (COMPLETIONS, many('{"prompt":[', "1" * 39, "]}", MAX_WEIGHT // 5 - 100)),
    "fractions": (COMPLETIONS, many('{"prompt":[', "1.2345678901234567e-30", "]}")),
    "a long text that grows wider": (COMPLETIONS, b'{"prompt":"' + b"a" * (ROOM - 20) + "é漢🎉".encode() + b'"}'),
    "a long text of escapes": (COMPLETIONS, b'{"prompt":"' + b'\\"' * (ROOM // 2) + b'"}'),
    "a long text of surrogates": (COMPLETIONS, b'{"prompt":"' + rb"\ud83c\udf89" * (ROOM // 12) + b'"}'),
    "half a surrogate": (COMPLETIONS, b'{"prompt":"' + b"a" * (ROOM // 2) + rb'\ud83c"}'),
    "no JSON": (COMPLETIONS, b'"' * ROOM),
    "spaces": (COMPLETIONS, b" " * ROOM),
    "messages": (CHAT, many('{"messages":[', MESSAGE, "]}")),
    "messages that pass the scan": (CHAT, many('{"messages":[', MESSAGE, "]}", MAX_WEIGHT // 53)),
    "a few thousand messages": (CHAT, many('{"messages":[', '{"role":"x","content":""}', "]}", 8192)),
    "a long role": (CHAT, b'{"messages":[{"role":"' + b"a" * 5_000_000 + b'","content":"a"}]}'),
    "parts": (CHAT, many('{"messages":[{"role":"user","content":[', '{"type":"x"}', "]}]}", 20_000)),
    "template names": (CHAT, keys('{"messages":[' + MESSAGE + '],"chat_template_kwargs":{', "}}", 500_000)),
    "items": (RESPONSES, many('{"input":[', MESSAGE, "]}", 8192)),
    "empty items": (RESPONSES, many('{"input":[', "{}", "]}")),
    "parts of an item": (RESPONSES, many('{"input":[{"role":"user","content":[', PART, "]}]}", MAX_WEIGHT // 54)),
    "references": (
        RESPONSES,
        ('{"input":[' + ",".join(f'{{"type":"item_reference","id":"msg_{n:032}_0"}}' for n in range(8192)) + "]}").encode(),
    ),
    "ids to detokenize": (DETOKENIZE, many('{"tokens":[', "5", "]}", 2_000_000)),
    "ids that pass the scan to detokenize": (DETOKENIZE, many('{"tokens":[', "5", "]}", MAX_WEIGHT - 100)),
    "a long name of a model": (TOKENIZE, b'{"prompt":"a","model":"' + b"a" * 5_000_000 + b'"}'),
    "texts to tokenize": (TOKENIZE, many('{"prompt":[', '"a"', "]}")),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_body_is_refused_while_others_are_served(server: Server, name: str) -> None:
    path, body = HOSTILE[name]
    client = checks.Client(server.url)
    assert len(body) <= MAX_BODY_BYTES
    reply = without_gap(server, lambda: client.send("POST", path, body))
    assert 400 <= reply.status < 500 and len(reply.body) < 1500, reply.body[:1500]
    checks.is_error(reply, reply.status)


@pytest.mark.parametrize(
    "message", [MESSAGE, '{"role":"user","content":[' + ",".join([PART] * 14_000) + "]}"], ids=["many", "long"]
)
def test_messages_are_read_while_others_are_served(server: Server, message: str) -> None:
    body = many('{"max_tokens":5,"messages":[', message, "]}", 8192 if message == MESSAGE else 1)
    reply = without_gap(server, lambda: checks.Client(server.url).send("POST", MESSAGES, body))
    assert reply.status == 400 and reply.json["error"]["type"] == "invalid_request_error"


def test_honest_bodies_are_not_refused(server: Server) -> None:
    """For what they hold, that is; this model's context is short."""
    client = checks.Client(server.url)
    for prompt in (",[{:" * 1_250_000, [5] * 100_000):
        reply = without_gap(server, partial(client.completion, prompt=prompt))
        checks.is_error(reply, 400, code="context_length_exceeded")
    reply = client.completion(max_tokens=1, logit_bias={str(i): 1 for i in range(250)}, allowed_token_ids=list(range(250)))
    assert reply.status == 200, reply.body
    reply = client.chat(max_tokens=1, chat_template_kwargs={f"name{i}": [i] for i in range(1000)})
    assert reply.status == 200, reply.body


@pytest.mark.parametrize("text", ["the cat sat on " * 40_000, "漢🎉 the" * 80_000], ids=["ascii", "wide"])
def test_tokenizing_a_long_text_leaves_the_loop_free(server: Server, text: str) -> None:
    """The library lets other threads run; and of too many tokens no list is made."""
    client = checks.Client(server.url)
    server.states.append(EngineStatus("running", "", 100, "", LONG_MODEL, server.tokenizer.vocab_size))
    body = json.dumps({"prompt": text, "messages": None}).encode()
    try:
        reply = without_gap(server, lambda: client.send("POST", TOKENIZE, body))
        assert reply.status == 200
        server.states.append(EngineStatus("running", "", 100, "", MAX_MODEL_LEN, server.tokenizer.vocab_size))
        ids = json.dumps({"tokens": reply.json["tokens"][:200_000]}).encode()
        back = without_gap(server, lambda: client.send("POST", DETOKENIZE, ids))
        assert back.status == 200 and text.startswith(back.json["prompt"].rstrip("\ufffd"))
    finally:
        server.states.append(EngineStatus("running", "serving", 100, "", MAX_MODEL_LEN, server.tokenizer.vocab_size))


def test_a_body_in_very_small_chunks(server: Server) -> None:
    """aiohttp takes what a socket has, up to 256 KiB, in one turn, and some 2 us a chunk."""
    body = b'{"prompt":"' + b"a" * 200_000 + b'"}'
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n"

    def send() -> int:
        connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=60)
        connection.putrequest("POST", COMPLETIONS)
        connection.putheader("Transfer-Encoding", "chunked")
        connection.endheaders()
        connection.send(chunks)
        status = connection.getresponse().status
        connection.close()
        return status

    assert without_gap(server, send, 2.5 * MAX_GAP_S) == 400


def test_many_hostile_bodies_at_once(server: Server) -> None:
    path, body = HOSTILE["ids that pass the scan"]

    async def flood() -> list[checks.Reply]:
        client = checks.Client(server.url)
        return await asyncio.gather(*(asyncio.to_thread(client.send, "POST", path, body) for _ in range(6)))

    for reply in without_gap(server, lambda: asyncio.run(flood())):
        checks.is_error(reply, 400, code="context_length_exceeded")
