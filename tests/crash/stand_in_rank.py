"""A rank without a model for the agent's tests: it writes down what it finds and ends by a signal.

SIGTERM 0, SIGUSR1 1, SIGUSR2 2, SIGHUP 3: the exit codes. argv: the directory for what it finds, and "crash" for an early end.
"""

import os
import signal
import sys
import time
from pathlib import Path

import msgspec

CODES = {signal.SIGTERM: 0, signal.SIGUSR1: 1, signal.SIGUSR2: 2, signal.SIGHUP: 3}


class Found(msgspec.Struct):
    """What a rank finds when it starts."""

    pid: int
    parent: int
    session: int
    threads: int
    descriptors: dict[int, str]
    environ: dict[str, str]
    argv: list[str]
    name: str
    at_s: float
    torch_loaded: bool
    handlers: dict[int, str]


def main(argv: list[str]) -> int:
    signal.pthread_sigmask(signal.SIG_BLOCK, CODES)
    directory = Path(argv[0])
    descriptors = {}
    for link in Path("/proc/self/fd").iterdir():
        try:
            descriptors[int(link.name)] = str(link.readlink())
        except OSError:  # the listing's own
            continue
    handlers = {int(n): str(signal.getsignal(n)) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)}
    threads = len(list(Path("/proc/self/task").iterdir()))
    found = Found(
        os.getpid(), os.getppid(), os.getsid(0), threads, descriptors, dict(os.environ), sys.argv,
        Path("/proc/self/comm").read_text().strip(), time.monotonic(), "torch" in sys.modules, handlers,
    )  # fmt: skip
    draft = directory / f"draft.{os.getpid()}"
    draft.write_bytes(msgspec.json.encode(found))
    number = len(list(directory.glob(f"rank{os.environ['RANK']}.*")))
    draft.rename(directory / f"rank{os.environ['RANK']}.{number}")
    if argv[1:] == ["crash"]:
        return 1
    return CODES[signal.Signals(signal.sigwait(CODES))]
