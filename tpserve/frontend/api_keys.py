"""The keys of clients: one from the flags, and those of a file with names and limits, which is read again when it changes."""

import hmac
import logging
import re
import time
from collections.abc import Callable, Iterator
from itertools import takewhile
from pathlib import Path

from msgspec import Struct
from msgspec.structs import fields

from tpserve.errors import UserError

logger = logging.getLogger(__name__)

LOOK_S = 1.0
"""How often the file is looked at, at most."""
MAX_DIGITS = 15
NAME = re.compile(r"[\w.:/@-]{1,64}", re.ASCII)


class KeyLimits(Struct, frozen=True, omit_defaults=True):
    """What the keys of one name may use together; None: as much as they like. Tokens are those of prompts and outputs."""

    max_parallel_requests: int | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    tokens_per_day: int | None = None


class KeyOwner(Struct, frozen=True):
    """Whose a key is: its name, by which the log and the metrics know it, and the limits of that name."""

    name: str
    limits: KeyLimits


NO_LIMITS = KeyLimits()
NOBODY = KeyOwner("", NO_LIMITS)
"""The owner of a key without a name."""
LIMITS = tuple(field.name for field in fields(KeyLimits))


class ApiKeys:
    """Which keys open the server. Without any, everybody may use it.

    The file has a key on each line, and behind it, if it shall have them, `name=NAME` and limits such as
    `tokens_per_minute=100000`. Keys of one name share its limits, which all of its lines give alike. Blank lines are skipped, and
    what follows a word that begins with #; other words behind a key mean nothing. A change counts within `LOOK_S`; a file that
    has become unreadable, empty or wrong changes nothing, and the log says so.
    """

    def __init__(self, key: str | None, path: str | None, clock: Callable[[], float] = time.monotonic) -> None:
        """UserError when the file cannot be read, has no key, or has a line that means nothing."""
        self._own = {} if key is None else {key: NOBODY}
        self._path, self._clock = None if path is None else Path(path), clock
        self._of_file: dict[str, KeyOwner] = {}
        self._seen: tuple[int, int, int] | None = None
        self._looked_s = clock()
        if self._path is not None:
            self._of_file, self._seen = self._read(self._path)

    @property
    def required(self) -> bool:
        """Whether a client must have one."""
        return bool(self._own or self._path)

    def find(self, key: str) -> KeyOwner | None:
        """The owner of `key`; None for a wrong one. Takes as long for every wrong key."""
        self._look()
        found = [owner for each, owner in (*self._own.items(), *self._of_file.items()) if same_key(key, each)]
        return found[-1] if found else None

    def _look(self) -> None:
        """Read the file again when it has changed."""
        now_s = self._clock()
        if self._path is None or now_s - self._looked_s < LOOK_S:
            return
        self._looked_s = now_s
        try:
            if _version(self._path) != self._seen:
                self._of_file, self._seen = self._read(self._path)
                logger.info("%s has changed: %d keys", self._path, len(self._of_file))
        except (OSError, UserError) as error:
            if self._seen is not None:
                logger.error("%s; the keys of before stay", error)
            self._seen = None  # said once; read as soon as it is there

    @staticmethod
    def _read(path: Path) -> tuple[dict[str, KeyOwner], tuple[int, int, int]]:
        try:
            version = _version(path)
            text = path.read_text()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is no text"
            raise UserError(f"--api-key-file {path} cannot be read: {reason}", param="api_key_file") from error
        try:
            owners = dict(_entries(text))
        except ValueError as error:
            raise UserError(f"--api-key-file {path}, {error}", param="api_key_file") from None
        if not owners:
            raise UserError(f"--api-key-file {path} has no key: write one on each line", param="api_key_file")
        return owners, version


def same_key(sent: str, key: str) -> bool:
    """Whether a client sent this key. Takes as long for every wrong one."""
    return hmac.compare_digest(sent.encode(errors="surrogateescape"), key.encode())


def _entries(text: str) -> Iterator[tuple[str, KeyOwner]]:
    """Each key with its owner. ValueError names the line that is wrong, and never the key."""
    by_name: dict[str, KeyLimits] = {}
    for number, line in enumerate(text.splitlines(), 1):
        words = list(takewhile(lambda word: not word.startswith("#"), line.split()))
        if not words:
            continue
        key = words.pop(0)
        if key.partition("=")[0] in ("name", *LIMITS):
            raise ValueError(f"line {number}: the key comes first, its name and limits behind it")
        settings = dict(word.split("=", 1) for word in words if "=" in word)
        name = settings.pop("name", None)
        limits = KeyLimits(**{setting: _limit(setting, value, number) for setting, value in settings.items()})
        if name is not None and not NAME.fullmatch(name):
            raise ValueError(f"line {number}: a name is 1 to 64 letters, digits and . _ : / @ -")
        name = name or ""
        if limits != NO_LIMITS and not name:
            raise ValueError(f"line {number}: a key with limits needs a name, such as name=team-a")
        if by_name.setdefault(name, limits) != limits:
            raise ValueError(f"line {number}: the name {name} has other limits on a line before; keys of one name share them")
        yield key, KeyOwner(name, limits)


def _limit(setting: str, value: str, number: int) -> int:
    if setting not in LIMITS:  # which may be a secret
        raise ValueError(f"line {number}: behind the key there is an unknown setting; there are name, {', '.join(LIMITS)}")
    if not (value.isdecimal() and len(value) <= MAX_DIGITS and int(value)):
        raise ValueError(f"line {number}: {setting} is a whole number above 0")
    return int(value)


def _version(path: Path) -> tuple[int, int, int]:
    """What changes when somebody writes the file, or puts another one in its place."""
    found = path.stat()
    return found.st_ino, found.st_mtime_ns, found.st_size
