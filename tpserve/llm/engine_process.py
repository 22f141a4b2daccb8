"""The process through which an `LLM` has its ranks: the agent of all ranks, or under torchrun the rank in the script's own place.

Owns the process and the thread that started it and waits for it. Invariant: the child never outlives this process. The kernel
kills it when the *thread* that started it ends, which is why it has one of its own and is not started by the caller's.
"""

import contextlib
import subprocess
import threading
from collections.abc import Mapping, Sequence


class EngineProcess:
    """A running process; its session is its own, so that Ctrl-C in a terminal does not reach it."""

    def __init__(self, command: Sequence[str], environ: Mapping[str, str], said: bytes = b"") -> None:
        """Start it and write `said` to its stdin. OSError when it cannot be started."""
        self.code: int | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._error: OSError | None = None
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._live, args=(command, environ, said), name="tpserve child", daemon=True)
        self._thread.start()
        self._started.wait()
        if self._error is not None:
            raise self._error

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def wait(self, timeout_s: float) -> None:
        """Wait for its end, so long at most."""
        self._thread.join(timeout_s)

    def end(self, timeout_s: float) -> None:
        """Ask it to end and wait for that; after `timeout_s` kill it."""
        if self._process is not None:
            self._process.terminate()
        self._thread.join(timeout_s)
        if self._thread.is_alive() and self._process is not None:
            self._process.kill()
            self._thread.join()

    def _live(self, command: Sequence[str], environ: Mapping[str, str], said: bytes) -> None:
        try:
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, env=environ, start_new_session=True)
        except OSError as error:
            self._error = error
            return
        finally:
            self._started.set()
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError), self._process.stdin:
            self._process.stdin.write(said)
        self.code = self._process.wait()
