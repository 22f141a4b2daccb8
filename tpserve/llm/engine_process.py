"""The child process of an `LLM`: the agent that starts all ranks, or under torchrun this script's own rank.

Owns the process and the thread that starts it and waits for it. Invariant: the child never outlives this process. The kernel
kills the child when the *thread* that started it ends, so the child has a thread of its own and is not started on the caller's.
"""

import contextlib
import subprocess
import threading
from collections.abc import Mapping, Sequence


class EngineProcess:
    """A running process in a session of its own, so that Ctrl-C in a terminal does not reach it."""

    def __init__(self, command: Sequence[str], environ: Mapping[str, str], stdin: bytes = b"") -> None:
        """Start the process and write `stdin` to its stdin. Raises OSError when it cannot be started."""
        self.exit_code: int | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._error: OSError | None = None
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(command, environ, stdin), name="tpserve child", daemon=True)
        self._thread.start()
        self._started.wait()
        if self._error is not None:
            raise self._error

    @property
    def pid(self) -> int:
        """The process id."""
        assert self._process is not None
        return self._process.pid

    def wait(self, timeout_s: float) -> None:
        """Wait until the process has ended, at most `timeout_s`."""
        self._thread.join(timeout_s)

    def terminate(self, timeout_s: float) -> None:
        """Send SIGTERM and wait until the process has ended; after `timeout_s` kill it."""
        if self._process is not None:
            self._process.terminate()
        self._thread.join(timeout_s)
        if self._thread.is_alive() and self._process is not None:
            self._process.kill()
            self._thread.join()

    def _run(self, command: Sequence[str], environ: Mapping[str, str], stdin: bytes) -> None:
        try:
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, env=environ, start_new_session=True)
        except OSError as error:
            self._error = error
            return
        finally:
            self._started.set()
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError), self._process.stdin:
            self._process.stdin.write(stdin)
        self.exit_code = self._process.wait()
