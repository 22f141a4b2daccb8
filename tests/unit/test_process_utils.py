"""A neighbour that was stopped is ended; one that goes on, or was never stopped, is not."""

import signal
import subprocess
import time

import pytest

from tpserve.process import process_utils


def test_who_is_stopped_for_long_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_utils, "CHECK_S", 0.02)
    monkeypatch.setattr(process_utils, "STOPPED_S", 0.3)
    stopped, resumed, running = (subprocess.Popen(["sleep", "60"]) for _ in range(3))
    told: list[tuple[int, str]] = []
    try:
        named = {child.pid: f"child {i}" for i, child in enumerate((stopped, resumed, running))}
        process_utils.kill_stopped_in_background(lambda: dict(named), lambda pid, what: told.append((pid, what)))
        stopped.send_signal(signal.SIGSTOP)
        while stopped.poll() is None:
            resumed.send_signal(signal.SIGSTOP)
            time.sleep(0.05)
            resumed.send_signal(signal.SIGCONT)
            time.sleep(0.05)
        assert stopped.returncode == -signal.SIGKILL and resumed.poll() is running.poll() is None
        assert told[:1] == [(stopped.pid, f"child 0 (pid {stopped.pid}) has been stopped for 0.3 s")]
        assert {pid for pid, _ in told} == {stopped.pid}
    finally:
        named.clear()
        for child in (resumed, running):
            child.kill()
            child.wait()
