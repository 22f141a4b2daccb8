"""A response object and its events while it is made: shown at any time, and ended at any time."""

import json
from types import SimpleNamespace
from typing import Any

from tests.unit.test_chat_tools import TEXT, output, reader, request
from tests.unit.test_logprob_entries import TOKENIZER
from tpserve.errors import UserError
from tpserve.frontend.openai.prompts import Prompt
from tpserve.frontend.openai.response_builder import ChatResponseBuilder, ResponseMeta
from tpserve.frontend.responses.encoder import CANCELLED, ResponseEncoder

SEQUENCE: Any = SimpleNamespace(index=0, request=SimpleNamespace(choice=0), cached_tokens=0)


def begun(text: str, **fields: Any) -> ResponseEncoder:
    """An encoder that has got `text`."""
    call = request(**fields)
    meta = ResponseMeta("resp-1", "", "", "tiny", 1, [])
    builder = ChatResponseBuilder(meta, call, Prompt([1, 2], "ab"), TOKENIZER, [reader(call)])
    encoder = ResponseEncoder(builder, {"id": "resp_A"}, "A", background=False)
    encoder.opening()
    encoder.deltas(SEQUENCE, output(text))
    return encoder


def data(events: list[bytes]) -> list[dict[str, Any]]:
    return [json.loads(event.split(b"\ndata: ")[1]) for event in events]


def test_it_is_shown_while_it_is_made_and_that_changes_nothing() -> None:
    encoder, silent = begun(TEXT[:12]), begun(TEXT[:12])
    shown = json.loads(encoder.body())
    assert (shown["status"], shown["usage"]) == ("in_progress", None)
    assert [(item["type"], item["content"][0]["text"]) for item in shown["output"]] == [("reasoning", "Hm")]
    assert encoder.body() == encoder.body()
    rest = output(TEXT[12:], "stop", 12)
    assert encoder.deltas(SEQUENCE, rest) == silent.deltas(SEQUENCE, rest) and encoder.closing() == silent.closing()
    assert json.loads(encoder.body())["status"] == "completed"


def test_it_ends_early_behind_what_readers_have_and_stays_so() -> None:
    """A delta that a thread encoded meanwhile is in the object, not among the events."""
    encoder = begun("Look: a")
    events = data(encoder.failed(UserError("stopped", code=CANCELLED), num_events=3))
    assert [event["sequence_number"] for event in events] == [3, 4, 5, 6]
    assert [event["type"].removeprefix("response.") for event in events] == [
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "incomplete",
    ]
    response = events[-1]["response"]
    assert (response["status"], response["output"][0]["status"], response["error"]) == ("cancelled", "incomplete", None)
    assert response["output"][0]["content"][0]["text"] == "Look: a" and response["usage"]["output_tokens"] == 7
    assert encoder.deltas(SEQUENCE, output("more", "stop", 7)) == [] and json.loads(encoder.body()) == response


def test_a_failure_says_whose_it_is() -> None:
    for status, code in ((400, "invalid_prompt"), (500, "server_error"), (503, "server_error")):
        (event,) = data(begun("").failed(UserError("no", status=status)))
        assert (event["type"], event["response"]["error"]) == ("response.failed", {"code": code, "message": "no"})
