"""Builds a Rust tokenizer from SentencePiece's tokenizer.model (Kudo and Richardson 2018), unigram or BPE.

Owns parsing the file, a protocol buffer of which the fields below are read, and translating its rules. Ids equal those of
transformers with the same file: the dummy prefix goes before the start of a text only, and not before a space (with `legacy`
in tokenizer_config.json: after each special token, too). "Control" pieces are special tokens, "user defined" pieces are never
split, "byte" pieces spell characters that have no piece.

    ModelProto      1 pieces: 1 text, 2 score, 3 type | 2 trainer | 3 normalizer
    TrainerSpec     3 model type, 24 spaces are suffixes, 35 byte fallback, 40 41 42 ids of unk, bos, eos
    NormalizerSpec  2 compiled rules, 3 dummy prefix, 4 extra spaces are removed, 5 spaces become U+2581
"""

import struct
from collections.abc import Iterator, Mapping
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as RustTokenizer

from tpserve.errors import UserError
from tpserve.text.tokenizer_config import TokenizerConfig, Vocabulary

FILE = "tokenizer.model"
SPACE = "\u2581"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
UNIGRAM, BPE = 1, 2
NEVER = -1e6
"""A score so low that the spelling of a byte or control piece never matches in a text."""

ProtoFields = dict[int, list["int | bytes"]]


class VocabPiece(NamedTuple):
    """An entry of the vocabulary. `kind`: one of NORMAL to BYTE."""

    text: str
    score: float
    kind: int


class Model(NamedTuple):
    """The used fields of a tokenizer.model. `roles`: the pieces of unk, bos and eos, if the model has them."""

    pieces: list[VocabPiece]
    unigram: bool
    byte_fallback: bool
    unk_id: int
    roles: Mapping[str, str]
    rules: bytes
    dummy_prefix: bool
    remove_extra_spaces: bool


def load(tokenizer_config: TokenizerConfig) -> Vocabulary:
    """Read the tokenizer.model of a directory. UserError for a broken file or an unsupported kind."""
    path = tokenizer_config.directory / FILE
    model = read(path)
    # A piece of the file may be a placeholder whose text is in tokenizer_config.json.
    for id, token in tokenizer_config.added.items():
        if id < len(model.pieces) and token.content != model.pieces[id].text:
            model.pieces[id] = VocabPiece(token.content, 0.0, CONTROL if token.special else USER_DEFINED)
    config = tokenizer_config.config
    prefix = model.dummy_prefix if config.get("add_prefix_space") is None else bool(config["add_prefix_space"])
    try:
        return Vocabulary(_tokenizer(model, prefix, legacy=bool(config.get("legacy"))), model.roles, add_bos=True)
    except Exception as error:  # the Rust library raises bare Exception
        raise UserError(f"{path} cannot be used: {error}; download the model again") from error


def read(path: Path) -> Model:
    """Parse a tokenizer.model. UserError names the defect."""
    try:
        return _model(_fields(path.read_bytes()), path)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, LookupError, struct.error) as error:
        raise UserError(
            f"{path} is no SentencePiece model ({error or type(error).__name__}); if it is tiktoken's, make a tokenizer.json "
            "with transformers' AutoTokenizer.save_pretrained, or name another tokenizer with --tokenizer"
        ) from None


def _model(proto: ProtoFields, path: Path) -> Model:
    pieces = [_piece(_fields(_bytes(data))) for data in proto.get(1, [])]
    if not pieces:
        raise ValueError("it has no pieces")
    trainer, rules = (_fields(_bytes(proto.get(number, [b""])[-1])) for number in (2, 3))
    kind, unk_id = _int(trainer, 3, UNIGRAM), _int(trainer, 40, 0)
    unsupported = {
        "its model type is WORD or CHAR": kind not in (UNIGRAM, BPE),
        "it treats spaces as suffixes": _int(trainer, 24, 0),
        "it does not escape spaces": not _int(rules, 5, 1),
        "it has no piece for what is unknown": not 0 <= unk_id < len(pieces),
    }
    for what, holds in unsupported.items():
        if holds:
            raise UserError(f"{path} is not supported: {what}; name another tokenizer with --tokenizer")
    ids = {"unk_token": unk_id, "bos_token": _int(trainer, 41, 1), "eos_token": _int(trainer, 42, 2)}
    return Model(
        pieces=pieces,
        unigram=kind == UNIGRAM,
        byte_fallback=bool(_int(trainer, 35, 0)),
        unk_id=unk_id,
        roles={role: pieces[id].text for role, id in ids.items() if 0 <= id < len(pieces)},
        rules=_bytes(rules.get(2, [b""])[-1]),
        dummy_prefix=bool(_int(rules, 3, 1)),
        remove_extra_spaces=bool(_int(rules, 4, 1)),
    )


def _tokenizer(model: Model, prefix: bool, *, legacy: bool) -> RustTokenizer:
    rust = RustTokenizer(_unigram(model) if model.unigram else _bpe(model))
    steps: list[normalizers.Normalizer] = [normalizers.Precompiled(model.rules)] if model.rules else []
    if model.remove_extra_spaces:
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if steps:
        rust.normalizer = normalizers.Sequence(steps)
    # "first" refers to the original text, whose leading spaces the normalizer may have removed.
    scheme = "never" if not prefix else "always" if legacy or model.remove_extra_spaces else "first"
    rust.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme=scheme, split=False)
    parts: list[decoders.Decoder] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    rust.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)] if prefix else parts)
    rust.add_tokens(
        [
            AddedToken(piece.text, normalized=False, special=piece.kind == CONTROL)
            for piece in model.pieces
            if piece.kind in (CONTROL, USER_DEFINED)
        ]
    )
    return rust


def _unigram(model: Model) -> models.Unigram:
    scores = [(text, score if kind in (NORMAL, USER_DEFINED) else NEVER) for text, score, kind in model.pieces]
    return models.Unigram(scores, unk_id=model.unk_id, byte_fallback=model.byte_fallback)


def _bpe(model: Model) -> models.BPE:
    vocab = {piece.text: id for id, piece in enumerate(model.pieces)}
    unk = model.pieces[model.unk_id].text
    return models.BPE(vocab, merges(model.pieces), unk_token=unk, fuse_unk=True, byte_fallback=model.byte_fallback)


def merges(pieces: list[VocabPiece]) -> list[tuple[str, str]]:
    """The pairs of pieces that merge into a piece, in merge order: the best score first."""
    texts = {piece.text for piece in pieces if piece.kind in (NORMAL, USER_DEFINED, UNUSED)}
    found = []
    for id, (text, score, _) in enumerate(pieces):
        if text in texts:
            pairs = ((text[:at], text[at:]) for at in range(1, len(text)))
            found += [(-score, id, len(left), left, right) for left, right in pairs if left in texts and right in texts]
    found.sort(key=itemgetter(0, 1, 2))
    return [(left, right) for *_, left, right in found]


# Protocol buffers: a message is a sequence of (field number and wire type, value)


def _fields(data: bytes) -> ProtoFields:
    """A message's values by field number, in order: varints and float bits as numbers, the rest as bytes."""
    found: ProtoFields = {}
    for number, value in _values(data):
        found.setdefault(number, []).append(value)
    return found


def _values(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield number, value
            continue
        if wire == 2:
            size, at = _varint(data, at)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire}")
        if not number or at + size > len(data):
            raise ValueError("it is cut short")
        yield number, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at


def _piece(fields: ProtoFields) -> VocabPiece:
    (score,) = struct.unpack("<f", _bytes(fields.get(2, [bytes(4)])[-1]))
    return VocabPiece(_bytes(fields[1][-1]).decode(), score, _int(fields, 3, NORMAL))


def _int(fields: ProtoFields, number: int, default: int) -> int:
    """An int32 or a bool; negative ones are written as 64 bits."""
    value = fields.get(number, [default])[-1]
    if not isinstance(value, int):
        raise ValueError(f"field {number} is no number")
    return value - 2**64 if value >= 2**63 else value


def _bytes(value: int | bytes) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError("a number stands for a message")
    return value
