"""The access log: a line for each request, files that move, disks that are full."""

import json
import logging
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.http import checks
from tests.http.inprocess import serving, until
from tpserve.errors import UserError
from tpserve.frontend import access_log
from tpserve.frontend.access_log import AccessLogFile

FIELDS = [
    *(
        "time",
        "request_id",
        "trace_id",
        "id",
        "client",
        "key",
        "method",
        "path",
        "status",
        "duration_s",
        "queue_s",
        "ttft_s",
        "model",
    ),
    *("prompt_tokens", "output_tokens", "finish_reason"),
]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_line_for_each_request_and_nothing_of_its_text(tmp_path: Path) -> None:
    path = tmp_path / "access.jsonl"
    (tmp_path / "keys").write_text("s3cret name=team-a\nplain\n")
    with serving(tmp_path, access_log=str(path), api_key_file=str(tmp_path / "keys")) as server:
        client = checks.Client(server.url, {"X-Request-Id": "abc", "Authorization": "Bearer s3cret"})
        client.completion(prompt="zanzibar", max_tokens=3, ignore_eos=True, n=2)
        traced = checks.Client(
            server.url, client.headers | {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}
        )
        traced.chat(messages=[{"role": "user", "content": "zanzibar"}], max_tokens=2, ignore_eos=True, stream=True)
        client.completion(prompt="zanzibar", max_tokens=-1)
        client.get("/v1/streams/zanzibar?from=zanzibar")
        client.get("/zanzibar")
        checks.Client(server.url, {"Authorization": "Bearer plain"}).get("/v1/models")
        checks.Client(server.url, {"Authorization": "Bearer wrong"}).get("/v1/models")
        checks.Client(server.url).get("/livez")
        until(lambda: path.read_text().count("\n") == 8)
    text = path.read_text()
    assert "zanzibar" not in text and "s3cret" not in text and (path.stat().st_mode & 0o007) == 0
    found = lines(path)
    assert all(list(line) == FIELDS and line["client"] == "127.0.0.1" and line["duration_s"] > 0 for line in found)
    whole, streamed, wrong, stream, missing, plain, closed, alive = found
    assert (whole["id"], whole["request_id"], whole["key"], whole["model"]) == ("cmpl-abc", "abc", "team-a", "tiny")
    assert (whole["method"], whole["path"], whole["status"]) == ("POST", "/v1/completions", 200)
    assert (whole["output_tokens"], whole["finish_reason"]) == (6, "length") and whole["prompt_tokens"] > 0
    assert 0 <= whole["queue_s"] <= whole["ttft_s"] <= whole["duration_s"]
    assert whole["time"].endswith("+00:00") and whole["time"] <= streamed["time"]
    assert (whole["trace_id"], streamed["trace_id"]) == (None, "0af7651916cd43dd8448eb211c80319c")
    assert (streamed["path"], streamed["output_tokens"]) == ("/v1/chat/completions", 2)
    assert (wrong["status"], wrong["id"], wrong["output_tokens"], wrong["key"]) == (400, None, None, "team-a")
    assert (stream["path"], stream["status"]) == ("/v1/streams/{id}", 404)
    assert (missing["path"], missing["status"]) == ("(no such route)", 404)
    assert (plain["key"], plain["status"], closed["key"], closed["status"]) == (None, 200, None, 401)
    assert (alive["path"], alive["status"]) == ("/livez", 200)


def test_a_file_that_was_moved_is_begun_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access_log, "LOOK_S", 0.0)
    path, old = tmp_path / "log", tmp_path / "log.1"
    log = AccessLogFile(str(path))
    log.write(b"1")
    until(lambda: path.read_text() == "1\n")
    path.rename(old)
    log.write(b"2")
    until(lambda: path.exists() and path.read_text() == "2\n")
    path.unlink()
    log.write(b"3")
    log.close()
    assert path.read_text() == "3\n" and old.read_text() == "1\n"
    again = AccessLogFile(str(path))
    again.write(b"4")
    again.close()
    assert path.read_text() == "3\n4\n"
    os.mkfifo(tmp_path / "pipe")
    for wrong, says in (
        (tmp_path / "none" / "log", "No such file"),
        (tmp_path, "directory"),
        (tmp_path / "pipe", "No such device"),
    ):
        with pytest.raises(UserError, match=f"--access-log .*{says}"):
            AccessLogFile(str(wrong))


def test_a_full_disk_loses_lines_and_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path, space, write = tmp_path / "log", [6], os.write

    def bounded(file: int, data: memoryview) -> int:
        """A disk with `space` bytes left: what fits is written, and the next call fails."""
        if not space[0]:
            raise OSError(28, "No space left on device")
        written = write(file, data[: space[0]])
        space[0] -= written
        return written

    monkeypatch.setattr(access_log.os, "write", bounded)
    monkeypatch.setattr(access_log, "QUIET_S", 0.0)
    with caplog.at_level(logging.WARNING):
        log = AccessLogFile(str(path))
        for number in range(5):
            log.write(b"abc%d" % number)
            until(log._lines.empty)
        until(lambda: "loses lines: No space left" in caplog.text)
        space[0] = 1000
        for number in range(2):
            log.write(b"new%d" % number)
            until(lambda number=number: f"new{number}\n" in path.read_text())  # type: ignore[misc]
        log.close()
    assert caplog.text.count("loses lines") == 1 and caplog.text.count("is written again") == 1
    first, torn, *rest = path.read_text().split("\n")
    assert (first, torn, rest) == ("abc0", "a", ["new0", "new1", ""]), "what follows a torn line is whole"


def test_a_slow_disk_holds_up_nobody(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    reader, writer = os.pipe()
    monkeypatch.setattr(access_log, "MAX_WAITING", 10)
    monkeypatch.setattr(AccessLogFile, "_open", lambda _: writer)
    log = AccessLogFile("-")
    for _ in range(300):
        log.write(b"x" * 1000)  # a pipe takes 64 KiB, and nobody reads it
    assert "loses lines: its disk is too slow" in caplog.text
    os.set_blocking(reader, False)
    with suppress(BlockingIOError):
        while os.read(reader, 1 << 20):
            time.sleep(0.02)
    log.close()
    assert not log._thread.is_alive()
    os.close(reader)
