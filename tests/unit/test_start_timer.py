"""Laps of a start, by a clock that counts from the start of a process."""

import re
import subprocess
import sys
import time

from tpserve.observe.start_timer import StartTimer, start_time_s

LAPS = """
import os, time
from tpserve.observe.start_timer import StartTimer
watch = StartTimer(os.getppid())
time.sleep(0.25)
watch.mark("torch")
watch.mark("mesh")
print(watch.line())
"""


def test_laps_are_told_in_order_and_add_up() -> None:
    """This process stands for the agent: it began well before the one it starts."""
    line = subprocess.run([sys.executable, "-c", LAPS], check=True, capture_output=True, text=True).stdout.strip()
    said = re.fullmatch(r"start: agent ([\d.]+)(?:, interpreter ([\d.]+))?, torch (0\.[2-4]), together ([\d.]+) s", line)
    assert said is not None, line
    assert abs(sum(float(lap or 0) for lap in said.groups()[:3]) - float(said[4])) < 0.2


def test_a_process_that_began_now() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    began = start_time_s(child.pid)
    assert began is not None and 0 <= time.clock_gettime(time.CLOCK_BOOTTIME) - began < 2
    child.communicate(b"\n")
    assert start_time_s(child.pid) is None and StartTimer(child.pid).line().startswith("start: interpreter ")
