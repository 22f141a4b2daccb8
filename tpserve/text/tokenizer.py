"""The model's tokenizer: text to ids and back, and the text of an output that is still growing.

Owns which files of a directory make it: tokenizer.json, or else SentencePiece's tokenizer.model, or else vocab.json with
merges.txt; each with the tokens that the JSON files beside it add. Never knows requests, stop strings or chat templates.
Invariants:

    TextStream   the pieces of a stream joined are the text of its ids, however the ids arrive
                 a piece never ends inside a character unless the bytes can no longer become one
                 a step costs the same at any length: the stream decodes a window, never the whole output
"""

import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as RustTokenizer
from tokenizers import processors

from tpserve.errors import UserError
from tpserve.text import byte_level, sentencepiece
from tpserve.text.byte_level import BYTE_OF
from tpserve.text.described import CONFIG, SPECIAL, Description, Vocabulary

REPLACEMENT = "\ufffd"
WINDOW_TOKENS = 8
"""Ids a stream decodes again at each step; older ones are forgotten."""
MAX_HELD_STEPS = 6
"""Steps a stream waits for the rest of a character (UTF-8 has at most three) before it shows what can be no character."""
BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
FILE = "tokenizer.json"
_OTHER = re.compile(r"tokenizer|vocab|merges|tekken|tiktoken|spiece|spm")
"""Files that may hold a tokenizer of another kind."""


class TooManyTokens(Exception):
    """A text has more tokens than were wanted: `count`."""

    def __init__(self, count: int) -> None:
        super().__init__(f"{count} tokens")
        self.count = count


class Tokenizer:
    """A loaded tokenizer. Immutable; `encode` lets other threads run while it works."""

    def __init__(self, rust: RustTokenizer, special: dict[str, str]) -> None:
        self._rust = rust
        self.special_tokens = special
        """Special tokens by their role ("bos_token": "<s>"), as chat templates see them."""
        self.longest_token_chars = max((len(piece) for piece in rust.get_vocab()), default=1)
        self._byte_level = "ByteLevel" in decoder_types(rust)
        self._bytes: dict[int, bytes] = {}

    @staticmethod
    def load(directory: str | os.PathLike[str]) -> "Tokenizer":
        """Load from a model directory. UserError names the missing or broken file."""
        described = Description.of(Path(directory))
        vocabulary = _vocabulary(described)
        roles = described.roles(vocabulary.roles)
        _add_tokens(vocabulary.rust, described, roles)
        if vocabulary.add_bos is not None:
            _frame(vocabulary.rust, described, roles, vocabulary.add_bos)
        return Tokenizer(vocabulary.rust, roles)

    @property
    def vocab_size(self) -> int:
        return int(self._rust.get_vocab_size(with_added_tokens=True))

    @property
    def bos_token(self) -> str | None:
        return self.special_tokens.get("bos_token")

    @property
    def eos_token(self) -> str | None:
        return self.special_tokens.get("eos_token")

    def encode(self, text: str, add_special_tokens: bool = True, at_most: int | None = None) -> list[int]:
        """The ids of `text`. Raises TooManyTokens beyond `at_most`, before a list of them is made."""
        try:  # of the library's calls the one for batches alone lets other threads run
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
        """As `decode`, for hundreds of ids or more: other threads run meanwhile."""
        return str(self._rust.decode_batch([ids], skip_special_tokens=skip_special_tokens)[0])

    def stream(self, prompt: Sequence[int] = (), skip_special_tokens: bool = True) -> "TextStream":
        """The text of an output that follows `prompt`."""
        return TextStream(self, prompt, skip_special_tokens)

    def token_bytes(self, token: int) -> bytes:
        """The bytes a token stands for, whole characters or not; empty for an id outside the vocabulary."""
        known = self._bytes.get(token)
        if known is None:
            known = self._bytes[token] = self._spell(self._rust.id_to_token(token) or "")
        return known

    def token_text(self, token: int) -> str:
        """A token alone as text, its leading space kept; incomplete characters become U+FFFD."""
        return self.token_bytes(token).decode("utf-8", "replace")

    def piece(self, token: int) -> str:
        """A token as the vocabulary spells it ("Ġcat"); empty for an id outside the vocabulary."""
        return str(self._rust.id_to_token(token) or "")

    def _spell(self, piece: str) -> bytes:
        if self._byte_level and all(char in BYTE_OF for char in piece):
            return bytes(BYTE_OF[char] for char in piece)
        if match := BYTE_TOKEN.fullmatch(piece):
            return bytes.fromhex(match[1])
        return piece.replace("\u2581", " ").encode()


class TextStream:
    """Ids in, text out. `step` returns the characters that became certain, `flush` the rest at the end.

        window    [ context, its text is `shown` | fresh, not shown yet ]

    A token decodes differently after another than alone (a word's leading space), so some context always stays.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._window = list(prompt[-WINDOW_TOKENS:])
        # The output may complete a character that the prompt's last token began.
        self._shown = tokenizer.decode(self._window, skip_special_tokens).rstrip(REPLACEMENT)
        self._fresh = 0
        self._held_steps = 0

    def step(self, token: int) -> str:
        self._window.append(token)
        self._fresh += 1
        text = self._tokenizer.decode(self._window, self._skip)
        if text.endswith(REPLACEMENT) and self._held_steps < MAX_HELD_STEPS:
            self._held_steps += 1
            return ""
        return self._show(text)

    def flush(self) -> str:
        return self._show(self._tokenizer.decode(self._window, self._skip)) if self._fresh else ""

    def _show(self, text: str) -> str:
        self._held_steps = 0
        # A decoder may rewrite what it said before (clean-up of spaces); what was shown cannot be taken back.
        same = len(self._shown)
        while not text.startswith(self._shown[:same]):
            same -= 1
        new = text[same:]
        if not new:
            if self._fresh > WINDOW_TOKENS:  # ids without text, one after another: special ones, or outside the vocabulary
                self._window.pop()
                self._fresh -= 1
            return ""
        if len(self._window) > WINDOW_TOKENS:
            del self._window[: -self._fresh]
            text = self._tokenizer.decode(self._window, self._skip)
        self._fresh = 0
        self._shown = text
        return new


def decoder_types(rust: RustTokenizer) -> set[str]:
    """Names of the decoder's parts: "ByteLevel", "ByteFallback", ..."""

    def walk(part: Any) -> Iterator[str]:
        if isinstance(part, dict):
            yield str(part.get("type"))
            for child in part.get("decoders", ()):
                yield from walk(child)

    return set(walk(json.loads(rust.to_str()).get("decoder")))


def _vocabulary(described: Description) -> Vocabulary:
    """From the first kind of file that the directory has. UserError when it has none, or a broken one."""
    root = described.directory
    if (root / FILE).is_file():
        return _stored(root / FILE)
    if (root / sentencepiece.FILE).is_file():
        return sentencepiece.load(described)
    if all((root / name).is_file() for name in byte_level.FILES):
        return byte_level.load(described)
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
    rust.no_truncation()  # the settings of whoever saved it last
    rust.no_padding()
    return Vocabulary(rust, {}, None)


def _add_tokens(rust: RustTokenizer, described: Description, roles: dict[str, str]) -> None:
    """Add what stands in the JSON files only, and mark what is special. UserError when an id there cannot be had."""
    known = {token.content: token for token in rust.get_added_tokens_decoder().values()}
    added = {id: token for id, token in sorted(described.added.items()) if known.get(token.content) != token}
    new = {id: token.content for id, token in added.items() if rust.token_to_id(token.content) is None}
    rust.add_tokens([*added.values(), *(token for token in described.special(roles) if token.content not in known)])
    for id, content in new.items():
        if rust.token_to_id(content) != id:
            raise UserError(
                f"{described.directory / CONFIG}: added token {content!r} wants id {id}, the vocabulary leaves "
                f"{rust.token_to_id(content)} for it"
            )


def _frame(rust: RustTokenizer, described: Description, roles: dict[str, str], add_bos: bool) -> None:
    """Let a text begin with BOS and end with EOS where that is asked for."""
    said, bos, eos = described.config, roles.get("bos_token"), roles.get("eos_token")
    first = [bos] if bos is not None and said.get("add_bos_token", add_bos) else []
    last = [eos] if eos is not None and said.get("add_eos_token", False) else []
    if first or last:
        pieces = [*(f"{token}:0" for token in first), "$A:0", *(f"{token}:0" for token in last)]
        ids = [(token, rust.token_to_id(token)) for token in dict.fromkeys(first + last)]
        rust.post_processor = processors.TemplateProcessing(single=pieces, special_tokens=ids)
