"""A process that imports torch and the engine once and forks agents and ranks from there, so that a new one needs no import.

    python -m tpserve.forkserver DESCRIPTOR PARENT_PID [SHOWN ...]       a caller's `ForkClient.spawn`; SHOWN has no effect
    fork_here()                                                           in a process that has imported everything already

    forkserver --fork--> (intermediate) --fork--> new process
                         replies, ends            waits for its adoption by the caller, becomes what the request says

Owns one end of a socket pair, and nothing else. Never makes a thread, a CUDA call, a ZeroMQ context, a tokenizer or a parallel
region, and never loads the library of CPU kernels: what a fork inherits of these does not work. It dies with its caller.
"""

import contextlib
import ctypes
import fcntl
import gc
import importlib
import logging
import os
import signal
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import NoReturn

import msgspec

from tpserve.config import env
from tpserve.process.fork_client import FIRST_DESCRIPTOR, ForkClient, ForkReply, ForkRequest
from tpserve.process.process_utils import die_with

PRELOADED = ("tpserve.__main__", "tpserve.rank_main", "tpserve.agent.elastic_agent", "tpserve.engine.start")
"""What an agent or a rank imports. The last ones load torch."""
MAX_DESCRIPTORS = 16
_ADOPTION_POLL_S = 0.0005
_PR_SET_NAME = 15
_COMM_BYTES = 15


def main(arguments: list[str]) -> int:
    """Import everything, then fork on request until the caller closes the connection; returns the exit code."""
    descriptor, parent_pid = int(arguments[0]), int(arguments[1])
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    die_with(parent_pid)
    set_name("tpserve forks")
    preload()
    serve_forks(socket.socket(fileno=descriptor))
    return 0


def preload() -> None:
    """Import what forked processes need, without a second thread."""
    env.set_omp_spin()
    gc.disable()  # importing torch makes no garbage, and collections take a sixth of the import time
    with env.one_thread_on_import():
        for module in PRELOADED:
            importlib.import_module(module)
    gc.freeze()  # later collections skip the objects made so far, and so leave their pages shared
    gc.enable()


def fork_here() -> ForkClient:
    """Fork a forkserver off this process, which must have no other thread and be preloaded."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    parent_pid = os.getpid()
    pid = os.fork()
    if pid:
        theirs.close()
        return ForkClient(pid, ours)
    try:
        os.setsid()
        die_with(parent_pid)
        _reset_signals()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        _close_all_but(theirs.fileno())
        set_name("tpserve forks")
        serve_forks(theirs)
    except BaseException:  # the edge of the process
        traceback.print_exc()
    finally:
        os._exit(0)


def serve_forks(connection: socket.socket) -> None:
    """Fork a process for each request until the other end is closed."""
    if (threads := len(list(Path("/proc/self/task").iterdir()))) > 1:
        sys.stderr.write(f"tpserve: warning: the forkserver has {threads} threads, so processes that it forks may hang\n")
    while True:
        data, descriptors, _, _ = socket.recv_fds(connection, 16, MAX_DESCRIPTORS)
        if not data:
            return
        try:
            with open(descriptors[0], "rb", closefd=False) as file:
                request = msgspec.msgpack.decode(file.read(), type=ForkRequest)
            if error := _fork_twice(request, descriptors[1:], connection):
                connection.send(msgspec.msgpack.encode(ForkReply(error=error)))
        finally:
            for descriptor in descriptors:
                os.close(descriptor)


def _fork_twice(request: ForkRequest, descriptors: list[int], connection: socket.socket) -> str:
    """Fork a process that is no child of this one; the intermediate process sends the reply. Returns an error or ""."""
    try:
        intermediate = os.fork()
    except OSError as error:
        return f"cannot fork: {error.strerror}"
    if intermediate:
        _, status = os.waitpid(intermediate, 0)
        return "" if status == 0 else f"the intermediate process ended with {os.waitstatus_to_exitcode(status)}"
    intermediate = os.getpid()
    try:
        pid = os.fork()
        if pid == 0:
            _become(request, descriptors, intermediate)
        connection.send(msgspec.msgpack.encode(ForkReply(pid)))
    except OSError as error:
        connection.send(msgspec.msgpack.encode(ForkReply(error=f"cannot fork: {error.strerror}")))
    finally:
        os._exit(0)


def _become(request: ForkRequest, descriptors: list[int], intermediate: int) -> NoReturn:
    """In the new process: be what `python -m MODULE ARGV` would be. Never returns."""
    code = 1
    try:
        while os.getppid() == intermediate:
            time.sleep(_ADOPTION_POLL_S)
        os.setsid()
        die_with(request.parent_pid)  # only now: adoption would trigger it
        _place(descriptors)
        env.replace_all(request.variables)
        _reset_signals()
        set_name(request.name)
        module = importlib.import_module(request.module)
        sys.argv = [module.__file__ or request.module, *request.argv]
        code = int(module.main(request.argv))
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:  # the edge of the process
        traceback.print_exc()
    finally:
        logging.shutdown()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)


def _place(descriptors: list[int]) -> None:
    """Make the first descriptor stdin and give the others the numbers from `FIRST_DESCRIPTOR` on. Close all else but 1 and 2."""
    high = [fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, FIRST_DESCRIPTOR + MAX_DESCRIPTORS) for descriptor in descriptors]
    os.dup2(high[0], 0)
    for number, descriptor in enumerate(high[1:], FIRST_DESCRIPTOR):
        os.dup2(descriptor, number, inheritable=False)
    _close_all_but(*range(FIRST_DESCRIPTOR, FIRST_DESCRIPTOR + len(high) - 1))


def _close_all_but(*kept: int) -> None:
    """Close all descriptors but those of the standard streams and `kept`."""
    for number in [int(path.name) for path in Path("/proc/self/fd").iterdir()]:
        if number > 2 and number not in kept:
            with contextlib.suppress(OSError):  # the listing's own
                os.close(number)


def _reset_signals() -> None:
    """Handle signals as a new interpreter does."""
    signal.set_wakeup_fd(-1)
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def set_name(name: str) -> None:
    """Set the name that `ps -o comm`, `top` and /proc/PID/comm show; the kernel keeps 15 bytes."""
    ctypes.CDLL(None).prctl(_PR_SET_NAME, name.encode()[:_COMM_BYTES])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
