"""How long a start may take, against what the machine needs for the imports alone. The best of five counts."""

import subprocess
import sys
import time
from pathlib import Path

from tests.server import free_port, running, serve

LIVE, READY = 4.0, 2.5
"""In times of an import: until the frontend answers (aiohttp, ZeroMQ), and until the built-in model on two ranks does (torch)."""


def import_s(modules: str) -> float:
    began_s = time.monotonic()
    subprocess.run([sys.executable, "-c", f"import {modules}"], check=True)
    return time.monotonic() - began_s


def one_start(log: Path) -> tuple[float, float]:
    port, began_s = free_port(), time.monotonic()
    command = serve("-tp", "2", "--device", "cpu", port=port)
    with running([command], port, log, ready=False, env={"OMP_NUM_THREADS": "1"}) as server:
        while not server.port_open() or server.get("/livez")[0] != 200:
            time.sleep(0.01)
        live_s = time.monotonic() - began_s
        server.wait_ready()
        ready_s = time.monotonic() - began_s
        server.stop()
        timer = [line for line in server.log.splitlines() if " start: agent " in line]
        assert len(timer) == 1 and "[n0 r0 s0]" in timer[0] and ", together " in timer[0] and timer[0].endswith(" s")
    return live_s, ready_s


def test_a_start_takes_a_few_times_its_imports(tmp_path: Path) -> None:
    starts = []
    for attempt in range(5):
        live_s, ready_s = one_start(tmp_path / f"log{attempt}")
        starts.append((live_s / import_s("aiohttp, zmq, msgspec, uvloop"), ready_s / import_s("torch")))
        if min(live for live, _ in starts) < LIVE and min(ready for _, ready in starts) < READY:
            return
    raise AssertionError(starts)
