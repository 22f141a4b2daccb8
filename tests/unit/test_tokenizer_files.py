"""Tokenizers as checkpoints have them, beside the libraries they were made with: vocab.json and merges.txt against transformers
here, tokenizer.model against what `sentencepiece/make.py` recorded."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import models, pre_tokenizers, trainers
from transformers import AutoTokenizer

from tests.http.tiny_tokenizer import WORDS, byte_level
from tests.unit.sentencepiece.make import TEXTS
from tpserve.errors import UserError
from tpserve.text.tokenizer import Tokenizer

MODELS = Path(__file__).parent / "sentencepiece"
RECORDED = json.loads((MODELS / "cases.json").read_text())
BASE = ["<s>", "<pad>", "</s>", "<unk>", "<|endoftext|>"]


def write(directory: Path, **files: Any) -> Path:
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content))
    return directory


def streamed(tokenizer: Tokenizer, ids: list[int]) -> str:
    stream = tokenizer.stream(skip_special_tokens=False)
    return "".join(stream.step(token) for token in ids) + stream.flush()


# vocab.json and merges.txt


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rust = RustTokenizer(models.BPE())
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=BASE, initial_alphabet=alphabet, show_progress=False)
    rust.train_from_iterator([WORDS] * 3, trainer)
    directory = tmp_path_factory.mktemp("trained")
    rust.model.save(str(directory))
    return directory


def entry(content: str, **flags: bool) -> dict[str, Any]:
    return {"__type": "AddedToken", "content": content, **dict.fromkeys(("lstrip", "rstrip", "single_word"), False), **flags}


OPT = {role: entry("</s>", normalized=True) for role in ("bos_token", "eos_token", "unk_token")} | {"pad_token": "<pad>"}
QWEN = {
    "bos_token": None, "eos_token": "<|end|>", "pad_token": "<|endoftext|>", "unk_token": None, "add_bos_token": False,
    "additional_special_tokens": ["<|user|>", "<|end|>"], "tokenizer_class": "Qwen2Tokenizer",
}  # fmt: skip
QWEN_ADDED = [("<|endoftext|>", True), ("<|user|>", True), ("<|end|>", True), ("<tool>", False)]


@pytest.mark.parametrize(
    ("model_type", "config"),
    [
        ("gpt2", None),
        ("gpt2", {"model_max_length": 1024, "tokenizer_class": "GPT2TokenizerFast", "add_prefix_space": True}),
        ("opt", {**OPT, "tokenizer_class": "GPT2Tokenizer", "add_bos_token": True, "add_eos_token": True, "errors": "replace"}),
        ("qwen3", None),
        ("qwen2", QWEN),
    ],
)
def test_vocab_and_merges_are_what_transformers_makes_of_them(
    trained: Path, tmp_path: Path, model_type: str, config: dict[str, Any] | None
) -> None:
    for path in trained.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    write(tmp_path, config={"model_type": model_type})
    if config is not None:
        size = len(json.loads((trained / "vocab.json").read_text()))
        ids = [4, size, size + 1, size + 2]
        listed = {
            str(id): entry(text, special=special, normalized=False) for id, (text, special) in zip(ids, QWEN_ADDED, strict=True)
        }
        write(tmp_path, tokenizer_config={**config, **({"added_tokens_decoder": listed} if config is QWEN else {})})
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path), Tokenizer.load(tmp_path)
    for text in [*TEXTS, "<|endoftext|>x", "it's we'll I'M 123456"]:
        for special in (True, False):
            assert ours.encode(text, special) == theirs.encode(text, add_special_tokens=special), text
        ids = theirs.encode(text)
        for skip in (True, False):
            assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip), text
        assert streamed(ours, ids) == ours.decode(ids, False)
    for role in ("bos_token", "eos_token", "unk_token", "pad_token"):
        assert ours.special_tokens.get(role) == getattr(theirs, role)
    assert ours.vocab_size == len(theirs)


def test_opt_without_a_tokenizer_config_begins_with_its_end(trained: Path, tmp_path: Path) -> None:
    for path in trained.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    ours = Tokenizer.load(write(tmp_path, config={"model_type": "opt"}))
    assert (ours.encode("The cat")[0], ours.piece(2), ours.bos_token, ours.special_tokens["pad_token"]) == (
        2,
        "</s>",
        "</s>",
        "<pad>",
    )


def test_what_cuts_the_words_must_be_known(trained: Path, tmp_path: Path) -> None:
    for path in trained.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    write(tmp_path, config={"model_type": "llama"})
    with pytest.raises(UserError, match=r"vocab\.json and merges\.txt, and neither .* names its class: known are GPT2Tokenizer"):
        Tokenizer.load(tmp_path)
    write(tmp_path, tokenizer_config={"tokenizer_class": "ClvpTokenizer"})
    with pytest.raises(UserError, match=r"tokenizer_config\.json names ClvpTokenizer: known are"):
        Tokenizer.load(tmp_path)
    write(tmp_path, tokenizer_config={"tokenizer_class": "GPT2Tokenizer"})
    (tmp_path / "merges.txt").write_text("#version: 0.2\nx y z\n")
    with pytest.raises(UserError, match=r"vocab\.json and merges\.txt are no byte-level BPE"):
        Tokenizer.load(tmp_path)


# tokenizer.model


def sentencepiece(case: dict[str, Any], directory: Path) -> Tokenizer:
    (directory / "tokenizer.model").write_bytes((MODELS / f"{case['model']}.model").read_bytes())
    return Tokenizer.load(write(directory, **case["files"]))


@pytest.mark.parametrize("case", RECORDED, ids=lambda case: str(case["name"]))
def test_sentencepiece_is_what_was_recorded(case: dict[str, Any], tmp_path: Path) -> None:
    ours = sentencepiece(case, tmp_path)
    for text, ids, plain, whole in case["texts"]:
        assert ours.encode(text) == ids, text
        assert ours.decode(ids, skip_special_tokens=True) == plain, text
        if case["name"] != "unigram":  # there the reference has no begin of text
            assert ours.decode(ids, skip_special_tokens=False) == whole, text
        assert streamed(ours, ids) == ours.decode(ids, False), text


def test_a_placeholder_takes_the_name_that_the_config_gives_it(tmp_path: Path) -> None:
    added = {"4": {"content": "<|tool|>", "special": True}}
    ours = sentencepiece({"model": "gemma", "files": {"tokenizer_config": {"added_tokens_decoder": added}}}, tmp_path)
    assert (ours.piece(4), ours.encode("<|tool|>"), ours.decode([4])) == ("<|tool|>", [2, 4], "")


MODEL = (MODELS / "bpe.model").read_bytes()


def field(number: int, value: "int | bytes") -> bytes:
    """A field of a protocol buffer that is shorter than 128."""
    return bytes([number << 3, value]) if isinstance(value, int) else bytes([number << 3 | 2, len(value)]) + value


PIECE = field(1, field(1, b"<unk>") + b"\x15" + struct.pack("<f", 0.0) + field(3, 2))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (MODEL[:-1], r"tokenizer\.model is no SentencePiece model \(it is cut short\)"),
        (b"IQ== 0\nIg== 1\n", r"no SentencePiece model .* if it is tiktoken's, make a tokenizer\.json"),
        (b"\xff" * 9, "is no SentencePiece model"),
        (b"", r"is no SentencePiece model \(it has no pieces\)"),
        (field(1, field(3, 1)), "is no SentencePiece model"),
        (PIECE + field(2, field(3, b"x")), r"is no SentencePiece model \(field 3 is no number\)"),
        (PIECE + field(2, field(3, 4)), "is not supported: its model type is WORD or CHAR"),
        (PIECE + field(3, field(5, 0)), "is not supported: it does not escape spaces"),
        (PIECE + field(2, b"\xc0\x02\x09"), "is not supported: it has no piece for what is unknown"),
        (PIECE + field(3, field(2, b"\x01")), r"tokenizer\.model cannot be used: "),
    ],
)
def test_a_tokenizer_model_that_is_none(content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(UserError, match=said):
        Tokenizer.load(tmp_path)


# What stands beside them


def test_a_directory_without_a_tokenizer_tells_what_it_has(tmp_path: Path) -> None:
    for name in ("qwen.tiktoken", "tokenizer_config.json", "vocab.json"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(
        UserError, match=r"merges\.txt \(what qwen\.tiktoken, vocab\.json holds cannot be read\); make a tokenizer"
    ):
        Tokenizer.load(tmp_path)


def test_a_text_is_never_cut_or_padded(tmp_path: Path) -> None:
    rust = byte_level()
    whole = rust.encode(WORDS).ids
    for setting in (lambda: rust.enable_truncation(4), lambda: rust.enable_padding(length=500)):
        setting()
        rust.save(str(tmp_path / "tokenizer.json"))
        assert Tokenizer.load(tmp_path).encode(WORDS) == whole


def test_older_files_count_where_the_config_lists_no_tokens(tmp_path: Path) -> None:
    byte_level().save(str(tmp_path / "tokenizer.json"))
    size = byte_level().get_vocab_size()
    write(tmp_path, tokenizer_config={"eos_token": "</s>"}, added_tokens={"<|eot|>": size, "<x>": size + 1},
          special_tokens_map={"eos_token": {"content": "<|eot|>"}, "additional_special_tokens": ["<|more|>"]})  # fmt: skip
    ours = Tokenizer.load(tmp_path)
    assert (ours.eos_token, ours.encode("<|eot|><x><|more|>"), ours.vocab_size) == (
        "<|eot|>",
        [size, size + 1, size + 2],
        size + 3,
    )
    assert ours.decode([size, size + 1, size + 2]) == "<x>"
    write(tmp_path, tokenizer_config={"eos_token": "</s>", "added_tokens_decoder": {}})
    assert (Tokenizer.load(tmp_path).eos_token, Tokenizer.load(tmp_path).vocab_size) == ("</s>", size)


def test_a_token_with_a_role_is_special_whatever_its_entry_says(tmp_path: Path) -> None:
    byte_level().save(str(tmp_path / "tokenizer.json"))
    size = byte_level().get_vocab_size()
    listed = {str(size): {"content": "<|eot|>", "special": False}, str(size + 1): {"content": "<x>", "special": False}}
    ours = Tokenizer.load(write(tmp_path, tokenizer_config={"eos_token": "<|eot|>", "added_tokens_decoder": listed}))
    assert (ours.decode([size, size + 1]), ours.decode([size], skip_special_tokens=False)) == ("<x>", "<|eot|>")


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"tokenizer_config": {"added_tokens_decoder": {"x": {"content": "y"}}}}, "added_tokens_decoder must map ids to tokens"),
        ({"tokenizer_config": {"added_tokens_decoder": {"7": {}}}}, "tokenizer_config.json: added_tokens_decoder must map ids"),
        ({"tokenizer_config": {"added_tokens_decoder": [1]}}, "tokenizer_config.json: added_tokens_decoder must map ids"),
        ({"added_tokens": {"<x>": "7"}}, r"added_tokens\.json: '<x>' must have an id, not '7'"),
        ({"special_tokens_map": []}, r"special_tokens_map\.json holds no JSON object"),
    ],
)
def test_broken_json_files_are_named(files: dict[str, Any], said: str, tmp_path: Path) -> None:
    byte_level().save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match=said):
        Tokenizer.load(write(tmp_path, **files))
