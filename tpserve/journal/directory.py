"""The state directory: private to this user, on a local file system, and of one server at a time."""

import ctypes
import fcntl
import os
import stat
import time
from pathlib import Path

from tpserve.errors import UserError

NETWORK_FILE_SYSTEMS = {
    0x6969: "NFS",
    0x517B: "SMB",
    0xFE534D42: "SMB",
    0xFF534D42: "CIFS",
    0x65735546: "FUSE",
    0x00C36400: "Ceph",
    0x0BD00BD0: "Lustre",
    0x5346414F: "AFS",
}
"""By the numbers that statfs(2) reports. Their locks and their shared memory are not those that SQLite needs."""
LOCK = "lock"
LOCK_S, LOCK_POLL_S = 5.0, 0.02
"""A frontend whose server was killed ends by itself within this time."""


def open_directory(where: Path) -> int:
    """Make the directory, or check an existing one, and lock it until this process ends; returns the lock's descriptor.

    UserError when it is not private, on a network file system, or in use by another server.
    """
    try:
        where.mkdir(mode=0o700, parents=True, exist_ok=True)
        facts = where.stat()
    except FileExistsError:
        raise refused(f"{where} is no directory: name another one") from None
    except OSError as error:
        raise refused(f"cannot make {where}: {error.strerror}") from error
    if facts.st_uid != os.getuid() or stat.S_IMODE(facts.st_mode) & 0o077:
        raise refused(f"{where} must be this user's alone, for it holds what clients send: `chmod 700 {where}`, or name another")
    if (name := NETWORK_FILE_SYSTEMS.get(file_system(where))) is not None:
        raise refused(f"{where} is on a network file system ({name}): name a directory on a local disk")
    try:
        lock = os.open(where / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise refused(f"cannot write into {where}: {error.strerror}") from error
    deadline_s = time.monotonic() + LOCK_S
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return lock
        except BlockingIOError:
            if time.monotonic() > deadline_s:
                os.close(lock)
                raise refused(f"{where} is in use by another server: each needs one of its own") from None
        time.sleep(LOCK_POLL_S)


def refused(why: str) -> UserError:
    """The error of a directory that cannot be used."""
    return UserError(f"--state-dir: {why}", param="state_dir")


def file_system(where: Path) -> int:
    """The number of a path's file system; statfs(2) has it in the first word. 0 when it is not known."""
    facts = ctypes.create_string_buffer(512)
    if ctypes.CDLL(None, use_errno=True).statfs(os.fsencode(where), facts):
        return 0
    return ctypes.c_long.from_buffer(facts).value & 0xFFFFFFFF
