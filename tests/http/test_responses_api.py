"""The Responses API over real sockets: objects, the order of events, what is stored and for whom, and what is refused."""

import json
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.http import checks
from tests.http.checks import Json
from tests.http.inprocess import MAX_MODEL_LEN, Server, serving, until
from tests.http.test_durable import kill
from tests.http.test_resumable import Connection
from tests.unit.test_chat_tools import SPEC, TEXT
from tpserve.frontend.openai.chat_answer import ChatAnswers
from tpserve.response_template.template import ResponseTemplate
from tpserve.types.messages import Delta, Done
from tpserve.types.packed import unpack

ROUTE = "/v1/responses"
ASK: Json = {"input": "Where does the red fox live?", "max_output_tokens": 24, "ignore_eos": True, "seed": 3}
TOOLS = [
    {"type": "function", "name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}},
    {"type": "function", "name": "g"},
]
ANSWERS = ChatAnswers(template=ResponseTemplate.load(SPEC | {"start_anchor": "<|assistant|>"}))
PARTS = ["content_part.added", "content_part.done"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("model"), max_queued_requests=300, answers=ANSWERS) as server:
        yield server


def create(server: Server, status: int = 200, **body: Any) -> Json:
    reply = checks.Client(server.url).post(ROUTE, **ASK | body)
    assert reply.status == status, reply.body
    return reply.json


def get(server: Server, id: str, more: str = "") -> checks.Reply:
    return checks.Client(server.url).get(f"{ROUTE}/{id}{more}")


def events(data: bytes, numbered: bool = True) -> list[Json]:
    """The data of each event, whose number and type stand in its lines, too."""
    found = []
    for part in data.decode().split("\n\n")[:-1]:
        pattern = r"id: (\d+)\nevent: (\S+)\ndata: (.*)" if numbered else r"()event: (\S+)\ndata: (.*)"
        match = re.fullmatch(pattern, part)
        assert match, part
        value = json.loads(match[3])
        assert value["type"] == match[2] and (not numbered or value["sequence_number"] == int(match[1]))
        found.append(value)
    assert [value["sequence_number"] for value in found] == list(
        range(found[0]["sequence_number"], found[0]["sequence_number"] + len(found))
    )
    return found


def streamed(server: Server, **body: Any) -> tuple[list[Json], bytes]:
    data = Connection(server.url, "POST", ROUTE, ASK | {"stream": True} | body).read()
    return events(data), data


def fed(server: Server, tokens: tuple[int, ...], size: int, body: Json, path: str = ROUTE) -> bytes:
    """The answer to a request that gets these tokens, so many a frame."""
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(lambda: Connection(server.url, "POST", path, body).read())
        until(lambda: server.request_table.num_open == 1)
        (sequence,) = server.request_table.open_sequences
        feed(server, sequence.request.id, tokens, size)
        return answer.result(20)


def feed(server: Server, id: int, tokens: tuple[int, ...], size: int) -> None:
    for begin in range(0, len(tokens), size):
        server.loop.call_soon_threadsafe(server.request_table.receive, [Delta(id, begin, tokens[begin : begin + size])])
    server.loop.call_soon_threadsafe(server.request_table.receive, [Done(id, "stop", len(tokens))])


def without_ids(value: Any) -> Any:
    """The value without what tells two equal answers apart."""
    if isinstance(value, dict):
        return {name: without_ids(part) for name, part in value.items() if name not in ("id", "item_id", "call_id", "created_at")}
    return [without_ids(part) for part in value] if isinstance(value, list) else value


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_events_come_in_order_and_say_what_the_object_says(tmp_path: Path, size: int) -> None:
    with serving(tmp_path, answers=ANSWERS) as server:
        server.engine.paused = True
        tokens = tuple(server.tokenizer.encode(TEXT, add_special_tokens=False))
        body = ASK | {"stream": True, "tools": TOOLS, "max_output_tokens": 200}
        found = events(fed(server, tokens, size, body))
        kinds = [event["type"].removeprefix("response.") for event in found]
        merged = [kind for at, kind in enumerate(kinds) if not (at and kinds[at - 1] == kind)]

        def item(*inside: str) -> list[str]:
            return ["output_item.added", *inside, "output_item.done"]

        assert merged == [
            *("created", "in_progress"),
            *item(PARTS[0], "reasoning_text.delta", "reasoning_text.done", PARTS[1]),
            *item(PARTS[0], "output_text.delta", "output_text.done", PARTS[1]),
            *item("function_call_arguments.delta", "function_call_arguments.done"),
            *item("function_call_arguments.delta", "function_call_arguments.done"),
            "completed",
        ]
        response = found[-1]["response"]
        reasoning, message, first, second = response["output"]
        assert (reasoning["type"], reasoning["content"]) == ("reasoning", [{"type": "reasoning_text", "text": "Hm"}])
        assert (message["role"], message["content"][0]["text"], message["status"]) == ("assistant", "Look:", "completed")
        assert [(call["name"], json.loads(call["arguments"])) for call in (first, second)] == [("f", {"a": 1}), ("g", {})]
        assert first["call_id"] != second["call_id"] and response["usage"]["output_tokens"] == len(tokens)
        assert response["usage"]["output_tokens_details"]["reasoning_tokens"] > 0
        for number, whole in enumerate(response["output"]):
            own = [event for event in found if event.get("output_index") == number]
            assert {event.get("item_id", whole["id"]) for event in own} == {whole["id"]} and own[-1]["item"] == whole
            said = "".join(event["delta"] for event in own if event["type"].endswith(".delta"))
            assert said == (whole["arguments"] if "arguments" in whole else whole["content"][0]["text"])
            (done,) = [event for event in own if event["type"].endswith(("text.done", "arguments.done"))]
            assert done.get("text", done.get("arguments")) == said
        assert get(server, response["id"]).json == response
        plain = json.loads(fed(server, tokens, size, body | {"stream": False}))
        assert without_ids(plain)["output"] == without_ids(response)["output"]


def test_an_answer_goes_on_behind_every_event(server: Server) -> None:
    found, data = streamed(server)
    id, parts = found[0]["response"]["id"], [part + b"\n\n" for part in data.split(b"\n\n")[:-1]]
    assert re.fullmatch(r"resp_[\w-]{32}", id)
    assert (found[-1]["type"], found[-1]["response"]["incomplete_details"]) == (
        "response.incomplete",
        {"reason": "max_output_tokens"},
    )
    for number in range(len(parts)):
        assert get(server, id, f"?stream=true&starting_after={number}").body == b"".join(parts[number + 1 :])
        again = checks.Client(server.url, {"Last-Event-ID": str(number)}).get(f"{ROUTE}/{id}?stream=true&starting_after=0")
        assert again.body == b"".join(parts[number + 1 :])
    assert get(server, id, "?stream=true").body == data and get(server, id).json == found[-1]["response"]
    for wrong in ("starting_after=1.2", "starting_after=x", "starting_after=-1"):
        checks.is_error(get(server, id, f"?stream=true&{wrong}"), 400, param="starting_after")
    checks.is_error(get(server, id, "?starting_after=1"), 400, param="starting_after", says="stream")
    checks.is_error(get(server, id, "?stream=perhaps"), 400, param="stream")
    checks.is_error(get(server, create(server)["id"], "?stream=true"), 400, param="stream", says="without stream")


def test_a_response_is_that_of_chat(server: Server) -> None:
    """The same tokens, and what was asked is in the object."""
    whole = create(server, instructions="Be brief.", metadata={"a": "b"}, user="me", temperature=0.5, top_p=0.9)
    system, user = {"role": "system", "content": "Be brief."}, {"role": "user", "content": ASK["input"]}
    chat = checks.Client(server.url).post(
        "/v1/chat/completions",
        messages=[system, user], max_tokens=24, ignore_eos=True, seed=3, temperature=0.5, top_p=0.9,
    )  # fmt: skip
    assert whole["output"][0]["content"][0]["text"] == chat.json["choices"][0]["message"]["content"]
    assert whole["usage"]["input_tokens"] == chat.json["usage"]["prompt_tokens"]
    assert (whole["status"], whole["output"][0]["status"], whole["store"]) == ("incomplete", "incomplete", True)
    assert (whole["metadata"], whole["user"], whole["temperature"], whole["top_p"]) == ({"a": "b"}, "me", 0.5, 0.9)
    assert (whole["instructions"], whole["max_output_tokens"], whole["error"]) == ("Be brief.", 24, None)
    stream, _ = streamed(server, instructions="Be brief.", temperature=0.5, top_p=0.9)
    assert without_ids(stream[-1]["response"]["output"]) == without_ids(whole["output"])


def test_log_probabilities_are_those_of_the_text(server: Server) -> None:
    more = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    whole = create(server, **more)["output"][0]["content"][0]
    assert len(whole["logprobs"]) == 24 and all(len(entry["top_logprobs"]) == 2 for entry in whole["logprobs"])
    found, _ = streamed(server, **more)
    sent = [entry for event in found if event["type"] == "response.output_text.delta" for entry in event["logprobs"]]
    assert sent == whole["logprobs"]
    assert create(server)["output"][0]["content"][0]["logprobs"] == []


def test_in_the_background(server: Server) -> None:
    server.engine.paused = True
    first = create(server, background=True)
    assert (first["status"], first["output"], first["background"]) == ("queued", [], True)
    reader = Connection(server.url, "GET", f"{ROUTE}/{first['id']}?stream=true")
    until(lambda: get(server, first["id"]).json["status"] == "in_progress")
    server.engine.paused = False
    found = events(reader.read())
    assert [event["type"] for event in found[:3]] == ["response.created", "response.queued", "response.in_progress"]
    assert [event["response"]["status"] for event in found[:3]] == ["queued", "queued", "in_progress"]
    assert get(server, first["id"]).json == found[-1]["response"] and server.request_table.num_open == 0
    both, _ = streamed(server, background=True)
    assert without_ids(both[-1]["response"]["output"]) == without_ids(found[-1]["response"]["output"])


def test_one_in_the_background_is_cancelled(tmp_path: Path) -> None:
    with serving(tmp_path, step_s=0.01) as server:
        client = checks.Client(server.url)
        id = create(server, background=True, max_output_tokens=200)["id"]
        reader = Connection(server.url, "GET", f"{ROUTE}/{id}?stream=true")
        until(lambda: bool(get(server, id).json["output"]))
        cancelled = client.post(f"{ROUTE}/{id}/cancel").json
        assert (cancelled["status"], cancelled["error"], cancelled["incomplete_details"]) == ("cancelled", None, None)
        assert cancelled["output"][0]["content"][0]["text"] and cancelled["usage"]["output_tokens"] > 0
        until(lambda: server.engine.scheduler.stats().blocks_used == 0)
        last = events(reader.read())[-1]
        assert (last["type"], last["response"]) == ("response.incomplete", cancelled)
        assert client.post(f"{ROUTE}/{id}/cancel").json == cancelled == get(server, id).json
        checks.is_error(
            client.post(ROUTE, **ASK | {"previous_response_id": id}), 400, param="previous_response_id", says="cancelled"
        )
        stream = Connection(server.url, "POST", ROUTE, ASK | {"stream": True, "max_output_tokens": 200})
        open_id = events(stream.read(1200).split(b"\n\nid: 1")[0] + b"\n\n")[0]["response"]["id"]
        checks.is_error(client.post(f"{ROUTE}/{open_id}/cancel"), 400, says="background")
        stream.cut()
        until(lambda: server.request_table.num_open == 0)
        assert get(server, open_id).status == 404, "a client that leaves ends its response"


def test_a_stream_outlives_its_connection_where_that_is_asked_for(tmp_path: Path) -> None:
    with serving(tmp_path, step_s=0.004) as server:
        stream = Connection(server.url, "POST", ROUTE, ASK | {"stream": True, "max_output_tokens": 100}, X_Resumable="1")
        begin = stream.read(1500)
        stream.cut()
        begin = begin[: begin.rfind(b"\n\n") + 2]
        last = events(begin)[-1]["sequence_number"]
        rest = get(server, f"resp_{stream.id}", f"?stream=true&starting_after={last}").body
        assert events(rest)[0]["sequence_number"] == last + 1
        assert events(begin + rest)[-1]["response"]["usage"]["output_tokens"] == 100


def prompt(server: Server) -> list[int]:
    return list(unpack(server.engine.requests[-1].request.prompt))


def test_a_conversation_goes_on(server: Server) -> None:
    """Its prompt is that of the whole conversation sent at once; instructions are not carried over."""
    first = create(server, instructions="Be brief.")
    second = create(server, previous_response_id=first["id"], input=[{"role": "user", "content": "And the old mill?"}])
    third = create(server, previous_response_id=second["id"], input="Yes?", instructions="Be kind.")
    continued = prompt(server)
    items = [
        {"role": "user", "content": ASK["input"]},
        *first["output"],
        {"role": "user", "content": [{"type": "input_text", "text": "And the old mill?"}]},
        *second["output"],
        {"type": "message", "role": "user", "content": "Yes?"},
    ]
    create(server, input=items, instructions="Be kind.")
    assert prompt(server) == continued and third["previous_response_id"] == second["id"]
    checks.Client(server.url).send("DELETE", f"{ROUTE}/{first['id']}")
    create(server, previous_response_id=second["id"], input="Yes?", instructions="Be kind.")
    assert prompt(server) == continued, "what was said before does not depend on the first response"
    listed = get(server, third["id"], "/input_items?order=asc").json
    assert [item["type"] for item in listed["data"]] == ["message"] * 5
    assert [item["role"] for item in listed["data"]] == ["user", "assistant", "user", "assistant", "user"]
    reference = {"type": "item_reference", "id": second["output"][0]["id"]}
    create(server, input=[*items[:3], reference, items[4]], instructions="Be kind.")
    assert prompt(server) == continued
    unknown = checks.Client(server.url).post(ROUTE, **ASK | {"input": [reference | {"id": "msg_" + "x" * 32 + "_0"}]})
    checks.is_error(unknown, 400, param="input[0].id", says="no item")


def test_input_is_listed_page_by_page(server: Server) -> None:
    id = create(server, input=[{"role": "user", "content": f"{number}"} for number in range(5)])["id"]
    texts, after, pages = [], "", 0
    while True:
        page = get(server, id, f"/input_items?limit=2&order=asc{after}").json
        texts += [item["content"][0]["text"] for item in page["data"]]
        assert (page["first_id"], page["last_id"]) == (page["data"][0]["id"], page["data"][-1]["id"])
        pages, after = pages + 1, f"&after={page['last_id']}"
        if not page["has_more"]:
            break
    assert texts == ["0", "1", "2", "3", "4"] and pages == 3
    assert [item["content"][0]["text"] for item in get(server, id, "/input_items").json["data"]] == texts[::-1]
    for wrong, param in (("limit=0", "limit"), ("limit=101", "limit"), ("order=up", "order"), ("after=x", "after")):
        checks.is_error(get(server, id, f"/input_items?{wrong}"), 400, param=param)


def test_a_response_belongs_to_its_key_and_may_be_deleted(tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        mine, other = (checks.Client(server.url, {"Authorization": f"Bearer {key}"}) for key in ("mine", "other"))
        id = mine.post(ROUTE, **ASK).json["id"]
        paths = [("GET", f"{ROUTE}/{id}"), ("GET", f"{ROUTE}/{id}/input_items"), ("POST", f"{ROUTE}/{id}/cancel")]
        for method, path in [*paths, ("DELETE", f"{ROUTE}/{id}")]:
            checks.is_error(other.send(method, path), 404, code="response_not_found")
        unknown = other.post(ROUTE, **ASK | {"previous_response_id": id})
        checks.is_error(unknown, 400, param="previous_response_id", code="previous_response_not_found")
        deleted = mine.send("DELETE", f"{ROUTE}/{id}")
        assert deleted.json == {"id": id, "object": "response", "deleted": True}
        checks.is_error(mine.get(f"{ROUTE}/{id}"), 404)
        stream = Connection(server.url, "POST", "/v1/completions", {"prompt": "a", "stream": True}, X_Resumable="1")
        stream.read()
        checks.is_error(checks.Client(server.url).get(f"{ROUTE}/resp_{stream.id}"), 404, code="response_not_found")


def test_what_is_not_stored_is_not_found(tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        one = create(server, store=False)
        assert one["store"] is False and get(server, one["id"]).status == 404
        data = Connection(server.url, "POST", ROUTE, ASK | {"stream": True, "store": False}).read()
        found = events(data, numbered=False)
        assert get(server, found[0]["response"]["id"]).status == 404
        checks.is_error(
            checks.Client(server.url).post(ROUTE, **ASK | {"store": False, "background": True}), 400, param="background"
        )
    with serving(tmp_path, resume_window=0) as server:
        assert create(server)["store"] is False
        for name in ("store", "background"):
            checks.is_error(
                checks.Client(server.url).post(ROUTE, **ASK | {name: True}), 400, param=name, says="--resume-window 0"
            )
    with serving(tmp_path, resume_window=0.2) as server:
        id = create(server)["id"]
        until(lambda: get(server, id).status == 404)


WRONG: list[tuple[Json, str]] = [
    ({"input": None}, "input"),
    ({"input": []}, "input"),
    ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input[0].content[0].type"),
    ({"input": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "input[0].content[0].type"),
    ({"input": [{"role": "robot", "content": "x"}]}, "input[0].role"),
    ({"input": [{"type": "web_search_call", "id": "x"}]}, "input[0]"),
    ({"input": [{"type": "function_call", "call_id": "x", "name": "f"}]}, "input[0].arguments"),
    ({"input": [{"type": "function_call_output", "output": "x"}]}, "input[0].call_id"),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
    ({"tools": [TOOLS[0], {"type": "file_search"}]}, "tools[1].type"),
    ({"tools": [{"type": "function", "name": "a b"}]}, "tools[0].name"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"conversation": "conv_1"}, "conversation"),
    ({"prompt": {"id": "pmpt_1"}}, "prompt"),
    ({"include": ["file_search_call.results"]}, "include[0]"),
    ({"text": {"format": {"type": "json_schema", "name": "x", "schema": {"not": {}}}}}, "text.format.schema"),
    ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
    ({"text": {"verbosity": "low"}}, "text.verbosity"),
    ({"reasoning": {"effort": "huge"}}, "reasoning.effort"),
    ({"reasoning": {"summary": "detailed"}}, "reasoning.summary"),
    ({"max_output_tokens": 0}, "max_output_tokens"),
    ({"max_tokens": 5}, "max_tokens"),
    ({"temperature": 3}, "temperature"),
    ({"truncation": "left"}, "truncation"),
    ({"service_tier": "flex"}, "service_tier"),
    ({"metadata": {"a": 1}}, "metadata"),
    ({"previous_response_id": "resp_x"}, "previous_response_id"),
    ({"n": 2}, "n"),
]


@pytest.mark.parametrize(("body", "param"), WRONG)
def test_what_cannot_be_served_is_refused_by_name(server: Server, body: Json, param: str) -> None:
    reply = checks.Client(server.url).post(ROUTE, **ASK | body)
    assert reply.status == 400 and reply.json["error"]["param"].startswith(param), reply.body
    assert param.split("[")[0].split(".")[0].replace("_response_id", "") in reply.json["error"]["message"].lower()


def test_a_long_conversation_is_refused_or_truncated(server: Server) -> None:
    items = [{"role": "user", "content": f"{number} " + "word " * 20} for number in range(20)]
    checks.is_error(
        checks.Client(server.url).post(ROUTE, **ASK | {"input": items}), 400, param="input", code="context_length_exceeded"
    )
    short = create(server, input=items, truncation="auto", instructions="Be brief.")
    text = server.tokenizer.decode(prompt(server), skip_special_tokens=False)
    assert "Be brief." in text and "19 word" in text and "0 word word" not in text.replace("10 word", "")
    assert MAX_MODEL_LEN // 2 < short["usage"]["input_tokens"] <= MAX_MODEL_LEN - 24
    listed = get(server, short["id"], "/input_items?limit=100").json["data"]
    assert len(listed) == 20, "the conversation stays whole"
    alone = checks.Client(server.url).post(ROUTE, **ASK | {"input": "word " * 900, "truncation": "auto"})
    checks.is_error(alone, 400, code="context_length_exceeded")


def test_tokens_are_counted(server: Server) -> None:
    whole = create(server, instructions="Be brief.", tools=TOOLS)
    reply = checks.Client(server.url).post(f"{ROUTE}/input_tokens", input=ASK["input"], instructions="Be brief.", tools=TOOLS)
    assert reply.json == {"object": "response.input_tokens", "input_tokens": whole["usage"]["input_tokens"]}


def test_a_failure_is_shown(tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        server.engine.paused = True
        stream = Connection(server.url, "POST", ROUTE, ASK | {"stream": True})
        kept = create(server, background=True)["id"]
        until(lambda: server.request_table.num_open == 2)
        server.loop.call_soon_threadsafe(server.request_table.fail_all, "rank 1 failed", 500)
        found = events(stream.read())
        assert [event["type"] for event in found[2:]] == ["response.failed"]
        assert found[-1]["response"]["error"] == {"code": "server_error", "message": "rank 1 failed"}
        failed = get(server, kept).json
        assert (failed["status"], failed["error"]["message"]) == ("failed", "rank 1 failed")


def test_responses_outlive_the_server(tmp_path: Path) -> None:
    """Killed in the middle, the same bytes go on; so do conversations, and what was cancelled stays so."""
    with serving(tmp_path, state_dir=tmp_path / "state", step_s=0.003) as server:
        past = create(server, instructions="Be brief.")
        more = {"previous_response_id": past["id"], "max_output_tokens": 60, "seed": None, "temperature": 1}
        stream = Connection(server.url, "POST", ROUTE, ASK | more | {"stream": True, "background": True})
        begin = b""
        while len(begin) < 6000:
            begin += stream.read(6000)
        ended = create(server, background=True, max_output_tokens=200)["id"]
        until(lambda: bool(get(server, ended).json["output"]))
        cancelled = checks.Client(server.url).post(f"{ROUTE}/{ended}/cancel").json
        asked = prompt(server)
        kill(server)
        stream.cut()
    begin = begin[: begin.rfind(b"\n\n") + 2]
    id, last = events(begin)[0]["response"]["id"], events(begin)[-1]["sequence_number"]
    with serving(tmp_path, state_dir=tmp_path / "state") as server:
        rest = get(server, id, f"?stream=true&starting_after={last}").body
        whole = events(begin + rest)
        assert (
            whole[-1]["response"]["usage"]["output_tokens"] == 60 and whole[-1]["response"]["previous_response_id"] == past["id"]
        )
        assert get(server, id).json == whole[-1]["response"] and get(server, past["id"]).json == past
        assert get(server, ended).json["status"] == "cancelled" == cancelled["status"]
        assert len(get(server, id, "/input_items").json["data"]) == 3
        create(server, previous_response_id=id, input="And?")
        assert len(prompt(server)) > len(asked)
    time.sleep(0.3)
    with serving(tmp_path, state_dir=tmp_path / "state", resume_window=0.2) as server:
        assert get(server, id).status == get(server, past["id"]).status == 404
