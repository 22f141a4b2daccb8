"""What a request body may hold: every refusal names its field, every neutral value passes."""

import logging
import re
from pathlib import Path
from typing import Any

import pytest

from tpserve.errors import UserError
from tpserve.frontend.openai.body import parse
from tpserve.frontend.openai.params import refuse_contradictions
from tpserve.frontend.openai.schema import LABELS, NEUTRAL, ChatCompletionRequest, CompletionRequest

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}]}


def completion(**fields: Any) -> tuple[CompletionRequest, list[str]]:
    return parse({"prompt": "a"} | fields, CompletionRequest, set())


def chat(**fields: Any) -> tuple[ChatCompletionRequest, list[str]]:
    return parse(CHAT | fields, ChatCompletionRequest, set())


def refused(schema: type[Any], fields: dict[str, Any]) -> UserError:
    with pytest.raises(UserError) as info:
        parse({"prompt": "a", **CHAT} | fields if schema is ChatCompletionRequest else {"prompt": "a"} | fields, schema, set())
    return info.value


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"max_tokens": -5}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"n": True}, "n"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a", ""]}, "stop[1]"),
        ({"stop": ["a"] * 65}, "stop"),
        ({"stop_token_ids": [-1]}, "stop_token_ids[0]"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ({"logprobs": 21}, "logprobs"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.01}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"top_k": 1.5}, "top_k"),
        ({"min_p": -0.1}, "min_p"),
        ({"presence_penalty": 2.1}, "presence_penalty"),
        ({"frequency_penalty": -2.1}, "frequency_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"repetition_penalty": 101}, "repetition_penalty"),
        ({"logit_bias": {"fox": 1}}, "logit_bias"),
        ({"logit_bias": {"5": -101}}, "logit_bias[...]"),
        ({"logit_bias": [5]}, "logit_bias"),
        ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias"),
        ({"allowed_token_ids": []}, "allowed_token_ids"),
        ({"allowed_token_ids": [-1]}, "allowed_token_ids[0]"),
        ({"bad_words": [""]}, "bad_words[0]"),
        ({"bad_words": ["a"] * 129}, "bad_words"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
        ({"prompt_logprobs": False}, "prompt_logprobs"),
        ({"priority": 2**31}, "priority"),
        ({"priority": 0.5}, "priority"),
        ({"cache_salt": ""}, "cache_salt"),
        ({"best_of": 0}, "best_of"),
        ({"best_of": 129}, "best_of"),
        ({"prompt": 7}, "prompt"),
        ({"request_id": "two\r\nlines"}, "request_id"),
        ({"rid": "x" * 129}, "request_id"),
    ],
)
def test_wrong_values_name_the_field(fields: dict[str, Any], param: str) -> None:
    error = refused(CompletionRequest, fields)
    assert error.param == param and param in str(error) and (error.status, error.code) == (400, "invalid_value")


def test_out_of_range_tells_the_value() -> None:
    assert str(refused(CompletionRequest, {"max_tokens": -5})) == "max_tokens: expected `int` >= 0, got -5"


def test_missing_fields_are_named() -> None:
    for schema, param in ((CompletionRequest, "prompt"), (ChatCompletionRequest, "messages")):
        with pytest.raises(UserError) as info:
            parse({}, schema, set())
        assert info.value.param == param
    assert refused(ChatCompletionRequest, {"messages": []}).param == "messages"


@pytest.mark.parametrize("name", sorted(NEUTRAL.keys() - {*ChatCompletionRequest.__struct_fields__}))
def test_known_fields_are_refused_unless_neutral(name: str) -> None:
    for value in (None, *NEUTRAL[name]):
        assert chat(**{name: value})[1] == []
    for value in (0.5, ["x"], {"type": "json_object"}):
        error = refused(ChatCompletionRequest, {name: value})
        assert (error.param, error.code, error.status) == (name, "unsupported_parameter", 400) and name in str(error)


@pytest.mark.parametrize(
    ("schema", "fields", "param"),
    [
        (CompletionRequest, {"max_tokens": 0}, "max_tokens"),
        (CompletionRequest, {"best_of": 2, "n": 3}, "best_of"),
        (CompletionRequest, {"best_of": 2, "stream": True}, "best_of"),
        (CompletionRequest, {"prompt_logprobs": 0, "stream": True}, "prompt_logprobs"),
        (CompletionRequest, {"stream_options": {}}, "stream_options"),
        (CompletionRequest, {"seed": 2**64}, "seed"),
        (ChatCompletionRequest, {"prompt_logprobs": 0, "stream": True}, "prompt_logprobs"),
        (ChatCompletionRequest, {"top_logprobs": 1}, "top_logprobs"),
    ],
)
def test_contradictions_name_a_field(
    schema: type[CompletionRequest | ChatCompletionRequest], fields: dict[str, Any], param: str
) -> None:
    call, _ = parse(({"prompt": "a"} if schema is CompletionRequest else CHAT) | fields, schema, set())
    with pytest.raises(UserError, match=f"^{param} ") as info:
        refuse_contradictions(call)
    assert (info.value.param, info.value.code, info.value.status) == (param, "invalid_value", 400)


def test_what_goes_together() -> None:
    for fields in ({"max_tokens": 0, "echo": True}, {"best_of": 2, "n": 2, "stream": True}, {"best_of": 3}, {"seed": -(2**63)}):
        refuse_contradictions(completion(**fields)[0])
    assert chat(best_of=1)[0].num_drawn == 1 and refused(ChatCompletionRequest, {"best_of": 2}).code == "unsupported_parameter"


def test_what_the_engine_is_asked_for() -> None:
    asked = [
        ({}, (1, None, None, 0)),
        ({"n": 2, "best_of": 3}, (3, 0, None, 0)),
        ({"n": 2, "best_of": 3, "logprobs": 4}, (3, 4, None, 0)),
        ({"echo": True}, (1, None, None, 0)),
        ({"echo": True, "logprobs": 1}, (1, 1, 1, 2)),
        ({"echo": True, "logprobs": 1, "prompt_logprobs": 5, "n": 3}, (3, 1, 5, 24)),
        ({"prompt_logprobs": 0, "n": 2, "logprobs": 3}, (2, 3, 0, 2)),
    ]
    for fields, expected in asked:
        call = completion(**fields)[0]
        assert (call.num_drawn, call.num_logprobs, call.num_scored, call.num_shown_scores) == expected
    call = chat(prompt_logprobs=4, n=3)[0]
    assert (call.num_drawn, call.num_logprobs, call.num_scored, call.num_shown_scores) == (3, None, 4, 5)


def test_null_is_accepted_for_every_field() -> None:
    for schema in (CompletionRequest, ChatCompletionRequest):
        names = [name for name in schema.__struct_fields__ if name not in ("prompt", "messages")]
        body = {"prompt": "a"} if schema is CompletionRequest else CHAT
        call, warnings = parse(dict(body) | dict.fromkeys(names), schema, set())
        assert warnings == [] and call.temperature == 1.0 and call.max_tokens is None
    assert completion(stream_options={"include_usage": None})[0].stream_options is not None


def test_unknown_fields_are_served_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    logged: set[str] = set()
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            _, warnings = parse({"prompt": "a", "colour": "violet", "user": "me"}, CompletionRequest, logged)
            assert warnings == ["unknown field 'colour' ignored"]
    assert len(caplog.records) == 1 and "violet" not in caplog.text


def test_unknown_fields_do_not_fill_log_or_answer(caplog: pytest.LogCaptureFixture) -> None:
    logged: set[str] = set()
    with caplog.at_level(logging.WARNING):
        for start in range(0, 600, 100):
            body = {"prompt": "a"} | {f"f{i}\n" + "y" * 5000: 1 for i in range(start, start + 100)}
            _, warnings = parse(body, CompletionRequest, logged)
    assert len(warnings) == 16 and max(map(len, warnings)) < 120
    assert len(logged) <= 256 and all(len(record.getMessage()) < 250 for record in caplog.records)


def test_stop_forms() -> None:
    assert completion(stop="x")[0].stops == ("x",) and completion(stop=["x", "yy"])[0].stops == ("x", "yy")
    assert completion()[0].stops == ()


def test_chat_logprobs() -> None:
    assert chat()[0].num_logprobs is None and chat(logprobs=True)[0].num_logprobs == 0
    assert chat(logprobs=True, top_logprobs=3)[0].num_logprobs == 3


def test_the_documentation_lists_every_field() -> None:
    section = (Path(__file__).parents[2] / "docs" / "http.md").read_text().split("## Fields")[1].split("## Rules")[0]
    listed = set(re.findall(r"`(\w+)`", section))
    honoured = {*CompletionRequest.__struct_fields__, *ChatCompletionRequest.__struct_fields__}
    assert listed - {"rid", "thinking_budget", "null", "warnings"} == honoured | LABELS | (NEUTRAL.keys() - honoured)


def test_wrong_keys_of_logit_bias_are_named() -> None:
    with pytest.raises(UserError, match=r"logit_bias: 'fox', '1\.5', '-3': not the id of a token") as raised:
        completion(logit_bias={"fox": 1, "7": 1, "1.5": 2, "-3": 0})
    assert raised.value.param == "logit_bias"
    with pytest.raises(UserError, match="and 95 more"):
        completion(logit_bias={f"k{number}": 1 for number in range(100)})


def test_whole_numbers_may_have_a_fraction_of_zero() -> None:
    call, _ = completion(max_tokens=16.0, temperature=1.0, seed=-3.0, n=2.0)
    assert (call.max_tokens, call.temperature, call.seed, call.n) == (16, 1.0, -3, 2) and type(call.max_tokens) is int
    with pytest.raises(UserError, match="max_tokens"):
        completion(max_tokens=16.5)
