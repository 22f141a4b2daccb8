"""The text of a growing output is what the tokenizers library decodes of all its ids, whatever kind of tokenizer a model has."""

from array import array
from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models
from tokenizers import Tokenizer as RustTokenizer

from tests.http.tiny_tokenizer import byte_level
from tpserve.text.assembler import Assembler, OutputDelta
from tpserve.text.logprob_entries import PromptScores, token_offsets
from tpserve.text.stream import MAX_RUN_BYTES, split_utf8
from tpserve.text.tokenizer import Tokenizer
from tpserve.types.plan import PromptLogprobs, TokenLogprobs

SPECIAL = ["<unk>", "<s>", "</s>"]
PIECES = ["▁", "▁the", "▁cat", "s", "▁▁", "é", "漢", "a", "\ufffd", ".", "##s", "the</w>"]
CHARACTERS = ["é", "漢", "🎉", "a", " ", "\n", "\ufffd"]


def pieces(decoder: decoders.Decoder, *, unigram: bool = False) -> RustTokenizer:
    """A vocabulary of pieces and byte tokens, with special and added tokens."""
    vocab = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *PIECES]
    if unigram:
        rust = RustTokenizer(models.Unigram([(piece, -1.0) for piece in vocab], 0, True))
    else:
        ids = {piece: id for id, piece in enumerate(vocab)}
        rust = RustTokenizer(models.BPE(ids, [], byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    rust.decoder = decoder
    rust.add_special_tokens(list(SPECIAL))
    rust.add_tokens([AddedToken(text, normalized=False) for text in ("<tool>", " x y", "Ã©")])
    return rust


def with_added(rust: RustTokenizer) -> RustTokenizer:
    rust.add_tokens([AddedToken(text, normalized=False) for text in ("<tool>", "Ãé漢", "Ã©")])
    return rust


PARTS: list[decoders.Decoder] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
TOKENIZERS = {
    "byte-level": Tokenizer(with_added(byte_level()), {}),
    "llama 2": Tokenizer(pieces(decoders.Sequence([*PARTS, decoders.Strip(" ", 1, 0)])), {}),
    "gemma": Tokenizer(pieces(decoders.Sequence(PARTS)), {}),
    "unigram": Tokenizer(pieces(decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()]), unigram=True), {}),
    "metaspace": Tokenizer(pieces(decoders.Metaspace(), unigram=True), {}),
    "word piece": Tokenizer(pieces(decoders.WordPiece()), {}),
    "suffix": Tokenizer(pieces(decoders.BPEDecoder("</w>")), {}),
}
ALL = pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS.keys())
FALLBACK = [TOKENIZERS[name] for name in ("llama 2", "gemma", "unigram")]
LLAMA, BYTES = TOKENIZERS["llama 2"], TOKENIZERS["byte-level"]


def spelled(tokenizer: Tokenizer, data: bytes) -> list[int]:
    """One token a byte."""
    if tokenizer is BYTES:
        alone = {tokenizer.token_bytes(id): id for id in reversed(range(300))}
        return [alone[bytes([byte])] for byte in data]
    return [len(SPECIAL) + byte for byte in data]


PART = st.one_of(
    st.tuples(st.sampled_from(CHARACTERS), st.integers(1, 4)).map(lambda pair: pair[0].encode()[: pair[1]]),  # whole or cut
    st.integers(0, 255).map(lambda byte: bytes([byte])),
    st.integers(0, len(PIECES) + 2),
    st.sampled_from([-1, -2, -3, -4]),
)
PARTS_ = st.lists(PART, max_size=10)


def ids_of(tokenizer: Tokenizer, parts: Sequence[bytes | int]) -> list[int]:
    """Bytes, pieces counted from the vocabulary's end, special tokens and one outside the vocabulary."""
    found = list[int]()
    for part in parts:
        if isinstance(part, bytes):
            found += spelled(tokenizer, part)
        else:
            found.append(tokenizer.vocab_size - 1 - part if part >= 0 else (-part - 1 if part > -4 else tokenizer.vocab_size + 7))
    return found


def streamed(tokenizer: Tokenizer, ids: Sequence[int], prompt: Sequence[int] = (), skip: bool = True) -> str:
    stream = tokenizer.stream(prompt, skip)
    text = "".join([stream.step(token) for token in ids]) + stream.flush()
    assert stream.chars == len(text) and len(stream.offsets) == len(ids)
    assert stream.offsets == sorted(stream.offsets) and all(0 <= offset <= len(text) for offset in stream.offsets)
    return text


@ALL
@settings(max_examples=60, deadline=None)
@given(parts=PARTS_, skip=st.booleans())
def test_a_stream_is_the_decoding_of_all_ids(tokenizer: Tokenizer, parts: list[bytes | int], skip: bool) -> None:
    ids = ids_of(tokenizer, parts)
    assert streamed(tokenizer, ids, skip=skip) == tokenizer.decode(ids, skip)


@ALL
@settings(max_examples=60, deadline=None)
@given(before=PARTS_, parts=PARTS_, skip=st.booleans())
def test_an_echoed_prompt_and_its_output_are_the_decoding_of_both(
    tokenizer: Tokenizer, before: list[bytes | int], parts: list[bytes | int], skip: bool
) -> None:
    prompt, ids = ids_of(tokenizer, before), ids_of(tokenizer, parts)
    closed = len(prompt) - tokenizer.num_open(prompt, skip)
    echoed = tokenizer.decode(prompt[:closed], skip)
    assert echoed + streamed(tokenizer, prompt[closed:] + ids, prompt[:closed], skip) == tokenizer.decode(prompt + ids, skip)


@ALL
@settings(max_examples=60, deadline=None)
@given(before=PARTS_, parts=PARTS_, skip=st.booleans())
@example(before=["漢".encode()[:2]], parts=["漢".encode()[2:], b"a"], skip=True)
def test_an_output_is_what_it_adds_to_its_prompt(
    tokenizer: Tokenizer, before: list[bytes | int], parts: list[bytes | int], skip: bool
) -> None:
    prompt, ids = ids_of(tokenizer, before), ids_of(tokenizer, parts)
    shown, whole = tokenizer.decode(prompt, skip), tokenizer.decode(prompt + ids, skip)
    if whole.startswith(shown) and not shown.endswith("\ufffd") and shown.strip():
        assert streamed(tokenizer, ids, prompt, skip) == whole[len(shown) :]


@pytest.mark.parametrize("tokenizer", [BYTES, LLAMA], ids=["byte-level", "llama 2"])
def test_a_character_that_the_prompt_begins_is_the_outputs(tokenizer: Tokenizer) -> None:
    first, second, third = spelled(tokenizer, "漢".encode())
    bad = spelled(tokenizer, b"\xff")
    assert streamed(tokenizer, [third], [first, second]) == "漢" == streamed(tokenizer, [second, third], [first])
    assert streamed(tokenizer, bad, [first, second]) == "\ufffd", "of the prompt's bytes nothing is repeated"
    assert streamed(tokenizer, bad, [first, second, third]) == "\ufffd"
    assert streamed(tokenizer, bad, bad) == "\ufffd" and streamed(tokenizer, [], [first]) == ""


@pytest.mark.parametrize("tokenizer", FALLBACK)
def test_one_stray_byte_makes_a_run_invalid_as_a_whole(tokenizer: Tokenizer) -> None:
    ids = [*spelled(tokenizer, "é".encode() + b"\xff"), tokenizer.vocab_size - 4]
    stream = tokenizer.stream()
    assert [stream.step(token) for token in ids[:3]] == ["", "", "\ufffd" * 3] and stream.offsets == [0, 1, 2]
    assert stream.step(ids[0]) == "\ufffd", "nothing is held back of a run that is lost"


def test_a_run_without_an_end_is_held_back_only_so_long() -> None:
    ids = spelled(LLAMA, "漢".encode() * MAX_RUN_BYTES)
    stream = LLAMA.stream()
    shown = [stream.step(token) for token in ids]
    assert max(map(len, shown)) <= MAX_RUN_BYTES // 3 + 1 and "".join(shown) + stream.flush() == "漢" * MAX_RUN_BYTES
    assert stream.offsets == [place // 3 for place in range(len(ids))]


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=12) | PARTS_.map(lambda parts: b"".join(part for part in parts if isinstance(part, bytes))))
def test_invalid_bytes_are_replaced_as_unicode_recommends(data: bytes) -> None:
    found = split_utf8(data, final=True)
    assert "".join(char for char, _ in found) == data.decode(errors="replace")
    assert [end for _, end in found] == sorted({end for _, end in found}) and (not data or found[-1][1] == len(data))


# The assembler


def pushed(assembler: Assembler, ids: Sequence[int], cuts: Sequence[int]) -> list[OutputDelta]:
    """Push `ids` in runs of the lengths `cuts`, one by one after that, taking after each push."""
    at, found = 0, list[OutputDelta | None]()
    for count in [*cuts, *[1] * len(ids)]:
        if at < len(ids) and assembler.finish is None:
            assembler.push(ids[at : at + count], [TokenLogprobs(-1.0, (), ())] * len(ids[at : at + count]))
            at += count
            found.append(assembler.take())
    assembler.end("length")
    return [delta for delta in [*found, assembler.take()] if delta is not None]


STOPS = st.lists(st.sampled_from(["é", "漢a", "a\n", "the", "\ufffd", " c", "🎉", "s."]), max_size=3)


@ALL
@settings(max_examples=60, deadline=None)
@given(PARTS_, PARTS_, st.lists(st.integers(1, 7), max_size=9), STOPS, st.booleans(), st.integers(0, 5))
def test_no_split_changes_an_answer(
    tokenizer: Tokenizer,
    before: list[bytes | int],
    parts: list[bytes | int],
    cuts: list[int],
    stop: list[str],
    skip: bool,
    minimum: int,
) -> None:
    prompt, ids = ids_of(tokenizer, before), ids_of(tokenizer, parts)
    closed = len(prompt) - tokenizer.num_open(prompt, skip)

    def run(cuts: Sequence[int]) -> tuple[Assembler, list[OutputDelta]]:
        assembler = Assembler(
            tokenizer, prompt, stop=stop, skip_special_tokens=skip, min_tokens=minimum, num_open=len(prompt) - closed
        )
        return assembler, pushed(assembler, ids, cuts)

    assembler, found = run(cuts)
    alone, whole = run([len(ids)] if ids else [])
    text = "".join(delta.text for delta in found)
    assert text == "".join(delta.text for delta in whole)
    assert (assembler.finish, assembler.stop_reason, assembler.num_tokens) == (alone.finish, alone.stop_reason, alone.num_tokens)
    entries = [entry for delta in found for entry in delta.entries]
    assert entries == [entry for delta in whole for entry in delta.entries]
    assert [token for delta in found for token in delta.tokens] == ids[: assembler.num_tokens] == [e.token for e in entries]
    assert found[0].open_offsets == whole[0].open_offsets and len(found[0].open_offsets) == len(prompt) - closed
    expected = tokenizer.decode(prompt[:closed] + prompt[closed:] + ids[: assembler.num_tokens], skip)
    expected = expected[len(tokenizer.decode(prompt[:closed], skip)) :]
    if assembler.finish == "stop":
        assert str(assembler.stop_reason) in stop and expected.startswith(text + str(assembler.stop_reason))
    else:
        assert text == expected and (minimum or not found or not any(s in text[offset_of(entries) :] for s in stop))


def offset_of(entries: Sequence[object]) -> int:
    """Where the output's own tokens begin."""
    return getattr(entries[0], "offset", 0) if entries else 1 << 30


@pytest.mark.parametrize("tokenizer", FALLBACK)
def test_a_stop_string_in_a_run_ends_it_at_once(tokenizer: Tokenizer) -> None:
    ids = spelled(tokenizer, "a漢é🎉".encode())
    assembler = Assembler(tokenizer, ids[:1], stop=["é"])
    found = pushed(assembler, ids[1:], [])
    assert ("".join(delta.text for delta in found), assembler.num_tokens, assembler.stop_reason) == ("漢", 5, "é")


@ALL
@settings(max_examples=100, deadline=None)
@given(PARTS_, st.booleans())
def test_each_token_lies_where_its_offset_says(tokenizer: Tokenizer, parts: list[bytes | int], skip: bool) -> None:
    """What lies between two offsets is the token's own text, where the token is whole characters."""
    ids = ids_of(tokenizer, parts)
    assembler = Assembler(tokenizer, skip_special_tokens=skip)
    found = pushed(assembler, ids, [])
    text = "".join(delta.text for delta in found)
    offsets = [*(entry.offset for delta in found for entry in delta.entries), len(text)]
    assert offsets == sorted(offsets) and (not ids or offsets[0] == 0) and offsets[-1] == len(text)
    for token, (begin, end) in zip(ids, pairwise(offsets), strict=True):
        if tokenizer is BYTES and "\ufffd" not in text[begin:end]:
            assert text[begin:end] in (tokenizer.token_text(token), "") or "\ufffd" in tokenizer.token_text(token)


@pytest.mark.parametrize("tokenizer", [BYTES, LLAMA], ids=["byte-level", "llama 2"])
def test_the_offset_behind_half_a_character_counts_it(tokenizer: Tokenizer) -> None:
    ids = spelled(tokenizer, b"a\xf0b\xf0")
    found = pushed(Assembler(tokenizer), [*ids, 2], [])
    assert [entry.offset for delta in found for entry in delta.entries][:4] == [0, 1, 2, 3]
    assert "".join(delta.text for delta in found) == tokenizer.decode(ids)


@pytest.mark.parametrize("tokenizer", [BYTES, LLAMA], ids=["byte-level", "llama 2"])
def test_open_tokens_of_a_prompt_lie_in_the_output(tokenizer: Tokenizer) -> None:
    prompt, last = spelled(tokenizer, b"s" + "漢".encode()[:2]), spelled(tokenizer, "漢".encode()[2:])
    scores = PromptScores(prompt)
    scores.push(1, PromptLogprobs(0, array("f", [-1.0, -2.0]).tobytes(), b"", b""))
    num_open = tokenizer.num_open(prompt)
    assert num_open == (2 if tokenizer is BYTES else 3), "a run is open as a whole"
    delta = pushed(Assembler(tokenizer, prompt, num_open=num_open), last, [])[0]
    assert delta.text[-1] == "漢" and delta.open_offsets[-2:] == [len(delta.text) - 1] * 2
    echoed = scores.entries(tokenizer, tokenizer.decode(prompt[: 3 - num_open]), 0, num_open)
    assert [entry.token for entry in echoed] == prompt[: 3 - num_open]
    assert [entry.token for entry in scores.open_entries(delta.open_offsets, 0)] == prompt[3 - num_open :]


@pytest.mark.parametrize("tokenizer", [BYTES, LLAMA], ids=["byte-level", "llama 2"])
def test_offsets_in_a_text_that_a_client_sent(tokenizer: Tokenizer) -> None:
    ids = [1, *spelled(tokenizer, "é".encode()), 2, *spelled(tokenizer, "a漢".encode())]
    assert token_offsets(tokenizer, ids, f"é{tokenizer.piece(2)}a漢") == [
        0, 0, 0, 1, 1 + len(tokenizer.piece(2)), *[2 + len(tokenizer.piece(2))] * 3,
    ]  # fmt: skip
