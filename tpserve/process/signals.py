"""The signals that end a process of ours, and a rank's first moments, in which they are kept for its control thread.

A Python handler would wait for the main thread to come back from C, so ranks have none: the signals are blocked in every thread
and taken by one that waits for them.
"""

import os
import signal
import threading

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
SAME_SIGNAL_S = 1.0
"""A terminal and an agent both pass the same Ctrl-C on: within this time it is one."""
_POLL_S = 0.1
_taken_over = threading.Event()


def block_signals() -> None:
    """Keep the ending signals for the control thread; call before any other thread starts. Until a `Control` takes them over,
    the first one ends the process, for there is nothing to drain yet. Threads and children inherit the mask."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    threading.Thread(target=_end_on_signal, name="early signals", daemon=True).start()


def take_over() -> None:
    """The control thread takes them from now on."""
    _taken_over.set()


def unblock_signals() -> None:
    """For a process started by a rank, which handles signals in its own way."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def _end_on_signal() -> None:
    while not _taken_over.is_set():
        taken = signal.sigtimedwait(SIGNALS, _POLL_S)
        if taken is not None and not _taken_over.is_set():
            os._exit(0)
        if taken is not None:
            os.kill(os.getpid(), taken.si_signo)  # it was meant for the control thread
