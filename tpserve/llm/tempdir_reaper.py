"""Removes the runtime directory of a caller that was killed. This is a process of its own, run as a script.

Only the caller holds the other end of this process's stdin, so stdin reaches its end when the caller ends in any way. A caller
that closes normally removes the directory itself and writes a word to stdin first. Imports nothing but the standard library.
"""

import shutil
import subprocess
import sys
import time
from pathlib import Path

TIMEOUT_S = 10.0
"""The kernel kills the ranks with the caller, but until then they may create more sockets in the directory."""
RETRY_S = 0.05


class TempdirReaper:
    """The caller's handle. Start it before the directory exists, so that no kill can leave the directory behind."""

    def __init__(self, directory: Path) -> None:
        command = [sys.executable, "-I", "-S", __file__, str(directory)]
        quiet = subprocess.DEVNULL  # a reader of the caller's output must not wait for this process
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=quiet, stderr=quiet, start_new_session=True)

    def close(self) -> None:
        """Tell the process that the directory is gone, and wait until the process has ended."""
        self._process.communicate(b"removed")


def main(directory: Path) -> None:
    """Wait until the caller has ended, and remove `directory` unless the caller has done so."""
    if sys.stdin.buffer.read():
        return
    deadline_s = time.monotonic() + TIMEOUT_S
    while directory.exists() and time.monotonic() < deadline_s:
        shutil.rmtree(directory, ignore_errors=True)
        time.sleep(RETRY_S)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
