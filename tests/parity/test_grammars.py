"""Structured output in one process: every end satisfies its grammar; no token depends on company, chunks or preemption."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from llguidance import LLMatcher
from msgspec import structs

import tpserve.builtin
from tests.parity.test_worker import LIMITS, SPEC, Answer, layout, serve
from tpserve.models.decoder import Decoder
from tpserve.parallel.group import Group
from tpserve.structured_output.compiler import vocabulary
from tpserve.text.tokenizer import Tokenizer
from tpserve.types.packed import pack
from tpserve.types.request import Request
from tpserve.types.sampling import EngineSamplingParams
from tpserve.weights.dummy import dummy
from tpserve.worker.grammars import CompiledGrammars

TOKENIZER = Tokenizer.load(Path(tpserve.builtin.__file__).parent / "model")
SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "n": {"type": "integer", "minimum": 0, "maximum": 40}, "s": {"enum": ["a", "bc"]}},
    "required": ["ok", "n", "s"],
    "additionalProperties": False,
}
COMPACT = {"whitespace_flexible": False}


def is_instance(text: str) -> bool:
    value = json.loads(text)
    return (
        set(value) == {"ok", "n", "s"} and value["ok"] in (True, False) and value["n"] in range(41) and value["s"] in ("a", "bc")
    )


GRAMMARS: list[tuple[str, Callable[[str], bool]]] = [
    (LLMatcher.grammar_from_json_schema(SCHEMA, overrides=COMPACT), is_instance),
    (LLMatcher.grammar_from_regex("[0-9]{3}-(yes|no)!"), lambda text: re.fullmatch("[0-9]{3}-(yes|no)!", text) is not None),
    (LLMatcher.grammar_from_lark('start: "red" | "green fish"'), lambda text: text in ("red", "green fish")),
]


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    made = Decoder(SPEC, layout(), 0, Group(), torch.float32, torch.device("cpu"), LIMITS.max_model_len)
    dummy(made.parameters(), seed=3)
    made.prepack()
    return made


def compiled(eos_ids: tuple[int, ...] = ()) -> CompiledGrammars:
    return CompiledGrammars(lambda: vocabulary(TOKENIZER, SPEC.vocab_size, eos_ids))


def requests(**more: Any) -> list[Request]:
    made = []
    for i in range(9):
        grammar, _ = GRAMMARS[i % 3]
        params = EngineSamplingParams(temperature=(0.0, 0.9, 1.6)[i // 3], max_tokens=120, grammar=grammar, ignore_eos=True)
        made.append(Request(i, pack(range(5, 25 + i)), structs.replace(params, **more), seed=i))
    return made


def text(answer: Answer) -> str:
    return TOKENIZER.decode(answer.tokens)


@pytest.fixture(scope="module")
def alone(decoder: Decoder) -> dict[int, Answer]:
    return {r.id: serve(decoder, [r], LIMITS, compiled=compiled())[0][r.id] for r in requests()}


def test_every_end_satisfies_its_grammar(alone: dict[int, Answer]) -> None:
    assert all(len(answer.tokens) < 120 for answer in alone.values()), "each ends by its grammar"
    assert all(GRAMMARS[id % 3][1](text(answer)) for id, answer in alone.items())
    assert len({text(answer) for answer in alone.values()}) > 4


@pytest.mark.parametrize("change", [
    {},
    {"max_num_batched_tokens": 11, "max_num_seqs": 3},
    {"depth": 3, "sync_sampling": True},
], ids=str)  # fmt: skip
def test_any_schedule_gives_the_same_tokens(decoder: Decoder, alone: dict[int, Answer], change: dict[str, int]) -> None:
    plain = Request(100, pack(range(30)), EngineSamplingParams(temperature=0.0, max_tokens=100), seed=1)
    answers, _ = serve(decoder, [*requests(), plain], replace(LIMITS, **change), threads=2, compiled=compiled())
    del answers[100]
    assert answers == alone


@pytest.mark.parametrize("more", [
    {"min_tokens": 119},
    {"repetition_penalty": 1.8, "presence_penalty": 1.0},
    {"top_k": 1},
    {"top_p": 0.3},
    {"logprobs": 2},
    {"allowed_token_ids": (3,)},
    {"bad_words": ((70,), (71,))},
], ids=str)  # fmt: skip
def test_grammars_hold_with_every_sampling_parameter(decoder: Decoder, more: dict[str, Any]) -> None:
    answers, _ = serve(decoder, requests(**more), LIMITS, compiled=compiled())
    assert all(GRAMMARS[id % 3][1](text(answer)) for id, answer in answers.items())


def test_a_grammar_is_followed_again_after_a_preemption(decoder: Decoder) -> None:
    """The matcher is made anew, from the tokens."""
    params = EngineSamplingParams(temperature=0.9, max_tokens=120, grammar=LLMatcher.grammar_from_regex("[ab]{90}!"))
    growing = [Request(i, pack(range(i, i + 20)), params, seed=i) for i in range(7)]
    undisturbed, _ = serve(decoder, growing, LIMITS, compiled=compiled())
    preempted, scheduler = serve(decoder, growing, replace(LIMITS, num_blocks=24), compiled=compiled())
    assert scheduler.stats().preemptions > 0 and preempted == undisturbed
    assert all(re.fullmatch("[ab]{90}!", text(answer)) for answer in undisturbed.values())


def test_an_eos_is_drawn_only_where_the_grammar_may_end(decoder: Decoder) -> None:
    grammar = LLMatcher.grammar_from_regex("[ab]{2,}")
    params = EngineSamplingParams(temperature=1.0, max_tokens=400, grammar=grammar)
    many = [Request(i, pack(range(5, 25)), params, seed=i) for i in range(8)]
    answers, _ = serve(decoder, many, replace(LIMITS, eos_ids=(1,)), compiled=compiled((1,)))
    for answer in answers.values():
        *output, last = answer.tokens
        assert last == 1 or len(answer.tokens) == 400
        assert re.fullmatch("[ab]{2,}", TOKENIZER.decode(output))


def test_a_grammar_that_a_rank_cannot_compile_is_an_error(decoder: Decoder) -> None:
    bad = Request(1, pack([5]), EngineSamplingParams(grammar=LLMatcher.grammar_from_regex("(")), seed=0)
    good = Request(2, pack([5]), EngineSamplingParams(max_tokens=3, temperature=0.0), seed=0)
    with pytest.raises(AssertionError, match="unclosed group"):
        serve(decoder, [bad, good], LIMITS, compiled=compiled())
