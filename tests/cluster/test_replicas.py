"""Two servers behind nginx, by the file that we give: both are used, streams pass as they come, and a dead one is not missed."""

import contextlib
import http.client
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.conftest import of_place
from tests.server import Server, free_port, running, serve

CONF = Path(__file__).resolve().parents[2] / "launch" / "nginx" / "tpserve.conf"
NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")

pytestmark = pytest.mark.skipif(NGINX is None, reason="nginx is not installed")


@contextlib.contextmanager
def behind(place: Path, *ports: int) -> Iterator[int]:
    """nginx in front of two servers, on the port that comes out."""
    port = free_port()
    text = CONF.read_text()
    for written, real in zip(("127.0.0.1:8001", "127.0.0.1:8002", "listen 8000"), (*ports, port), strict=True):
        assert written in text
        text = text.replace(written, f"127.0.0.1:{real}" if written[0] == "1" else f"listen 127.0.0.1:{real}")
    conf = place / "nginx.conf"
    conf.write_text(f"daemon off; pid {place}/nginx.pid; error_log {place}/nginx.log;\n{text}")
    assert NGINX is not None
    process = subprocess.Popen([NGINX, "-p", str(place), "-c", str(conf), "-e", f"{place}/nginx.log"], stderr=subprocess.DEVNULL)
    try:
        time.sleep(0.5)
        assert process.poll() is None, (place / "nginx.log").read_text()
        yield port
    finally:
        process.terminate()
        process.wait()


def complete(port: int, **fields: object) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    body = json.dumps({"model": "tidewick", "prompt": "The cat", "max_tokens": 8, "temperature": 0, **fields})
    connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


def served(server: Server) -> int:
    """Answers that a server has given."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    connection.request("GET", "/metrics")
    lines = connection.getresponse().read().decode().splitlines()
    return sum(int(float(line.split()[-1])) for line in lines if line.startswith("tpserve:request_success_total"))


def test_two_replicas_behind_nginx(place: Path) -> None:
    ports = (free_port(), free_port())
    environ = {"TMPDIR": str(place), "OMP_NUM_THREADS": "1"}
    with contextlib.ExitStack() as stack:
        one, two = (
            stack.enter_context(running([serve("--device", "cpu", port=port)], port, place / f"{port}.log", env=environ))
            for port in ports
        )
        front = stack.enter_context(behind(place, *ports))
        status, text = complete(front)
        assert status == 200
        answers = {complete(front)[1].partition('"choices"')[2] for _ in range(9)}
        assert len(answers) == 1 and text.partition('"choices"')[2] in answers, "greedy answers are the same on both"
        assert served(one) > 1 and served(two) > 1
        status, streamed = complete(front, stream=True, max_tokens=64)
        assert status == 200 and streamed.count("data: ") >= 4 and streamed.rstrip().endswith("data: [DONE]")
        for pid in one.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        before = served(two)
        assert [complete(front)[0] for _ in range(6)] == [200] * 6, "nobody notices that one is gone"
        assert served(two) == before + 6
        for pid in of_place(place):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
