"""Takes the runtime directory of a caller away that was killed and could not do it itself. A process of its own, run as a script.

The caller alone holds the other end of our stdin, so that its end, however it comes, is the end of the file here; a caller that
ends as it should says a word first, and sweeps for itself. Nothing but the standard library is imported.
"""

import shutil
import subprocess
import sys
import time
from pathlib import Path

PATIENCE_S = 10.0
"""The ranks, which the kernel kills with the caller, may still be making their sockets."""
PAUSE_S = 0.05


class TempdirReaper:
    """For the caller. Started before the directory is made, it leaves no moment in which one could be left."""

    def __init__(self, where: Path) -> None:
        command = [sys.executable, "-I", "-S", __file__, str(where)]
        quiet = subprocess.DEVNULL  # whoever reads what the caller prints must not wait for us
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=quiet, stderr=quiet, start_new_session=True)

    def end(self) -> None:
        """There is nothing to sweep. Waits for its end."""
        self._process.communicate(b"swept")


def main(where: Path) -> None:
    """Wait for the caller's end, and sweep."""
    if sys.stdin.buffer.read():
        return
    deadline_s = time.monotonic() + PATIENCE_S
    while where.exists() and time.monotonic() < deadline_s:
        shutil.rmtree(where, ignore_errors=True)
        time.sleep(PAUSE_S)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
