"""Decodes a growing output: takes ids, returns text and the offset in the text at which each id begins.

There are two streams with one contract, because tokens spell bytes in two ways. `ByteLevelStream`: every token is a string of
bytes. `PieceStream`: tokens are pieces of text, and a run of byte tokens ("<0xE6>") spells a character that has no piece.
Invariants:

    text     the joined results of `step` and `flush` are the text that the tokenizer decodes from the ids after the prompt
    certain  returned text never changes. A stream holds back an incomplete character, and a run of byte tokens until it ends or
             is invalid UTF-8: the tokenizers library decodes a run as a whole, and an invalid run as one U+FFFD a byte
    bounded  a run ends after MAX_RUN_BYTES; a step decodes one token, or one run, and one token of context
    prompt   the output continues the open tokens at the prompt's end; text that belongs to the prompt alone is not repeated
"""

import codecs
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from typing import Protocol

REPLACEMENT = "\ufffd"
MAX_RUN_BYTES = 256
MAX_CONTEXT = 1024
"""Tokens at the end of a prompt that a stream reads as context."""


class TextStream(Protocol):
    """Decodes the ids of one output.

    `chars`: characters returned so far. `offsets`: for each id in order, the index of the character in which it begins; an id
    whose text is held back has none yet.
    """

    chars: int
    offsets: list[int]

    def step(self, token: int) -> str:
        """Add an id; returns the text that became certain."""

    def skip(self) -> None:
        """Add an id without text."""

    def flush(self) -> str:
        """End the output; returns the text that was held back."""

    @property
    def pending(self) -> str:
        """The text that `flush` would return, if it ends with a complete character; else empty."""


def split_utf8(data: bytes, *, final: bool) -> list[tuple[str, int]]:
    """The characters of `data` as (character, index after its last byte), U+FFFD for each invalid part as Unicode recommends.

    Omits an incomplete character at the end, unless `final`.
    """
    found, at = list[tuple[str, int]](), 0
    while at < len(data):
        bad: UnicodeDecodeError | None = None
        try:
            text = data[at:].decode()
        except UnicodeDecodeError as error:
            text, bad = data[at : at + error.start].decode(), error
        for char in text:
            at += len(char.encode())
            found.append((char, at))
        if bad is not None:
            if not final and bad.reason == "unexpected end of data":
                break
            at += bad.end - bad.start
            found.append((REPLACEMENT, at))
    return found


def num_begun(data: bytes) -> int:
    """Number of bytes of an incomplete character at the end of `data`."""
    characters = split_utf8(data, final=False)
    return len(data) - (characters[-1][1] if characters else 0)


class ByteLevelStream:
    """A stream over tokens that are strings of bytes. `spell`: the bytes of a token, empty for a hidden token.

    `texts`: of tokens that are whole characters; streams with the same `spell` share and fill it.
    """

    def __init__(self, spell: Callable[[int], bytes], prompt: Sequence[int] = (), texts: dict[int, str] | None = None) -> None:
        self.chars = 0
        self.offsets: list[int] = []
        self.pending = ""
        self._spell = spell
        self._texts: dict[int, str] = {} if texts is None else texts
        self._places: list[int] = []
        tail = b"".join(map(spell, prompt[len(prompt) - num_open_bytes(spell, prompt) :]))
        self._begun = tail[len(tail) - num_begun(tail) :]
        self._owed = bool(self._begun)
        """Whether a U+FFFD for the incomplete character would belong to the prompt."""

    def step(self, token: int) -> str:
        if not self._begun and (text := self._whole(token)) is not None:
            self.offsets.append(self.chars)
            self.chars += len(text)
            return text
        data = self._spell(token)
        self._places.append(len(self._begun))
        return self._show(data, final=False) if data else ""

    def skip(self) -> None:
        if self._begun:
            self._places.append(len(self._begun))
        else:
            self.offsets.append(self.chars)

    def flush(self) -> str:
        return self._show(b"", final=True)

    def _whole(self, token: int) -> str | None:
        """The text of a token that is whole characters, as most are; else None."""
        text = self._texts.get(token)
        if text is None:
            with suppress(UnicodeDecodeError):
                text = self._texts[token] = self._spell(token).decode()
        return text

    def _show(self, data: bytes, *, final: bool) -> str:
        data = self._begun + data
        characters = split_utf8(data, final=final)
        rest = characters[-1][1] if characters else 0
        if self._owed and characters:
            first, end = characters[0]
            if first.encode() != data[:end]:
                del characters[0]
            self._owed = False
        self.offsets += [self.chars + sum(end <= place for _, end in characters) for place in self._places]
        self.chars += len(characters)
        self._begun, self._places = data[rest:], []
        return "".join(char for char, _ in characters)


def num_open_bytes(spell: Callable[[int], bytes], ids: Sequence[int]) -> int:
    """How many ids at the end of `ids` contain bytes of an incomplete character; 0 without one."""
    tail, count = b"", 0
    for token in reversed(ids[-MAX_CONTEXT:]):
        tail, count = spell(token) + tail, count + 1
        if len(tail) >= 3:
            break
    begun = num_begun(tail)
    count = num_bytes = 0
    while num_bytes < begun:
        count += 1
        num_bytes += len(spell(ids[-count]))
    return count


class PieceStream:
    """A stream over tokens that are pieces of text.

    `decode`: the tokenizer's decoder. `byte_of`: the byte of each byte token, empty for tokenizers that do not decode runs.
    `anchor`: any token with visible text, the context if there is no other. `hidden`: whether an id has no text.
    """

    def __init__(
        self,
        decode: Callable[[list[int]], str],
        byte_of: Mapping[int, int],
        anchor: Collection[int],
        hidden: Callable[[int], bool],
        prompt: Sequence[int] = (),
    ) -> None:
        self.chars = 0
        self.offsets: list[int] = []
        self._decode = decode
        self._byte_of = byte_of
        self._anchor = list(anchor)
        self._hidden = hidden
        self._run: list[int] = []
        self._data = bytearray()
        self._places: list[int] = []
        self._utf8 = codecs.getincrementaldecoder("utf-8")("strict")
        self._invalid = False
        """Whether the current run is invalid; then each byte is returned at once."""
        self._owed = 0
        """Bytes of the run that belong to the prompt."""
        self._set_before([])
        if prompt:
            self._start_after(prompt[-MAX_CONTEXT:])

    def step(self, token: int) -> str:
        if self._hidden(token):
            self.skip()
            return ""
        byte = self._byte_of.get(token)
        if byte is None:
            text = self._end_run()
            self.offsets.append(self.chars)
            own = self._after([token])
            self._set_before([token])
            self.chars += len(own)
            return text + own
        if self._invalid:
            self.offsets.append(self.chars)
            self.chars += 1
            return REPLACEMENT
        return self._take_byte(token, byte)

    def skip(self) -> None:
        if self._run:
            self._places.append(len(self._data))
        else:
            self.offsets.append(self.chars)

    def flush(self) -> str:
        return self._end_run()

    @property
    def pending(self) -> str:
        return "" if not self._run or self._utf8.getstate()[0] else self._read(len(self._run))[0]

    def _start_after(self, prompt: Sequence[int]) -> None:
        shown = [token for token in prompt if not self._hidden(token)]
        size = num_last_run(self._byte_of, shown)
        begin = len(shown) - size
        words = [token for token in shown[:begin][-1:] if token not in self._byte_of]
        if shown[:begin]:
            self._set_before(words or self._anchor)
        for token in shown[begin:]:
            if self._invalid:
                break
            self._take_byte(token, self._byte_of[token])
        self.chars, self.offsets, self._places, self._owed = 0, [], [], len(self._data)

    def _take_byte(self, token: int, byte: int) -> str:
        self._places.append(len(self._data))
        self._run.append(token)
        self._data.append(byte)
        try:
            self._utf8.decode(bytes([byte]))
        except UnicodeDecodeError:
            text = self._end_run()
            self._invalid = True
            return text
        if len(self._data) < MAX_RUN_BYTES:
            return ""
        text = self._resolve(len(self._data) - len(self._utf8.getstate()[0]))
        self._utf8.reset()
        self._utf8.decode(bytes(self._data))
        return text

    def _end_run(self) -> str:
        text = self._resolve(len(self._data)) if self._run else ""
        self._utf8.reset()
        self._invalid = False
        return text

    def _resolve(self, count: int) -> str:
        """Return the text of the first `count` bytes of the run, and remove them."""
        text, ends, dropped = self._read(count)
        known = sum(place < count or count == len(self._data) for place in self._places)
        self.offsets += [self.chars + max(0, sum(end <= at for end in ends) - dropped) for at in self._places[:known]]
        self.chars += len(text)
        self._places = [place - count for place in self._places[known:]]
        self._owed = max(0, self._owed - count)
        del self._run[:count], self._data[:count]
        if not self._before:
            self._set_before(self._anchor)
        return text

    def _read(self, count: int) -> tuple[str, list[int], int]:
        """The text of the run's first `count` bytes, the end of each character in bytes, and how many characters the text omits.

        The text omits characters that belong to the prompt, and a leading space that the decoder strips.
        """
        data, text = bytes(self._data[:count]), self._after(self._run[:count])
        try:
            data.decode()
            ends = [end for _, end in split_utf8(data, final=True)]
        except UnicodeDecodeError:
            ends = list(range(1, count + 1))
        stripped = max(0, len(ends) - len(text))
        own = sum(end <= self._owed for end in ends)
        return text[max(0, own - stripped) :], ends, max(own, stripped)

    def _set_before(self, ids: list[int]) -> None:
        self._before, self._before_text = ids, self._decode(ids) if ids else ""

    def _after(self, ids: list[int]) -> str:
        """The text that `ids` add after the context. Needs a context, since a decoder may treat the first token specially."""
        if not self._before:
            return self._decode(ids)
        text = self._decode(self._before + ids)
        same = len(self._before_text)
        while not text.startswith(self._before_text[:same]):
            same -= 1
        return text[same:]


def num_last_run(byte_of: Mapping[int, int], ids: Sequence[int]) -> int:
    """How many byte tokens at the end of `ids` the next id may change: the last run, or of a longer one its open end."""
    size = 0
    while size < len(ids) and ids[-1 - size] in byte_of:
        size += 1
    if size < MAX_RUN_BYTES:
        return size
    return num_begun(bytes(byte_of[token] for token in ids[len(ids) - MAX_RUN_BYTES :]))


def num_open_run(byte_of: Mapping[int, int], hidden: Callable[[int], bool], ids: Sequence[int]) -> int:
    """How many ids at the end of `ids`, a run of byte tokens and hidden tokens, the next id may change."""
    begin = max(0, len(ids) - MAX_CONTEXT)
    places = [place for place in range(begin, len(ids)) if not hidden(ids[place])]
    size = num_last_run(byte_of, [ids[place] for place in places])
    if not size:
        return 0
    try:
        codecs.getincrementaldecoder("utf-8")().decode(bytes(byte_of[ids[place]] for place in places[-size:]))
    except UnicodeDecodeError:
        return 0
    return len(ids) - places[-size]
