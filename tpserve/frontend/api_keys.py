"""The keys of clients: one from the flags, and those of a file, which is read again when it changes."""

import hmac
import logging
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from tpserve.errors import UserError

logger = logging.getLogger(__name__)

LOOK_S = 1.0
"""How often the file is looked at, at most."""


class ApiKeys:
    """Which keys open the server. Without any, everybody may use it.

    The file has a key on each line; blank lines and those that begin with # are skipped, and what follows a key on its line is a
    comment. A change counts within `LOOK_S`; a file that has become unreadable or empty changes nothing, and the log says so.
    """

    def __init__(self, key: str | None, path: str | None, clock: Callable[[], float] = time.monotonic) -> None:
        """UserError when the file cannot be read, or has no key."""
        self._own = () if key is None else (key,)
        self._path, self._clock = None if path is None else Path(path), clock
        self._of_file: tuple[str, ...] = ()
        self._seen: tuple[int, int, int] | None = None
        self._looked_s = clock()
        if self._path is not None:
            self._of_file, self._seen = self._read(self._path)

    @property
    def required(self) -> bool:
        """Whether a client must have one."""
        return bool(self._own or self._path)

    def has(self, key: str) -> bool:
        """Whether `key` is one of them. Takes as long for every wrong key."""
        self._look()
        found = [same_key(key, each) for each in (*self._own, *self._of_file)]
        return any(found)

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
    def _read(path: Path) -> tuple[tuple[str, ...], tuple[int, int, int]]:
        try:
            version = _version(path)
            keys = tuple(_keys(path.read_text().splitlines()))
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is no text"
            raise UserError(f"--api-key-file {path} cannot be read: {reason}", param="api_key_file") from error
        if not keys:
            raise UserError(f"--api-key-file {path} has no key: write one on each line", param="api_key_file")
        return keys, version


def same_key(sent: str, key: str) -> bool:
    """Whether a client sent this key. Takes as long for every wrong one."""
    return hmac.compare_digest(sent.encode(errors="surrogateescape"), key.encode())


def _keys(lines: Iterable[str]) -> Iterable[str]:
    return (line.split()[0] for line in lines if line.strip() and not line.lstrip().startswith("#"))


def _version(path: Path) -> tuple[int, int, int]:
    """What changes when somebody writes the file, or puts another one in its place."""
    found = path.stat()
    return found.st_ino, found.st_mtime_ns, found.st_size
