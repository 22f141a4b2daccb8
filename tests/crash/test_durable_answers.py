"""Real servers that are killed while answers are open: the frontend alone, then all of `tpserve serve`.

Clients that come again get the rest of the same answer, to the byte.
"""

import http.client
import json
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.http.test_durable import read_some
from tests.http.test_responses_api import events as numbered_events
from tests.http.test_resumable import Connection, said
from tests.server import Server, children, free_port, running, serve

Json = dict[str, Any]
ASK: Json = {"max_tokens": 300, "ignore_eos": True, "temperature": 1, "stream": True}
CHAT = [{"role": "user", "content": "Tell me a long story about a fox."}]
CALLS: list[tuple[str, Json]] = [
    ("/v1/completions", {"prompt": "Once upon a time", "seed": 1, "stream_options": {"include_usage": True}}),
    ("/v1/completions", {"prompt": "The old mill", "n": 2, "logprobs": 2, "seed": 2, "presence_penalty": 0.5}),
    ("/v1/completions", {"prompt": ["The red", "A dog"], "echo": True, "logprobs": 1, "temperature": 0}),
    ("/v1/chat/completions", {"messages": CHAT, "seed": 4, "logprobs": True}),
]
STORY: Json = {"input": "A long story.", "stream": True, "background": True, "max_output_tokens": 300, "ignore_eos": True}
COME_BACK_S = 60.0


class Client(threading.Thread):
    """Reads a stream to its end, whatever happens to the server; `data` is all events."""

    def __init__(self, port: int, path: str, body: Json) -> None:
        super().__init__(daemon=True)
        self.data, self.id, self.attached, self.error = b"", "", 0, ""
        self._port, self._path, self._body = port, path, body
        self.start()

    def run(self) -> None:
        deadline_s = time.monotonic() + COME_BACK_S
        while not self.data.endswith(b"data: [DONE]\n\n") and not self.error:
            if time.monotonic() > deadline_s:
                self.error = "too late"
            with suppress(OSError, http.client.HTTPException):
                self._read()
            time.sleep(0.05)

    def _read(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=COME_BACK_S)
        if not self.id:
            connection.request("POST", self._path, json.dumps(self._body), {"X-Resumable": "1"})
        else:
            last = self.data[:-2].rsplit(b"\n\n", 1)[-1].split(b"\n")[0].removeprefix(b"id: ").decode()
            connection.request("GET", f"/v1/streams/{self.id}", headers={"Last-Event-ID": last or "0"})
        answer = connection.getresponse()
        if answer.status not in (200, 503):
            self.error = f"{answer.status}: {answer.read()!r}"
        if answer.status != 200:
            return
        self.id, rest = answer.headers["X-Stream-Id"], b""
        self.attached += 1
        while piece := answer.read1(1 << 16):
            *events, rest = (rest + piece).split(b"\n\n")
            self.data += b"".join(event + b"\n\n" for event in events if event.startswith(b"id: "))


def get(port: int, path: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=COME_BACK_S)
    connection.request("GET", path)
    answer = connection.getresponse()
    return answer.status, answer.read()


def undisturbed(port: int, path: str, body: Json) -> list[str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=COME_BACK_S)
    connection.request("POST", path, json.dumps(body))
    text = connection.getresponse().read().decode()
    return [part.removeprefix("data: ") for part in text.split("\n\n")[:-1]]


def frontend_pid(server: Server) -> int:
    found = [pid for pid in children(server.processes[0].pid) if "tpserve.frontend" in Path(f"/proc/{pid}/cmdline").read_text()]
    assert len(found) == 1
    return found[0]


def until_some(clients: list[Client]) -> None:
    """Wait until every open stream has got more."""
    before = [len(client.data) for client in clients]
    while any(client.is_alive() and len(client.data) < size + 1000 for client, size in zip(clients, before, strict=True)):
        time.sleep(0.02)


def check_response(port: int, begun: bytes) -> None:
    """A response whose first events are these has gone on, and can be continued."""
    seen = numbered_events(begun)
    path = f"/v1/responses/{seen[0]['response']['id']}"
    status, rest = get(port, f"{path}?stream=true&starting_after={seen[-1]['sequence_number']}")
    assert status == 200
    response = numbered_events(begun + rest)[-1]["response"]
    assert response["usage"]["output_tokens"] == STORY["max_output_tokens"]
    assert json.loads(get(port, path)[1]) == response
    body = {"input": "And then?", "previous_response_id": response["id"], "max_output_tokens": 2}
    answer = json.loads(Connection(f"http://127.0.0.1:{port}", "POST", "/v1/responses", body).read())
    # read again, the text has fewer tokens than were drawn: drawing may choose a longer spelling
    assert answer["usage"]["input_tokens"] > STORY["max_output_tokens"] // 2


def until_state(server: Server, state: str) -> None:
    deadline_s = time.monotonic() + COME_BACK_S
    while True:
        with suppress(OSError):
            if server.get("/readyz", 5.0)[1]["state"] == state:
                return
        assert time.monotonic() < deadline_s, server.log
        time.sleep(0.05)


def check_pause(server: Server, clients: list[Client]) -> None:
    """A pause outlives the death of a rank, and of the frontend, after which every answer goes on."""
    assert server.post("/pause", b"") == (200, {"status": "paused", "mode": "keep", "num_aborted": 0})
    epoch = server.get("/server_info")[1]["epoch"]
    for pid in (server.rank_pids()[0], frontend_pid(server)):
        os.kill(pid, signal.SIGKILL)
        until_state(server, "recovering")
        until_state(server, "paused")
        assert server.get("/server_info")[1]["epoch"] > epoch and server.get("/is_paused")[1]["is_paused"]
        epoch = server.get("/server_info")[1]["epoch"]
        time.sleep(0.3)  # what was sent before the pause
        sizes = [len(client.data) for client in clients]
        time.sleep(0.5)
        assert sizes == [len(client.data) for client in clients], "nothing is computed in a pause"
    assert any(client.is_alive() for client in clients)
    assert server.post("/resume", b"") == (200, {"status": "resumed"})


def test_answers_outlive_the_frontend_and_the_server(tmp_path: Path) -> None:
    port = free_port()
    command = serve("--nproc-per-node", "1", "--state-dir", str(tmp_path / "state"), port=port)
    with running([command], port, tmp_path / "log") as server:
        with ThreadPoolExecutor(len(CALLS)) as pool:
            expected = list(pool.map(lambda call: undisturbed(port, call[0], ASK | call[1]), CALLS))
        clients = [Client(port, path, ASK | body) for path, body in CALLS]
        begun = read_some(Connection(server.url, "POST", "/v1/responses", STORY), 3000)
        until_some(clients)
        check_pause(server, clients)
        until_some(clients)
        assert any(client.is_alive() for client in clients), "the answers are too short for this test"
        server.processes[0].kill()
        server.wait()
        server.assert_nothing_left()
        assert any(client.is_alive() for client in clients)
    with running([command], port, tmp_path / "log2", ready=False) as server:
        for client, (path, body), plain in zip(clients, CALLS, expected, strict=True):
            client.join(COME_BACK_S)
            assert not client.is_alive() and not client.error, f"{path} {body}: {client.error}\n{server.log}"
            assert client.attached >= 2
            assert get(port, f"/v1/streams/{client.id}") == (200, client.data)
            events = [part.split("\ndata: ", 1)[1] for part in client.data.decode().split("\n\n")[:-1]]
            assert said(events) == said(plain)
        check_response(port, begun)
        assert "go on" in server.log and server.get("/server_info")[1]["state_dir"]["state"] == "on"
        assert server.stop() == [0]
        server.assert_nothing_left()
