"""`tpserve bench frontend` with all its real processes, and what its clients take for lost or mixed. Nothing depends on how fast
it is."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec

from tests.cluster.test_bench_step import bench
from tpserve import builtin
from tpserve.bench.stream_load import (
    MAX_STREAMS,
    StreamLoad,
    lost_and_mixed,
    plain_tokens,
    stream_of,
    temperature_of,
    texts_of,
    tokens_of,
)
from tpserve.bench.stream_reader import text_reader
from tpserve.text.tokenizer import Tokenizer

TOKENIZER = Tokenizer.load(str(builtin.path()))
LOAD = StreamLoad("completions", 3, 20, 2, None, 0, plain_tokens(TOKENIZER, TOKENIZER.vocab_size))


def test_every_stream_is_its_own(tmp_path: Path) -> None:
    output = tmp_path / "frontend.json"
    done = bench("frontend", "--streams", "20", "--output-len", "15", "--rounds", "2", "--json", str(output))
    assert done.returncode == 0, done.stderr
    report = json.loads(output.read_text())
    assert set(report) == {"benchmark", "date", "versions", "machine", "workload", "figures"}
    assert list(report["figures"]) == ["aiohttp", "frontend"]
    for figures in report["figures"].values():
        assert (figures["lost"], figures["mixed"], len(figures["rounds"])) == (0, 0, 2)
        assert [each["tokens"] for each in figures["rounds"]] == [300, 300] and figures["tokens_per_event"] == 1
        assert all(each["rss_peak"] >= each["rss_end"] > 10 << 20 for each in figures["rounds"])
    assert not done.stderr and [row.split()[0] for row in done.stdout.splitlines()[2:]] == list(report["figures"])


def test_with_a_rate(tmp_path: Path) -> None:
    """Tokens that come while a client is behind are one event."""
    output = tmp_path / "frontend.json"
    arguments = ["--streams", "5", "--output-len", "20", "--rounds", "1", "--rate", "200", "--no-floor", "--endpoint", "messages"]
    done = bench("frontend", *arguments, "--output", str(output))
    figures: Any = json.loads(output.read_text())["figures"]["frontend"]
    assert done.returncode == 0 and figures["rounds"][0]["tokens"] == 100 and figures["tokens_per_event"] >= 1
    assert figures["rounds"][0]["duration_s"] > 19 / 200


def test_its_processes_end_with_it() -> None:
    """Also when it is killed."""
    command = [
        sys.executable,
        "-m",
        "tpserve",
        "bench",
        "frontend",
        "--no-floor",
        "--streams",
        "5",
        "--output-len",
        "400",
        "--endpoint",
        "chat",
    ]
    with subprocess.Popen([*command, "--rate", "20", "--rounds", "1"], stdout=subprocess.DEVNULL) as process:
        while not (pids := children_of(process.pid)):
            assert process.poll() is None
        process.kill()
        process.wait()
    for pid in pids:
        assert wait_gone(pid), "who started them has been killed, and they are left behind"


def children_of(pid: int) -> list[int]:
    """The children of the benchmark, once its clients run."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    commands = {int(child): Path(f"/proc/{child}/cmdline").read_bytes() for child in children}
    return list(commands) if any(b"stream_reader" in command for command in commands.values()) else []


def wait_gone(pid: int) -> bool:
    """Whether a process ends within some seconds."""
    deadline_s = time.monotonic() + 15
    while Path(f"/proc/{pid}").exists() and ") Z " not in Path(f"/proc/{pid}/stat").read_text():
        if time.monotonic() > deadline_s:
            return False
        time.sleep(0.02)
    return True


def test_what_is_lost_and_what_is_mixed() -> None:
    assert [lost_and_mixed("abc", read) for read in ("abc", "ab", "abd", "abcd", "")] == [
        (False, False), (True, False), (False, True), (False, True), (True, False),
    ]  # fmt: skip


def test_streams_differ_and_tell_who_they_are() -> None:
    texts = {texts_of(LOAD, TOKENIZER, stream)[0] for stream in range(LOAD.streams)}
    assert len(texts) == LOAD.streams
    text, lengths = texts_of(LOAD, TOKENIZER, 1)
    assert text == TOKENIZER.decode(tokens_of(LOAD, 1)) and lengths[-1] == len(text) and len(lengths) == 20
    for stream in (0, 1, 999, MAX_STREAMS - 1):
        sent = msgspec.json.decode(msgspec.json.encode(temperature_of(stream)))
        assert 0 < sent <= 1 and stream_of(sent) == stream


def test_the_text_of_every_apis_events() -> None:
    plain = {
        "completions": b'{"choices":[{"index":0,"text":"a\\"b"}]}',
        "chat": b'{"choices":[{"index":0,"delta":{"content":"a\\"b"}}]}',
        "responses": b'{"type":"response.output_text.delta","sequence_number":4,"delta":"a\\"b"}',
        "messages": b'{"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"a\\"b"}}',
    }
    for api, data in plain.items():
        assert text_reader(api)(data) == 'a"b'  # type: ignore[arg-type]
    assert text_reader("chat")(b"[DONE]") == "" and text_reader("responses")(b'{"type":"response.created"}') == ""


def test_too_long_for_the_model_is_one_line() -> None:
    done = bench("frontend", "--output-len", "100000")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1) and "--output-len 100000" in done.stderr
