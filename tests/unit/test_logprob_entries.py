"""Scores of a prompt: taken in any pieces, shown beside its text, and what the shapes make of them."""

import math
from array import array
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.http.tiny_tokenizer import EOS, byte_level, metaspace
from tpserve.text.assembler import Assembler, OutputDelta
from tpserve.text.logprob_entries import PromptScores, TokenEntry, token_offsets
from tpserve.text.logprobs import completion_logprobs, likeliest, prompt_logprobs, spelled
from tpserve.text.tokenizer import Tokenizer
from tpserve.types.packed import pack
from tpserve.types.plan import PromptLogprobs, TokenLogprobs

TOKENIZER = Tokenizer(byte_level(), {})
SPELL = partial(spelled, tokenizer=TOKENIZER)
IDS = TOKENIZER.encode("the cat sat on the mat")
LAST = len(IDS) - 1


def chunk(start: int, count: int, num_top: int = 2) -> PromptLogprobs:
    """Token at position p has -p; its rivals are p, p + 1, ... with -p / 2, -p / 4, ..."""
    at = range(start, start + count)
    values = array("f", (-p / 2 ** (i + 1) for p in at for i in range(num_top))).tobytes()
    return PromptLogprobs(
        num_top, array("f", (-p for p in at)).tobytes(), pack(p + i for p in at for i in range(num_top)), values
    )


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(1, LAST), st.integers(1, 5)), max_size=30), st.integers(0, 3))
def test_chunks_in_any_order_leave_no_gap(starts: list[tuple[int, int]], num_top: int) -> None:
    """What joins or overlaps the known beginning is taken, anything else is not."""
    scores, known = PromptScores(IDS), 0
    for start, count in [*starts, (1, LAST)]:
        count = min(count if (start, count) != (1, LAST) else LAST, LAST + 1 - start)
        taken = scores.push(start, chunk(start, count, num_top))
        assert taken == (start - 1 <= known < start - 1 + count)
        known = max(known, start - 1 + count) if taken else known
        assert scores.complete == (known == LAST) and scores.num_values == known * (1 + num_top)
    assert scores.at(0, num_top) is None
    for p in range(1, LAST + 1):
        top = tuple(-p / 2 ** (i + 1) for i in range(num_top))
        assert scores.at(p, num_top) == TokenLogprobs(-p, tuple(range(p, p + num_top)), top)
        assert scores.at(p, 1) == TokenLogprobs(-p, (p,)[:num_top], top[:1])


def test_one_token_has_nothing_to_score() -> None:
    scores = PromptScores([5])
    assert scores.complete and scores.at(0, 3) is None and not scores.push(1, chunk(1, 1))
    assert not PromptScores(IDS).push(1, chunk(1, LAST + 1))


@settings(max_examples=150, deadline=None)
@given(st.text(alphabet="the catsdog🎉é漢!  ", max_size=40))
def test_offsets_are_where_the_text_has_the_token(text: str) -> None:
    ids = TOKENIZER.encode(text)
    offsets = [*token_offsets(TOKENIZER, ids, text), len(text)]
    shown = [text[a:b] for a, b in zip(offsets, offsets[1:], strict=False)]
    assert "".join(shown) == text[offsets[0] :] and (not ids or offsets[0] == 0)
    for token, piece in zip(ids, shown, strict=True):
        spelled = TOKENIZER.token_text(token)
        assert piece == spelled or "\ufffd" in spelled
    output = Assembler(TOKENIZER)
    output.push(ids, [TokenLogprobs(0.0, (), ())] * len(ids))
    output.end("length")
    piece_ = output.take()
    assert piece_ is not None and [entry.offset for entry in piece_.entries] == offsets[:-1], "as in an output"


@pytest.mark.parametrize("tokenizer", [TOKENIZER, Tokenizer(metaspace(), {})], ids=["byte-level", "metaspace"])
def test_special_tokens_count_where_the_text_has_them(tokenizer: Tokenizer) -> None:
    words = tokenizer.encode("the cat", add_special_tokens=False)
    plain = token_offsets(tokenizer, words, "the cat")
    assert plain[0] == 0 and plain == sorted(plain) and plain[-1] < 7
    assert token_offsets(tokenizer, [0, *words, EOS], "the cat") == [0, *plain, 7], "put there by the tokenizer: not in the text"
    assert token_offsets(TOKENIZER, [0, *TOKENIZER.encode("the")], "<s>the")[:2] == [0, 3], "written by the client"


def test_nothing_is_shown_before_the_prompt_is_scored() -> None:
    scores = PromptScores(IDS)
    first, second = Assembler(TOKENIZER, IDS, scores=scores), Assembler(TOKENIZER, IDS, stop=["cat"], scores=scores)
    second.push(TOKENIZER.encode(" cat"))
    assert second.finish == "stop" and not second.has_news and second.take() is None
    scores.push(1, chunk(1, LAST - 1))
    assert not second.has_news
    scores.push(LAST, chunk(LAST, 1))
    delta = second.take()
    assert delta is not None and delta.finish == "stop" and delta.scores is scores and second.take() is None
    assert first.take() is None
    for text, expected in ((" on", scores), (" the", None)):
        first.push(TOKENIZER.encode(text))
        delta = first.take()
        assert delta is not None and delta.scores is expected, "with the first piece only"


def test_the_first_token_of_a_prompt_has_null() -> None:
    scores = PromptScores(IDS)
    scores.push(1, chunk(1, LAST))
    shape = completion_logprobs(scores.entries(TOKENIZER, "the cat sat on the mat", 1), SPELL)
    assert shape["token_logprobs"] == [None, *(-float(p) for p in range(1, LAST + 1))] and shape["top_logprobs"][0] is None
    assert all(len(shape[name]) == len(IDS) for name in shape) and "".join(shape["tokens"]) == "the cat sat on the mat"
    (entry,) = prompt_logprobs(scores, [3], 2, TOKENIZER)
    text = TOKENIZER.token_text
    assert entry == {
        "3": {"logprob": -1.5, "rank": 1, "decoded_token": text(3)},
        "4": {"logprob": -0.75, "rank": 2, "decoded_token": text(4)},
        str(IDS[3]): {"logprob": -3.0, "rank": None, "decoded_token": text(IDS[3])},
    }
    assert prompt_logprobs(scores, range(2), 0, TOKENIZER)[0] is None


def test_alternatives_that_are_spelled_alike_are_all_there() -> None:
    """Parts of characters by their bytes, whole tokens of one text by their ids; the chosen one has its name in `tokens`."""
    parts = [token for token in range(300) if TOKENIZER.token_text(token) == "\ufffd"][:20]
    chosen = TOKENIZER.encode(" 🎉")[1]
    shape = completion_logprobs([TokenEntry(chosen, 0, TokenLogprobs(-9.0, tuple(parts), (-1.0,) * 20))], SPELL)
    assert shape["tokens"] == ["bytes:\\xf0"] and len(shape["top_logprobs"][0]) == len({*parts, chosen}) >= 20
    assert shape["top_logprobs"][0][shape["tokens"][0]] == -9.0
    metaspaced = Tokenizer(metaspace(), {})
    letter, piece, far = 4 + ord("s"), metaspaced.encode("cats")[-1], 9999
    assert metaspaced.token_text(letter) == metaspaced.token_text(piece) == "s"
    (top,) = completion_logprobs(
        [TokenEntry(letter, 0, TokenLogprobs(-2.0, (piece, letter, far, far + 1), (-1.0, -2.0, -3.0, -4.0)))],
        partial(spelled, tokenizer=metaspaced),
    )["top_logprobs"]
    assert top == {"s": -2.0, f"token_id:{piece}": -1.0, "": -3.0, f"token_id:{far + 1}": -4.0}


def test_bytes_are_named_so_that_they_can_be_read_back() -> None:
    rust = byte_level()
    rust.add_tokens(["Ġ\\Ã"])
    tokenizer = Tokenizer(rust, {})
    assert spelled(tokenizer.vocab_size - 1, tokenizer) == "bytes: \\x5c\\xc3"
    assert spelled(TOKENIZER.encode("the")[0], TOKENIZER) == "the"


def test_the_likeliest_by_the_mean_of_their_tokens() -> None:
    def piece(*values: float) -> OutputDelta:
        return OutputDelta("", [], [TokenEntry(5, 0, TokenLogprobs(value, (), ())) for value in values], len(values), "length")

    long, short, equal, never = piece(-1.0, -1.0, -1.0), piece(-2.0), piece(-1.5, -0.5), piece(-math.inf, 0.0)
    assert likeliest([short, never, long, equal], 3) == [long, equal, short]
    assert likeliest([equal, long], 1) == [equal], "of equals the first"
