"""Answers that outlive the server: another one goes on over the same state directory, and clients get the rest to the byte."""

import asyncio
import json
import logging
import os
import stat
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.http import checks
from tests.http.checks import Json
from tests.http.inprocess import Server, serving, until
from tests.http.test_resumable import CASES, Connection, again, parsed, post, said
from tests.scheduling import simulator
from tests.unit.test_chat_tools import SPEC, F
from tpserve.errors import UserError
from tpserve.frontend.openai import rebuild
from tpserve.frontend.openai.chat_answer import ChatAnswers
from tpserve.journal import directory, journal
from tpserve.response_template.template import ResponseTemplate
from tpserve.types.messages import Done

Serving = Callable[..., AbstractContextManager[Server]]
PROMPT = ("/v1/completions", {"prompt": "The red fox", "max_tokens": 60, "seed": None})


@pytest.fixture
def serve(tmp_path: Path) -> Serving:
    return partial(serving, tmp_path, state_dir=tmp_path / "state")


async def killed(kept: journal.Journal) -> None:
    """What SIGKILL leaves of a journal: what is committed."""
    kept._pending.clear()
    kept.write = lambda *_: None  # type: ignore[method-assign]
    await kept.committed()


def kill(server: Server) -> None:
    assert server.journal is not None
    server.call(killed(server.journal))
    server.engine.paused = True


def read_some(connection: Connection, size: int) -> bytes:
    """About `size` bytes of a stream, then the connection is cut."""
    data = b""
    while len(data) < size and (piece := connection.read(size - len(data))):
        data += piece
    connection.cut()
    return data[: data.rfind(b"\n\n") + 2] if b"\n\n" in data else b""


@pytest.mark.parametrize(
    ("path", "body", "exact"), [*((*case, False) for case in CASES[1:]), (*PROMPT, False), (*PROMPT, True), (*CASES[5], True)]
)
def test_an_answer_goes_on_to_the_byte(
    serve: Serving, path: str, body: Json, exact: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed again and again; in exact numerics all tokens but the first are lost each time, and drawn again."""
    monkeypatch.setattr(journal, "BATCH_S", 30.0)
    id, got, kills = "", b"", 0
    while not got.endswith(b"data: [DONE]\n\n"):
        with serve(step_s=0.003) as server:
            assert server.journal is not None
            server.journal.exact = exact
            if not id:
                undisturbed = post(server, path, body).read() if body.get("seed", 1) is not None else b""
                connection = post(server, path, body)
                id = connection.id
            else:
                last = parsed(got)[-1][0] if got else None
                connection = again(server, id, last)
                assert connection.status in (200, 204)
            got += read_some(connection, 1000 * 4**kills)
            kill(server)
            kills += 1
    assert kills > 1
    with serve() as server:
        assert again(server, id).read() == got, "what has ended is fetched from its beginning, too"
        assert not server.engine.requests
        if undisturbed:
            assert said([data for _, data in parsed(got)]) == said([data for _, data in parsed(undisturbed)])


def test_whose_an_answer_is_and_its_deadline_outlive_the_server(serve: Serving, tmp_path: Path) -> None:
    (keys := tmp_path / "keys").write_text("k name=n max_parallel_requests=1")
    headers = {"Authorization": "Bearer k", "X-Request-Timeout": "2"}
    with serve(api_key_file=str(keys)) as server:
        server.engine.paused = True
        reply = checks.Client(server.url, headers).post("/v1/responses", input="a", background=True, ignore_eos=True)
        kill(server)
    with serve(api_key_file=str(keys)) as server:
        server.engine.paused = True
        client = checks.Client(server.url, headers)
        until(lambda: server.request_table.num_open == 1)
        checks.is_error(client.completion(max_tokens=1), 429, code="rate_limit_exceeded", says="Limit 1, Used 1")
        until(lambda: client.get(f"/v1/responses/{reply.json['id']}").json["status"] == "failed")
        assert "X-Request-Timeout" in client.get(f"/v1/responses/{reply.json['id']}").json["error"]["message"]
        server.engine.paused = False
        assert client.completion(max_tokens=1).status == 200


@pytest.mark.parametrize(("path", "body"), [CASES[1], CASES[3], PROMPT])
def test_what_a_client_has_seen_stays_where_nothing_can_be_drawn_again(
    serve: Serving, path: str, body: Json, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each server draws other tokens."""
    monkeypatch.setattr(journal, "BATCH_S", 30.0)
    draw = simulator.draw
    with serve(step_s=0.003) as server:
        stream = post(server, path, body | {"max_tokens": 40})
        seen = read_some(stream, 3000)
        kill(server)
    monkeypatch.setattr(simulator, "draw", lambda prefix, seed, *rest: draw(prefix, seed + 1, *rest))
    with serve() as server:
        whole = again(server, stream.id).read()
        assert whole.startswith(seen) and whole.endswith(b"[DONE]\n\n")
        last = parsed(seen)[-1][0]
        assert again(server, stream.id, last).read() == whole[len(seen) :]


def test_answers_in_the_background_and_calls(serve: Serving) -> None:
    answers = ChatAnswers(template=ResponseTemplate.load(SPEC | {"start_anchor": "<|assistant|>"}))
    body = {
        "messages": checks.MESSAGES,
        "tools": [F],
        "max_tokens": 50,
        "background": True,
        "temperature": 1,
        "n": 2,
        "ignore_eos": True,
    }
    with serve(answers=answers, step_s=0.003) as server:
        first = Connection(server.url, "POST", "/v1/chat/completions", body, X_Request_Id="mine", Authorization="Bearer k")
        assert first.status == 202
        until(lambda: any(len(each.tokens) > 5 for each in server.request_table.open_sequences))
        kill(server)
    with serve(answers=answers) as server:
        assert again(server, first.id).status == 404 and again(server, first.id, key="other").status == 404
        until(lambda: again(server, first.id, key="k").status == 200)
        answer = again(server, first.id, key="k").read()
        assert json.loads(answer)["id"] == "chatcmpl-mine" and json.loads(answer)["usage"]["completion_tokens"] == 100
    with serve(answers=answers) as server:
        assert again(server, first.id, key="k").read() == answer
        assert Connection(server.url, "DELETE", f"/v1/streams/{first.id}", Authorization="Bearer k").status == 200
    with serve(answers=answers) as server:
        assert again(server, first.id, key="k").status == 404


@pytest.mark.parametrize("status", [503, 500])
def test_a_server_that_ends_leaves_what_is_open(serve: Serving, status: int) -> None:
    """Its readers are told, but the error is no event of the answer."""
    with serve(step_s=0.003) as server:
        stream = post(server, *PROMPT)
        begin = stream.read(1500)
        server.loop.call_soon_threadsafe(server.request_table.fail_all, "the server is shutting down", status)
        begin += stream.read()
        *events, error, done = begin.split(b"\n\n")[:-1]
        assert error.startswith(b"data: ") and b"shutting down" in error and done == b"data: [DONE]"
        assert again(server, stream.id).status == 503
    with serve() as server:
        whole = again(server, stream.id).read()
        assert whole.startswith(b"\n\n".join(events)) and len(parsed(whole)) > len(events)


def test_an_error_is_kept_and_nothing_goes_on(serve: Serving) -> None:
    with serve(step_s=0.003) as server:
        stream = post(server, *PROMPT)
        stream.read(500)
        (sequence,) = server.request_table.open_sequences
        server.loop.call_soon_threadsafe(server.request_table.receive, [Done(sequence.request.id, "error", 0, error="no luck")])
        stream.read()
    with serve() as server:
        answer = again(server, stream.id)
        assert answer.status == 500 and b"no luck" in answer.read() and not server.engine.requests


def test_an_answer_that_waits_while_one_engine_after_the_other_fails_is_given_up(serve: Serving) -> None:
    id = ""
    for _ in range(rebuild.MAX_TRIES):
        with serve(step_s=10) as server:
            id = id or post(server, *PROMPT).id
            until(lambda: server.request_table.num_open == 1)
            server.loop.call_soon_threadsafe(server.request_table.fail_all, "rank 0 was killed", 500)
            until(lambda: server.request_table.num_open == 0)
    with serve() as server:
        assert again(server, id).status == 500


def test_another_model_refuses_and_says_so(serve: Serving, caplog: pytest.LogCaptureFixture) -> None:
    with serve(step_s=0.003) as server:
        stream = post(server, *PROMPT)
        stream.read(500)
        kill(server)
    with caplog.at_level(logging.WARNING), serve(digest=b"other") as server:
        answer = again(server, stream.id)
        assert answer.status == 410 and b"another model" in answer.read() and not server.engine.requests
        assert "1 answers" in caplog.text and stream.id not in caplog.text
        assert server.request_table.num_open == 0


def test_answers_of_before_count_as_open_and_end_with_their_window(serve: Serving) -> None:
    with serve(step_s=0.003) as server:
        ended = post(server, "/v1/completions", {"prompt": "a", "max_tokens": 2})
        ended.read()
        kept = [post(server, *PROMPT) for _ in range(3)]
        for each in kept:
            each.read(300)
        kill(server)
    with serve(max_num_seqs=2, max_queued_requests=1, step_s=0.05) as server:
        checks.is_error(checks.Client(server.url).completion(), 429, code="queue_full", says="3 of 3")
        kill(server)
    time.sleep(0.3)
    with serve(resume_window=0.2) as server:
        assert [again(server, each.id).status for each in (ended, *kept)] == [404] * 4
        assert server.request_table.num_open == 0 and not server.engine.requests


def test_an_answer_that_ends_the_server_each_time_is_given_up(serve: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve(step_s=0.003) as server:
        stream = post(server, *PROMPT)
        stream.read(500)
        kill(server)
    with monkeypatch.context() as patched:
        patched.setattr(rebuild, "replay", lambda *_: asyncio.sleep(60))
        for _ in range(rebuild.MAX_TRIES):
            with serve() as server:
                until(lambda: bool(server.journal and server.journal.earlier[stream.id].rebuilding))
                time.sleep(0.1)
                kill(server)
    with serve() as server:
        answer = again(server, stream.id)
        assert answer.status == 500 and b"each time that" in answer.read() and not server.engine.requests


@pytest.mark.parametrize("how", ["full", "no such table", "takes more than"])
def test_a_failing_disk_turns_it_off_and_serving_goes_on(
    serve: Serving, how: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve(step_s=0.003) as server:
        stream = post(server, *PROMPT)
        assert server.journal is not None and server.journal._database is not None
        connection = server.journal._database.connection
        if how == "full":
            server.call(run(server, lambda: connection.execute("PRAGMA max_page_count=1")))
        elif how == "no such table":
            server.call(run(server, lambda: connection.execute("DROP TABLE frames")))
        else:
            monkeypatch.setattr(journal, "STALL_S", 0.3)
            server.loop.call_soon_threadsafe(server.journal._database.submit, lambda: time.sleep(1))
        second = post(server, "/v1/completions", {"prompt": "b" * 20, "n": 4, "max_tokens": 200, "logprobs": 5})
        assert stream.read().endswith(b"data: [DONE]\n\n") and b"error" not in second.read()
        until(lambda: bool(server.journal and server.journal.reason))
        assert caplog.text.count("is off") == 1
        info = checks.Client(server.url).get("/server_info").json["state_dir"]
        assert info["state"] == "off" and how in info["reason"]
        assert again(server, stream.id).status == 200, "in memory it stays"
        until(lambda: not (tmp_path / "state" / journal.FILE).exists())
        assert post(server, *PROMPT).read().endswith(b"[DONE]\n\n")
    with serve() as server:
        assert again(server, stream.id).status == 404
        assert checks.Client(server.url).get("/server_info").json["state_dir"]["state"] == "on"


async def run(server: Server, work: Callable[[], Any]) -> None:
    """Do something on the journal's thread."""
    assert server.journal is not None and server.journal._database is not None
    await server.journal._database.submit(work)


def test_a_file_that_is_no_database_is_replaced(serve: Serving, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "state").mkdir(mode=0o700)
    (tmp_path / "state" / journal.FILE).write_bytes(b"nonsense" * 1000)
    with serve() as server:
        assert "its answers are lost" in caplog.text
        assert post(server, *PROMPT).read().endswith(b"[DONE]\n\n")


def test_the_directory_is_private_local_and_of_one_server(
    serve: Serving, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = tmp_path / "state"
    with serve() as server:
        post(server, *PROMPT).read()
        assert stat.S_IMODE(state.stat().st_mode) == 0o700
        assert {stat.S_IMODE(path.stat().st_mode) for path in state.iterdir()} == {0o600}
        monkeypatch.setattr(directory, "LOCK_S", 0.1)
        with pytest.raises(UserError, match="in use by another server"):
            directory.open_directory(state)
    os.close(directory.open_directory(state))
    state.chmod(0o750)
    with pytest.raises(UserError, match="chmod 700"):
        directory.open_directory(state)
    state.chmod(0o700)
    monkeypatch.setitem(directory.NETWORK_FILE_SYSTEMS, directory.file_system(state), "NFS")
    with pytest.raises(UserError, match="network file system \\(NFS\\)"):
        directory.open_directory(state)
    assert directory.file_system(tmp_path / "none") == 0
    with pytest.raises(UserError, match="no directory"):
        directory.open_directory(state / "lock")


def test_what_nobody_asks_for_again_is_deleted_after_its_window(serve: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "ALIVE_S", 0.05)
    with serve(resume_window=2) as server:
        id = post(server, "/v1/completions", {"prompt": "a", "max_tokens": 2, "background": True}).id
        until(lambda: server.request_table.num_open == 0)
    with serve(resume_window=2) as server:
        kept = server.journal
        assert kept is not None and list(kept.earlier) == [id]
        until(lambda: not kept.earlier)
        assert again(server, id).status == 404
    with serve() as server:
        assert server.journal is not None and not server.journal.earlier
