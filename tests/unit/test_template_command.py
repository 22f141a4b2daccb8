"""`tpserve template`: the page, JSON, an answer that is read, and a model without a chat template."""

import json
from pathlib import Path

import pytest

from tests.http.tiny_tokenizer import byte_level, save
from tests.unit import chat_templates
from tpserve.__main__ import main

CALL = 'Well.\n<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'


def test_the_built_in_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["template"]) == 0
    page = capsys.readouterr().out
    assert "a tool call   read, from chat template" in page and "reasoning     off: " in page
    assert json.loads(page.partition("response_template:\n")[2])["fields"]["tool_calls"]["repeats"] is True


def test_json_and_a_named_parser(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["template", "--json", "--reasoning-parser", "deepseek_r1"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["source"]["reasoning"] == "--reasoning-parser deepseek_r1" and found["format"]["tools"]["arguments"] == "json"
    assert main(["template", "--tool-call-parser", "hermess"]) == 2
    assert "hermess" in capsys.readouterr().err


def test_an_answer_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "answer").write_text(CALL)
    assert main(["template", "--parse", str(tmp_path / "answer")]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "reasoning": "",
        "content": "Well.",
        "tool_calls": [{"name": "f", "arguments": '{"a": 1}'}],
    }
    assert main(["template", "--parse", str(tmp_path / "none")]) == 2


def test_a_directory_with_its_tokenizer_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(byte_level(), tmp_path)
    main(["template", str(tmp_path)])
    assert "a tool call   off: the chat template does not show tools to the model" in capsys.readouterr().out
    assert main(["template", str(tmp_path), "--chat-template", chat_templates.QWEN3]) == 0
    assert "reasoning     read, from chat template" in capsys.readouterr().out
