"""The checker of grammars: refusals name the field, and a check that failed itself is made again."""

import asyncio
import threading
from typing import Any

import pytest

from tpserve.errors import UserError
from tpserve.frontend.openai.grammar import field_of_grammar
from tpserve.frontend.openai.schema import ChatCompletionRequest
from tpserve.structured_output import checker
from tpserve.structured_output.checker import GrammarChecker
from tpserve.structured_output.compiler import LARGE_BYTES
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


def test_small_grammars_do_not_wait_for_large_ones_and_few_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    go_on, compile_grammar = threading.Event(), checker.compile_grammar

    def slow(vocabulary: Any, grammar: str) -> Any:
        assert len(grammar) < LARGE_BYTES or go_on.wait(30)
        return compile_grammar(vocabulary, grammar)

    async def run() -> None:
        checking = GrammarChecker(TOKENIZER)
        large = [f'start: "{n}{"a" * LARGE_BYTES}"' for n in range(3)]
        waiting = [asyncio.create_task(checking.check(grammar)) for grammar in large[:2]]
        await checking.check('start: "a"')
        assert not any(task.done() for task in waiting)
        with pytest.raises(UserError, match="3 grammars wait") as refusal:
            waiting.append(asyncio.create_task(checking.check(large[2])))
            await asyncio.sleep(0)
            await checking.check('start: "b"')
        assert refusal.value.status == 429
        go_on.set()
        await asyncio.gather(*waiting)
        await checking.check('start: "b"')

    monkeypatch.setattr(checker, "compile_grammar", slow)
    monkeypatch.setattr(checker, "MAX_WAITING", 3)
    asyncio.run(run())


def test_the_field_that_a_grammar_comes_from() -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    fields: Any = {"messages": [{"role": "user", "content": "x"}], "tools": tools}
    assert field_of_grammar(ChatCompletionRequest(**fields)) == "tools"
    assert field_of_grammar(ChatCompletionRequest(**fields, guided_regex="a")) == "guided_regex"
