"""The model's tokenizer: text to ids and back, and the text of an output that is still growing.

Owns `tokenizer.json` and what `tokenizer_config.json` adds to it (added tokens, bos and eos). Never knows requests, stop
strings or chat templates. Invariants:

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

from tokenizers import AddedToken
from tokenizers import Tokenizer as RustTokenizer

from tpserve.errors import UserError

REPLACEMENT = "\ufffd"
WINDOW_TOKENS = 8
"""Ids a stream decodes again at each step; older ones are forgotten."""
MAX_HELD_STEPS = 6
"""Steps a stream waits for the rest of a character (UTF-8 has at most three) before it shows what can be no character."""
BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; an absent file is an empty one. UserError when the file is there and broken."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}; download the model again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object; download the model again")
    return content


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
        path = Path(directory) / "tokenizer.json"
        if not path.is_file():
            raise UserError(
                f"{path} is missing; save one with AutoTokenizer.save_pretrained, or name a tokenizer with --tokenizer"
            )
        try:
            rust = RustTokenizer.from_file(str(path))
        except Exception as error:  # the Rust library raises bare Exception for every broken file
            raise UserError(f"{path} is no tokenizer: {error}; download the model again") from error
        config = read_json(path.with_name("tokenizer_config.json"))
        add_tokens(rust, config.get("added_tokens_decoder") or {}, path.with_name("tokenizer_config.json"))
        return Tokenizer(rust, special_tokens(config))

    @property
    def vocab_size(self) -> int:
        return int(self._rust.get_vocab_size(with_added_tokens=True))

    @property
    def bos_token(self) -> str | None:
        return self.special_tokens.get("bos_token")

    @property
    def eos_token(self) -> str | None:
        return self.special_tokens.get("eos_token")

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return list(self._rust.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of `ids`; ids outside the vocabulary have none."""
        return str(self._rust.decode(ids, skip_special_tokens=skip_special_tokens))

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


def add_tokens(rust: RustTokenizer, added: dict[str, Any], path: Path) -> None:
    """Add the tokens that stand in tokenizer_config.json only. UserError when an id there cannot be had."""
    for key, entry in sorted(added.items(), key=lambda item: int(item[0])):
        content = entry["content"]
        if rust.token_to_id(content) is not None:
            continue
        flags = {name: bool(entry.get(name)) for name in ("single_word", "lstrip", "rstrip", "normalized", "special")}
        token = AddedToken(content, **flags)
        rust.add_special_tokens([token]) if flags["special"] else rust.add_tokens([token])
        if rust.token_to_id(content) != int(key):
            raise UserError(
                f"{path}: added token {content!r} wants id {key}, tokenizer.json leaves {rust.token_to_id(content)} for it"
            )


def special_tokens(config: dict[str, Any]) -> dict[str, str]:
    """Special tokens by role; older files spell them as objects with `content`."""
    found = {name: config.get(name) for name in SPECIAL_NAMES}
    texts = {name: value.get("content") if isinstance(value, dict) else value for name, value in found.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def byte_alphabet() -> dict[str, int]:
    """The characters that byte-level BPE writes for bytes (GPT-2, Radford et al. 2019): printable ones stand for themselves,
    the others are moved above 255 in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(moved)}


BYTE_OF = byte_alphabet()
