"""The assembler: the answer does not depend on how its tokens arrive."""

from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.http.tiny_tokenizer import EOS, byte_level
from tpserve.text.assembler import Assembler, OutputDelta
from tpserve.text.logprobs import chat_logprobs, completion_logprobs, spelled
from tpserve.text.tokenizer import Tokenizer
from tpserve.types.plan import TokenLogprobs

TOKENIZER = Tokenizer(byte_level(), {})
SPELL = partial(spelled, tokenizer=TOKENIZER)
STOPS = st.lists(st.sampled_from(["cat", "t s", "at", "the dog", "🎉!", "é", "zz"]), max_size=3)


def run(ids: list[int], cuts: list[int], stop: list[str], include: bool = False) -> tuple[str, list[OutputDelta], Assembler]:
    """Push `ids` in runs of the lengths `cuts`, one by one after that, taking after each push."""
    assembler = Assembler(TOKENIZER, stop=stop, include_stop=include)
    pieces, at = [], 0
    while at < len(ids) and assembler.finish is None:
        count = cuts.pop() if cuts else 1
        part = ids[at : at + count]
        assembler.push(part, [TokenLogprobs(-1.0, (), ())] * len(part))
        at += count
        pieces.append(assembler.take())
    assembler.end("length")
    pieces.append(assembler.take())
    got = [delta for delta in pieces if delta is not None]
    return "".join(delta.text for delta in got), got, assembler


@settings(max_examples=150, deadline=None)
@given(st.text(alphabet="the catsdog🎉é!z ", max_size=40), st.lists(st.integers(1, 7), max_size=9), STOPS, st.booleans())
def test_any_split_gives_the_same_answer(text: str, cuts: list[int], stop: list[str], include: bool) -> None:
    ids = TOKENIZER.encode(text)
    got, pieces, assembler = run(ids, list(cuts), stop, include)
    alone, _, other = run(ids, [], stop, include)
    assert (got, assembler.finish, assembler.stop_reason, assembler.num_tokens) == (
        alone,
        other.finish,
        other.stop_reason,
        other.num_tokens,
    )
    tokens = [token for delta in pieces for token in delta.tokens]
    assert tokens == ids[: assembler.num_tokens] == [entry.token for delta in pieces for entry in delta.entries]
    assert [delta.finish for delta in pieces[:-1]] == [None] * (len(pieces) - 1) and pieces[-1].finish is not None
    assert all(delta.text for delta in pieces[:-1]), "only the end may come without text"
    found = [s for s in stop if s in text]
    if found:
        assert assembler.finish == "stop" and assembler.stop_reason in found
        first = min(text.index(s) for s in found)
        assert got == text[: first + (len(str(assembler.stop_reason)) if include else 0)]
    else:
        assert (got, assembler.finish) == (text, "length")


def test_stop_string_reports_the_length_to_cut_at() -> None:
    ids = TOKENIZER.encode("the cat sat on the mat")
    assembler = Assembler(TOKENIZER, stop=["sat"])
    assembler.push(ids)
    assert assembler.finish == "stop" and TOKENIZER.decode(ids[: assembler.num_tokens]).endswith("sat")
    assert "sat" not in TOKENIZER.decode(ids[: assembler.num_tokens - 1])
    before = assembler.num_tokens
    assembler.push(ids)
    assembler.end("length")
    delta = assembler.take()
    assert delta is not None and delta.text == "the cat " and delta.num_tokens == before and delta.finish == "stop"
    assert assembler.take() is None


def test_only_what_may_become_a_stop_string_is_held_back() -> None:
    assembler = Assembler(TOKENIZER, stop=["the dog"])
    shown = []
    for token in TOKENIZER.encode("on the map"):
        assembler.push([token])
        delta = assembler.take()
        shown.append(delta.text if delta else "")
    assert "".join(shown) == "on the map" and " the" not in shown, "'the' waits for what follows"


@pytest.mark.parametrize(("params", "stops"), [({}, True), ({"stop_token_ids": (EOS,)}, False)])
def test_end_tokens_count_and_have_no_text(params: dict[str, tuple[int, ...]], stops: bool) -> None:
    ids = [*TOKENIZER.encode("the"), EOS]
    assembler = Assembler(TOKENIZER, skip_special_tokens=False, stop_token_ids=params.get("stop_token_ids", ()))
    assembler.push(ids, stops=stops)
    assembler.end("stop", EOS)
    delta = assembler.take()
    assert delta is not None and (delta.text, delta.tokens, delta.stop_reason) == ("the", ids, EOS)


def test_special_tokens_show_on_request() -> None:
    ids = [EOS, *TOKENIZER.encode("the")]
    for skip, text in ((True, "the"), (False, "</s>the")):
        assembler = Assembler(TOKENIZER, skip_special_tokens=skip)
        assembler.push(ids)
        delta = assembler.take()
        assert delta is not None and delta.text == text


def test_incomplete_character_at_the_end_is_flushed_and_searched() -> None:
    ids = TOKENIZER.encode("a🎉")[:-1]
    for stop, text, finish in (((), "a\ufffd", "length"), (("\ufffd",), "a", "stop")):
        assembler = Assembler(TOKENIZER, stop=stop)
        assembler.push(ids)
        assembler.end("length")
        delta = assembler.take()
        assert delta is not None and (delta.text, delta.finish) == (text, finish)


def test_logprob_shapes() -> None:
    ids = TOKENIZER.encode("a🎉b")
    other = TOKENIZER.encode("c")[0]
    assembler = Assembler(TOKENIZER)
    assembler.push(ids, [TokenLogprobs(-0.5, (other, token), (-0.25, float("-inf"))) for token in ids])
    delta = assembler.take()
    assert delta is not None
    shape = completion_logprobs(delta.entries, SPELL, base_offset=10)
    assert shape["text_offset"] == [10] + [11] * (len(ids) - 2) + [12], "a character in parts keeps its offset"
    assert shape["tokens"][0] == "a" and shape["token_logprobs"] == [-0.5] * len(ids)
    assert shape["top_logprobs"][0] == {"a": -0.5, "c": -0.25}
    content = chat_logprobs(delta.entries, TOKENIZER)["content"]
    assert bytes(byte for entry in content for byte in entry["bytes"]).decode() == "a🎉b"
    assert [top["token"] for top in content[0]["top_logprobs"]] == ["c", "a"] and content[0]["top_logprobs"][1][
        "logprob"
    ] == -9999.0
