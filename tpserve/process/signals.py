"""The signals that end a process of tpserve, and their handling in a rank before its control thread starts.

A Python handler runs only when the main thread returns from C, so ranks install none. The signals are blocked in every thread,
and one thread waits for them: a thread of this module at first, the control thread after `take_over`.
"""

import os
import signal
import threading

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
SAME_SIGNAL_S = 1.0
"""A terminal and an agent both forward the same Ctrl-C. Signals within this time count as one."""
_POLL_S = 0.1
_taken_over = threading.Event()


def block_signals() -> None:
    """Block `SIGNALS`; call it before any other thread starts. Threads and child processes inherit the mask.

    Until `take_over` the first signal ends the process with code 0, because there is nothing to drain yet.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    threading.Thread(target=_end_on_signal, name="early signals", daemon=True).start()


def take_over() -> None:
    """Leave the signals to the caller's thread from now on."""
    _taken_over.set()


def unblock_signals() -> None:
    """Unblock `SIGNALS`, in a process that a rank started and that handles them itself."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def _end_on_signal() -> None:
    while not _taken_over.is_set():
        taken = signal.sigtimedwait(SIGNALS, _POLL_S)
        if taken is not None and not _taken_over.is_set():
            os._exit(0)
        if taken is not None:
            os.kill(os.getpid(), taken.si_signo)  # send it again, for the control thread
