"""`tpserve chat` as a process: through pipes, and on a terminal with keys, against a server and against a hostile one."""

import contextlib
import io
import json
import os
import pty
import re
import select
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.http.inprocess import Server, serving, until
from tpserve.__main__ import main
from tpserve.chat.command import ChatFlags
from tpserve.chat.conversation import Conversation
from tpserve.chat.slash_commands import SLASH_COMMANDS
from tpserve.cli.option import options_of
from tpserve.engine_client.status import EngineStatus
from tpserve.errors import UserError
from tpserve.types.packed import unpack

CHAT = [sys.executable, "-m", "tpserve", "chat", "--url"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("model"), api_key="k3y", step_s=0.005) as server:
        yield server


def piped(url: str, text: str, *arguments: str, key: str = "k3y") -> "subprocess.CompletedProcess[str]":
    environment = {name: value for name, value in os.environ.items() if name != "RANK"} | {"TPSERVE_API_KEY": key}
    return subprocess.run(
        [*CHAT, url, *arguments], input=text, capture_output=True, text=True, timeout=30, env=environment, check=False
    )


def test_one_question_through_a_pipe(server: Server) -> None:
    done = piped(f"{server.url}/v1", "Where does the red fox live?\n", "--system", "You know.", "--model-name", "org/tiny")
    assert done.stderr in ("", "[cut: max_tokens, or the context, is used up]\n")
    assert done.returncode == 0 and len(done.stdout) > 5 and done.stdout.endswith("\n")
    asked = server.tokenizer.decode(unpack(server.engine.requests[-1].request.prompt))
    assert "You know." in asked and "Where does the red fox live?" in asked


@pytest.mark.parametrize(
    ("arguments", "key", "code", "said"),
    [
        (["-q", "hi"], "no", 2, "TPSERVE_API_KEY"),
        (["-q", "hi", "--api-key", "k3y", "--system", "s"], "no", 0, ""),
        (["-q", "hi", "--url", "http://127.0.0.1:9"], "k3y", 2, "no server answers at http://127.0.0.1:9: Connection refused"),
        ([], "k3y", 2, "nothing to ask"),
        (["-q", "hi", "--model", "gpt"], "k3y", 2, "gpt"),
        (["-q", "hi", "--urll", "x"], "k3y", 2, "did you mean --url?"),
    ],
)
def test_what_goes_wrong_is_one_line(
    server: Server, arguments: list[str], key: str, code: int, said: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv("TPSERVE_API_KEY", key)
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b" \n")))
    assert main(["chat", "--url", server.url, *arguments]) == code
    shown = capsys.readouterr()
    assert said in shown.err and (code == 0) == bool(shown.out)
    assert code == 0 or (shown.err.startswith("tpserve: error: ") and shown.err.count("\n") == 1)


def test_it_waits_while_the_server_starts(server: Server) -> None:
    running = server.states[-1]
    server.states.append(EngineStatus("starting", "loading weights", 40))
    try:
        command = [*CHAT, server.url, "--api-key", "k3y", "-q", "Hello"]
        chat = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert chat.stderr is not None and chat.stdout is not None
        assert chat.stderr.readline() == "the server is starting, 40%: loading weights\n"
    finally:
        server.states.append(running)
    assert chat.wait(30) == 0 and chat.stdout.read()
    chat.stdout.close()
    chat.stderr.close()


class Session:
    """A chat on a terminal of its own."""

    def __init__(self, url: str, home: Path, *arguments: str, term: str = "xterm") -> None:
        self.pid, self._terminal = pty.fork()
        if self.pid == 0:
            keep = {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}
            os.execve(
                sys.executable, [*CHAT, url, *arguments], keep | {"HOME": str(home), "TERM": term, "TPSERVE_API_KEY": "k3y"}
            )
        self.raw = ""
        self.wait_for(">>> ")

    def wait_for(self, text: str, timeout_s: float = 20.0) -> str:
        """Wait until a text is shown; everything up to its end, which is taken away."""
        deadline = time.monotonic() + timeout_s
        while text not in self.raw:
            assert time.monotonic() < deadline, f"{text!r} is not in {self.raw!r}"
            if select.select([self._terminal], [], [], 0.1)[0]:
                self.raw += os.read(self._terminal, 65536).decode(errors="replace")
        end = self.raw.index(text) + len(text)
        shown, self.raw = self.raw[:end], self.raw[end:]
        return shown

    def keys(self, text: str) -> None:
        os.write(self._terminal, text.encode())

    def say(self, text: str) -> str:
        """Type a line and wait for the next prompt; what is shown between them."""
        self.keys(text + "\r")
        self.wait_for("\n")
        return self.wait_for(">>> ")

    def exit_code(self) -> int:
        deadline = time.monotonic() + 20
        while True:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                os.close(self._terminal)
                return os.waitstatus_to_exitcode(status)
            assert time.monotonic() < deadline
            if select.select([self._terminal], [], [], 0.05)[0]:
                with contextlib.suppress(OSError):
                    os.read(self._terminal, 65536)


def plain(shown: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown)


def test_a_conversation_on_a_terminal(server: Server, tmp_path: Path) -> None:
    session = Session(server.url, tmp_path)
    before = len(server.engine.requests)
    session.say("/set max_tokens 8")
    assert len(session.say("The red fox")) > 10
    assert "did you mean /system" in session.say("/sytem x")
    assert "temperature 0.0" in session.say("/set temperature 0.0")
    assert 'top_k "many"' in session.say("/set top_k many")
    assert "top_k" in session.say("Hello"), "the server says what is wrong, and the chat goes on"
    assert "top_k" not in session.say("/set top_k")
    session.say("/system You are a fox.")
    session.keys('"""first\rsecond\rthird"""\r')
    session.wait_for("... ")
    session.wait_for(">>> ")
    session.keys("one\\\rtwo\r")
    session.wait_for("... ")
    session.wait_for(">>> ")
    session.say("/undo")
    saved = tmp_path / "chat.json"
    assert "saved 4 messages" in session.say(f"/save {saved}")
    state = json.loads(saved.read_text())
    assert [message["role"] for message in state["messages"]] == ["user", "assistant"] * 2
    assert state["messages"][2]["content"] == "first\nsecond\nthird"
    assert (state["system"], state["fields"]) == ("You are a fox.", {"max_tokens": 8, "temperature": 0.0})
    session.say("/clear")
    assert "4 messages" in session.say(f"/load {saved}")
    session.say("/retry")
    asked = [message.request for message in server.engine.requests[before:]]
    assert len(asked) == 4 and asked[3].prompt == asked[1].prompt, "the question of the file once more"
    session.keys("/qu\t\r")
    assert session.exit_code() == 0
    history = tmp_path / ".local" / "state" / "tpserve" / "chat_history"
    assert stat.S_IMODE(history.stat().st_mode) == 0o600 and stat.S_IMODE(history.parent.stat().st_mode) == 0o700
    assert "The red fox\n" in history.read_text()
    again = Session(server.url, tmp_path)
    again.keys("\x1b[A")
    again.wait_for("/quit")
    again.keys("\x15\x04")
    assert again.exit_code() == 0


def test_ctrl_c_stops_the_answer_and_not_the_program(server: Server, tmp_path: Path) -> None:
    session = Session(server.url, tmp_path, "--no-history")
    server.engine.paused = True
    try:
        session.keys("Hello\r")
        until(lambda: server.request_table.num_open == 1)
        session.keys("\x03")
        session.wait_for("[stopped]")
        session.wait_for(">>> ")
        until(lambda: server.request_table.num_open == 0)
    finally:
        server.engine.paused = False
    session.keys("half a line\x03")
    session.wait_for("Ctrl-D or /quit ends the chat")
    session.wait_for(">>> ")
    assert len(session.say("Hello")) > 5
    session.keys("\x04")
    assert session.exit_code() == 0 and not (tmp_path / ".local").exists()


class Hostile(BaseHTTPRequestHandler):
    """A server that answers with what should not reach a terminal, and breaks off the second answer."""

    events: Sequence[dict[str, Any]] = (
        {"reasoning_content": "Think\x1b]0;owned\x07ing"},
        {"content": "\x1b[2JHello\x9b1mm\rthere\b!"},
        {"content": "\n\ttab 🦊"},
    )

    def do_GET(self) -> None:
        body = json.dumps({"data": [{"id": "fox"}]}).encode()
        self.send_response(200 if self.path == "/v1/models" else 404)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(200)
        self.end_headers()
        for delta in self.events:
            self.wfile.write(b"data: " + json.dumps({"choices": [{"delta": delta}]}).encode() + b"\n\n")
        if asked["messages"][-1]["content"] != "break":
            end = {"choices": [{"delta": {}, "finish_reason": "stop"}]}
            self.wfile.write(b": comment\n\ndata: " + json.dumps(end).encode() + b"\n\ndata: [DONE]\n\n")

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def hostile() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Hostile) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_what_a_model_writes_does_not_control_the_terminal(hostile: str, tmp_path: Path) -> None:
    session = Session(hostile, tmp_path)
    shown = session.say("Hello")
    begin = shown.index("Think")
    answer = shown[begin - 4 : shown.index("🦊") + 1].replace("\r\n", "\n")
    assert answer == "\x1b[2mThink]0;owneding\n\x1b[22m[2JHello1mmthere!\n\ttab 🦊"
    broken = session.say("break")
    assert "cut before the answer was complete" in broken
    session.keys("\x04")
    assert session.exit_code() == 0
    dumb = Session(hostile, tmp_path, term="dumb")
    shown = dumb.say("Hello").replace("\r\n", "\n")
    assert "[reasoning]\nThink]0;owneding\n[answer]\n[2JHello" in shown and "\x1b" not in shown, "neither colors nor brackets"
    dumb.keys("/quit\r")
    assert dumb.exit_code() == 0


def test_an_answer_through_a_pipe_is_the_answer_alone(hostile: str) -> None:
    done = subprocess.run([*CHAT, hostile, "-q", "Hello"], input=b"", capture_output=True, timeout=30, check=False)
    assert done.returncode == 0 and done.stdout.decode() == "\x1b[2JHello\x9b1mm\rthere\b!\n\ttab 🦊\n" and done.stderr == b""
    broken = subprocess.run([*CHAT, hostile], input=b"break", capture_output=True, timeout=30, check=False)
    assert broken.returncode == 1 and b"cut before" in broken.stderr and b"Hello" in broken.stdout
    shell = f"{' '.join(CHAT)} {hostile} -q Hello < /dev/null | true; exit ${{PIPESTATUS[0]}}"
    assert subprocess.run(["bash", "-c", shell], capture_output=True, timeout=30, check=False).stderr == b""


def test_ctrl_c_ends_an_answer_through_a_pipe(server: Server) -> None:
    server.engine.paused = True
    try:
        command = [*CHAT, server.url, "--api-key", "k3y", "-q", "Hello"]
        chat = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        until(lambda: server.request_table.num_open == 1, 20.0)
        chat.send_signal(signal.SIGINT)
        out, err = chat.communicate(timeout=20)
        assert (chat.returncode, out.strip(), err) == (130, b"", b"")
        until(lambda: server.request_table.num_open == 0)
    finally:
        server.engine.paused = False


def test_fields_of_a_conversation() -> None:
    conversation = Conversation("m", "s", {"top_k": 3})
    conversation.ask("a")
    assert conversation.body()["messages"] == [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}]
    conversation.answered("")
    assert conversation.messages == [], "a question without an answer is forgotten"
    for text, value in (("0.5", 0.5), ('["a"]', ["a"]), ("word", "word"), ("true", True)):
        conversation.set("x", text)
        assert conversation.body()["x"] == value
    for name in ("messages", "stream", "n"):
        with pytest.raises(UserError, match="not set by hand"):
            conversation.set(name, "2")
    with pytest.raises(UserError, match="no conversation"):
        conversation.load('{"messages": 3}')
    with pytest.raises(UserError, match="no question"):
        conversation.undo()


def test_the_page_of_the_docs() -> None:
    page = (Path(__file__).parents[2] / "docs" / "page.md").read_text().split("## tpserve chat")[1].split("## Completion")[0]
    assert set(re.findall(r"`(/\w+)", page)) | {"/exit"} == set(SLASH_COMMANDS)
    flags = {name for option in options_of(ChatFlags).values() for name in (*option.names, *option.off_names)}
    assert set(re.findall(r"(?<![\w-])-{1,2}[a-z][\w-]*", page)) <= flags
