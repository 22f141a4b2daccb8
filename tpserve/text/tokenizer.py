"""The model's tokenizer: text to ids and back.

Owns the choice of the vocabulary file: tokenizer.json, else SentencePiece's tokenizer.model, else vocab.json with merges.txt;
each with the tokens that the directory's JSON files add. Never knows requests, stop strings or chat templates.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tokenizers import Tokenizer as RustTokenizer
from tokenizers import processors

from tpserve.errors import UserError
from tpserve.text import byte_level, sentencepiece
from tpserve.text.byte_level import BYTE_OF
from tpserve.text.stream import ByteLevelStream, PieceStream, TextStream, num_open_bytes, num_open_run
from tpserve.text.tokenizer_config import CONFIG, SPECIAL, TokenizerConfig, Vocabulary

BYTE_TOKENS = ("<0x%02X>", "<0x%02x>")
FILE = "tokenizer.json"
_BYTES = {**dict.fromkeys(range(256), "\ufffd"), **{ord(char): chr(byte) for char, byte in BYTE_OF.items()}}
"""The characters of byte-level pieces, to those that Latin-1 encodes as their bytes; U+FFFD for others that it knows."""
_OTHER = re.compile(r"tokenizer|vocab|merges|tekken|tiktoken|spiece|spm")
"""Files that may hold a tokenizer of another kind."""


class TooManyTokens(Exception):
    """A text has more tokens than the limit; `count`: how many."""

    def __init__(self, count: int) -> None:
        super().__init__(f"{count} tokens")
        self.count = count


class Tokenizer:
    """A loaded tokenizer. Immutable; `encode` releases the interpreter lock."""

    def __init__(self, rust: RustTokenizer, special: dict[str, str], config: Mapping[str, Any] = MappingProxyType({})) -> None:
        self._rust = rust
        self.special_tokens = special
        """Special tokens by their role ("bos_token": "<s>"), as chat templates see them."""
        self.config = config
        """What tokenizer_config.json says."""
        self.longest_token_chars = max((len(piece) for piece in rust.get_vocab()), default=1)
        decoders = decoder_types(rust)
        self._byte_level = "ByteLevel" in decoders
        spelled = ((rust.token_to_id(form % byte), byte) for form in BYTE_TOKENS for byte in range(256))
        self._byte_of = {} if self._byte_level else {token: byte for token, byte in spelled if token is not None}
        self._run_bytes = self._byte_of if "ByteFallback" in decoders else {}
        self._special = frozenset(token for token, added in rust.get_added_tokens_decoder().items() if added.special)
        words = (token for token in range(self.vocab_size) if token not in self._byte_of and token not in self._special)
        self._anchor = list(islice((token for token in words if self.decode([token]).strip()), 1))
        self._bytes: dict[int, bytes] = {}
        self._texts: dict[frozenset[int], dict[int, str]] = {}
        """Of byte-level streams: what they skip, and the texts of tokens."""

    @staticmethod
    def load(directory: str | os.PathLike[str]) -> "Tokenizer":
        """Load from a model directory. UserError names the missing or broken file."""
        tokenizer_config = TokenizerConfig.of(Path(directory))
        vocabulary = _vocabulary(tokenizer_config)
        roles = tokenizer_config.roles(vocabulary.roles)
        _add_tokens(vocabulary.rust, tokenizer_config, roles)
        if vocabulary.add_bos is not None:
            _add_bos_and_eos(vocabulary.rust, tokenizer_config, roles, vocabulary.add_bos)
        return Tokenizer(vocabulary.rust, roles, tokenizer_config.config)

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included."""
        return int(self._rust.get_vocab_size(with_added_tokens=True))

    @property
    def bos_token(self) -> str | None:
        """The BOS token's text, None without one."""
        return self.special_tokens.get("bos_token")

    @property
    def eos_token(self) -> str | None:
        """The EOS token's text, None without one."""
        return self.special_tokens.get("eos_token")

    def encode(self, text: str, add_special_tokens: bool = True, at_most: int | None = None) -> list[int]:
        """The ids of `text`. TooManyTokens for more than `at_most`, before the list is built; UserError for invalid Unicode."""
        try:  # only the library's batch call releases the interpreter lock
            (encoding,) = self._rust.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        except TypeError:  # Rust's texts are always UTF-8
            raise UserError("a text holds half of a surrogate pair, which is no character: take it out") from None
        if at_most is not None and len(encoding) > at_most:
            raise TooManyTokens(len(encoding))
        ids: list[int] = encoding.ids
        return ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of `ids`; ids outside the vocabulary have none."""
        return str(self._rust.decode(ids, skip_special_tokens=skip_special_tokens))

    def decode_many(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """As `decode`, for hundreds of ids or more: releases the interpreter lock."""
        return str(self._rust.decode_batch([ids], skip_special_tokens=skip_special_tokens)[0])

    def stream(
        self, prompt: Sequence[int] = (), skip_special_tokens: bool = True, shown: frozenset[int] = frozenset()
    ) -> TextStream:
        """A stream that decodes an output after `prompt`. `shown`: special tokens that it does not skip."""
        skipped = self._special - shown if skip_special_tokens else frozenset[int]()
        if self._byte_level:
            return ByteLevelStream(partial(self._shown_bytes, skipped), prompt, self._texts.setdefault(skipped, {}))
        # no skipped token gets there
        decode = partial(self.decode, skip_special_tokens=False)
        return PieceStream(decode, self._run_bytes, self._anchor, partial(self._hidden, skipped), prompt)

    def num_open(self, ids: Sequence[int], skip_special_tokens: bool = True) -> int:
        """How many ids at the end of `ids` are open: the next ids may change their text."""
        skipped = self._special if skip_special_tokens else frozenset[int]()
        if self._byte_level:
            return num_open_bytes(partial(self._shown_bytes, skipped), ids)
        return num_open_run(self._run_bytes, partial(self._hidden, skipped), ids)

    def is_special(self, token: int) -> bool:
        """Whether `decode` omits the token when `skip_special_tokens` is set."""
        return token in self._special

    def special_within(self, text: str) -> frozenset[int]:
        """The special tokens whose text occurs in `text`."""
        return frozenset(token for token in self._special if (piece := self.piece(token)) and piece in text)

    def _hidden(self, skipped: frozenset[int], token: int) -> bool:
        return token in skipped or self._rust.id_to_token(token) is None

    def _shown_bytes(self, skipped: frozenset[int], token: int) -> bytes:
        return b"" if token in skipped else self.token_bytes(token)

    def token_bytes(self, token: int) -> bytes:
        """The bytes of a token, possibly incomplete UTF-8; empty for an id outside the vocabulary."""
        known = self._bytes.get(token)
        if known is None:
            byte = self._byte_of.get(token)
            known = self._bytes[token] = bytes([byte]) if byte is not None else self._spell(self.piece(token))
        return known

    def token_text(self, token: int) -> str:
        """The text of a single token with its leading space; incomplete characters become U+FFFD."""
        return self.token_bytes(token).decode("utf-8", "replace")

    def id_of(self, piece: str) -> int | None:
        """The id of a token as the vocabulary spells it; None for no such token."""
        id: int | None = self._rust.token_to_id(piece)
        return id

    def piece(self, token: int) -> str:
        """A token as the vocabulary spells it ("Ġcat"); empty for an id outside the vocabulary."""
        return str(self._rust.id_to_token(token) or "")

    def _spell(self, piece: str) -> bytes:
        try:
            if self._byte_level:
                return piece.translate(_BYTES).encode("latin-1")
        except UnicodeEncodeError:  # a character that spells no byte, in an added token
            pass
        return piece.replace("\u2581", " ").encode()


def decoder_types(rust: RustTokenizer) -> set[str]:
    """The type names of the decoder's parts: "ByteLevel", "ByteFallback", ..."""

    def walk(part: Any) -> Iterator[str]:
        if isinstance(part, dict):
            yield str(part.get("type"))
            for child in part.get("decoders", ()):
                yield from walk(child)

    return set(walk(json.loads(rust.to_str()).get("decoder")))


def _vocabulary(tokenizer_config: TokenizerConfig) -> Vocabulary:
    """Read the first kind of vocabulary file that the directory has. UserError for none or a broken one."""
    root = tokenizer_config.directory
    if (root / FILE).is_file():
        return _stored(root / FILE)
    if (root / sentencepiece.FILE).is_file():
        return sentencepiece.load(tokenizer_config)
    if all((root / name).is_file() for name in byte_level.FILES):
        return byte_level.load(tokenizer_config)
    names = sorted(path.name for path in root.iterdir()) if root.is_dir() else []
    others = [name for name in names if _OTHER.search(name) and name not in (CONFIG, SPECIAL)]
    instead = f" (what {', '.join(others)} holds cannot be read)" if others else ""
    raise UserError(
        f"{root} has no tokenizer: neither {FILE}, nor {sentencepiece.FILE}, nor {' with '.join(byte_level.FILES)}{instead}; "
        f"make a {FILE} with transformers' AutoTokenizer.save_pretrained, or name another tokenizer with --tokenizer"
    )


def _stored(path: Path) -> Vocabulary:
    try:
        rust = RustTokenizer.from_file(str(path))
    except Exception as error:  # the Rust library raises bare Exception for every broken file
        raise UserError(f"{path} is no tokenizer: {error}; download the model again") from error
    rust.no_truncation()  # the file may contain truncation and padding settings of its last use
    rust.no_padding()
    return Vocabulary(rust, {}, None)


def _add_tokens(rust: RustTokenizer, tokenizer_config: TokenizerConfig, roles: dict[str, str]) -> None:
    """Add the tokens that only the JSON files contain, and mark special tokens. UserError for an id that is taken."""
    known = {token.content: token for token in rust.get_added_tokens_decoder().values()}
    added = {id: token for id, token in sorted(tokenizer_config.added.items()) if known.get(token.content) != token}
    new = {id: token.content for id, token in added.items() if rust.token_to_id(token.content) is None}
    rust.add_tokens([*added.values(), *(token for token in tokenizer_config.special(roles) if token.content not in known)])
    for id, content in new.items():
        if rust.token_to_id(content) != id:
            raise UserError(
                f"{tokenizer_config.directory / CONFIG}: added token {content!r} wants id {id}, the vocabulary leaves "
                f"{rust.token_to_id(content)} for it"
            )


def _add_bos_and_eos(rust: RustTokenizer, tokenizer_config: TokenizerConfig, roles: dict[str, str], add_bos: bool) -> None:
    """Add BOS before and EOS after each text if the configuration asks for it."""
    config, bos, eos = tokenizer_config.config, roles.get("bos_token"), roles.get("eos_token")
    first = [bos] if bos is not None and config.get("add_bos_token", add_bos) else []
    last = [eos] if eos is not None and config.get("add_eos_token", False) else []
    if first or last:
        pieces = [*(f"{token}:0" for token in first), "$A:0", *(f"{token}:0" for token in last)]
        ids = [(token, rust.token_to_id(token)) for token in dict.fromkeys(first + last)]
        rust.post_processor = processors.TemplateProcessing(single=pieces, special_tokens=ids)
