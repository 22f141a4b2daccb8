"""The checker of grammars: refusals name the field, and a check that failed itself is made again."""

import asyncio
from typing import Any

import pytest

from tpserve.errors import UserError
from tpserve.frontend.openai.grammar import field_of_grammar
from tpserve.frontend.openai.schema import ChatCompletionRequest
from tpserve.structured_output import checker
from tpserve.structured_output.checker import GrammarChecker
from tpserve.text.tokenizer import Tokenizer

TOKENIZER = Tokenizer.load("tpserve/builtin/model")


def test_a_refusal_names_the_field() -> None:
    checking = GrammarChecker(TOKENIZER)
    for grammar in ("start: nothing", "x" * (3 << 20)):
        with pytest.raises(UserError) as refusal:
            asyncio.run(checking.check(grammar, "guided_grammar"))
        assert (refusal.value.param, refusal.value.code) == ("guided_grammar", "invalid_grammar")


def test_a_check_that_failed_itself_is_not_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    async def twice() -> None:
        checking = GrammarChecker(TOKENIZER)
        with monkeypatch.context() as patched:
            patched.setattr(checker, "compile_grammar", lambda vocabulary, grammar: 1 // 0)
            with pytest.raises(ZeroDivisionError):
                await checking.check('start: "a"')
        await checking.check('start: "a"')

    asyncio.run(twice())


def test_the_field_that_a_grammar_comes_from() -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    fields: Any = {"messages": [{"role": "user", "content": "x"}], "tools": tools}
    assert field_of_grammar(ChatCompletionRequest(**fields)) == "tools"
    assert field_of_grammar(ChatCompletionRequest(**fields, guided_regex="a")) == "guided_regex"
