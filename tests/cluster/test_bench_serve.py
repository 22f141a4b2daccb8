"""`tpserve bench serve` against a real server and against stand-ins for other people's. Nothing depends on how fast it is."""

import json
import re
import subprocess
import sys
import threading
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from itertools import pairwise
from os import kill
from pathlib import Path
from signal import SIGKILL
from typing import Any

import pytest

from tests.cluster.fake_openai_server import ReceivedCall, fake_openai_server
from tests.server import Server, free_port, running, serve
from tpserve.__main__ import main
from tpserve.bench import plot
from tpserve.bench.client import ResponseRecord
from tpserve.bench.figures import ClientLoad, LatencyStats, figures, peak
from tpserve.bench.plot import svg
from tpserve.bench.request_timing import RequestTiming
from tpserve.bench.workload import BenchRequest, Workload, arrivals_s

SMALL = ["--input-len", "20", "--output-len", "8"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    port = free_port()
    with running([serve("--nproc-per-node", "1", port=port)], port, tmp_path_factory.mktemp("bench") / "log") as server:
        yield server


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "report.json"


def bench(url: str, *arguments: str, output: Path) -> tuple[int, Any]:
    """Exit code and report."""
    code = main(["bench", "serve", "--url", url, *arguments, "--output", str(output)])
    return code, json.loads(output.read_text() or "null")


def chunk(text: str = "", finish: str | None = None, **more: Any) -> bytes:
    choices = [] if more.pop("alone", False) else [{"index": 0, "text": text, "finish_reason": finish}]
    return b"data: " + json.dumps({"choices": choices, **more}).encode() + b"\n\n"


def usage(prompt: int, output: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": output}


WHOLE = [chunk("a"), chunk("b", "length"), chunk(alone=True, usage=usage(9, 2)), b"data: [DONE]\n\n"]


def test_a_real_server(server: Server, output: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "load.svg"
    load = [
        "--num-prompts",
        "12",
        "--request-rate",
        "100",
        "--max-concurrency",
        "5",
        "--range-ratio",
        "0.5",
        "--prefix-len",
        "32",
    ]
    more = ["--goodput", "ttft:100000", "e2el:0.000001", "--save-detailed", "--plot", str(picture)]
    code, report = bench(server.url + "/v1/", *SMALL, *load, *more, output=output)
    assert code == 0 and set(report) == {"benchmark", "date", "versions", "machine", "workload", "figures"}
    workload, result = report["workload"], report["figures"]
    assert workload["server"]["model"] == "tidewick" and workload["server"]["software"].startswith("tpserve/")
    assert (workload["prompts"], workload["request_rate"], workload["num_warmups"]) == ("ids", 100, 1)
    requests = result["requests"]
    assert (result["completed"], result["failed"], result["failures"], len(requests)) == (12, 0, [], 12)
    assert result["input_tokens"] == sum(r["input_tokens"] for r in requests)
    assert result["output_tokens"] == sum(r["output_tokens"] for r in requests)
    assert all(32 + 10 <= r["input_tokens"] <= 32 + 30 and 4 <= r["output_tokens"] <= 12 for r in requests)
    assert len({r["input_tokens"] for r in requests}) > 1 and result["ended_early"] == 0
    assert result["cached_tokens"] == 12 * 32, "the warm-up leaves the shared prefix, and only that, in the cache"
    assert result["tokens_counted_by"] == "usage" and 1 <= result["peak_concurrency"] <= 5
    assert result["output_tokens_per_s"] == pytest.approx(result["output_tokens"] / result["duration_s"], rel=0.01)
    assert result["requests_per_s"] == pytest.approx(12 / result["duration_s"], rel=0.01)
    assert result["goodput_per_s"] == 0, "no request takes a nanosecond"
    assert set(result["latency"]) == {"ttft", "tpot", "itl", "e2el"}
    for latency in result["latency"].values():
        assert 0 <= latency["p50_ms"] <= latency["p90_ms"] <= latency["p99_ms"] < 60_000
    assert result["latency"]["ttft"]["mean_ms"] <= result["latency"]["e2el"]["mean_ms"] <= result["duration_s"] * 1e3
    assert min(request["sent_s"] for request in requests) == 0 and 0 < result["client"]["cpu_share"] < 2
    assert len(ET.parse(picture).getroot().findall("{*}polyline")) == 5
    table = capsys.readouterr().out
    assert "12 requests 100 a second, at most 5 open, 20 ids in after a shared prefix of 32" in table and "p99" in table


def test_chat_and_a_dataset(server: Server, output: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "Hello!", "output_len": 3, "id": 1}\n\n{"prompt": "How are you today?"}\n')
    chat = ["--endpoint", "/v1/chat/completions", "--dataset", str(file), "--output-len", "5", "--num-warmups", "0"]
    code, report = bench(server.url, *chat, "--save-detailed", output=output)
    assert code == 0 and report["workload"]["prompts"] == "dataset" and report["workload"]["num_prompts"] == 2
    assert [r["output_tokens"] for r in report["figures"]["requests"]] == [3, 5]


def test_a_server_that_dies(output: Path, tmp_path: Path) -> None:
    """It is killed while streams are open: each of those ends with an error, and the rest meets nobody."""
    port = free_port()
    with running([serve("--nproc-per-node", "1", port=port)], port, tmp_path / "log") as server:

        def strike() -> None:
            while 'num_requests_running{model_name="tidewick"} 4.0' not in server.get("/metrics")[1]:
                time.sleep(0.01)
            kill(server.processes[0].pid, SIGKILL)

        threading.Thread(target=strike, daemon=True).start()
        load = ["--num-prompts", "8", "--max-concurrency", "4", "--input-len", "8", "--output-len", "1900", "--num-warmups", "0"]
        code, report = bench(server.url, *load, output=output)
    result = report["figures"]
    assert (code, result["completed"], result["failed"]) == (1, 0, 8)
    counts = {failure["kind"]: failure["count"] for failure in result["failures"]}
    assert sum(counts.values()) == 8 and counts.get("error in the stream", 0) + counts.get("cut off", 0) >= 4, counts
    assert result["latency"] == {} and result["output_tokens"] == 0


def test_failures_are_counted_by_kind(output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    error = b'data: {"error": {"message": "a rank died"}}\n\ndata: [DONE]\n\n'
    answers: list[Any] = [
        WHOLE,
        429,
        500,
        [chunk("a"), None],
        [chunk("a")],
        [chunk("a"), error],
        [chunk("", "stop")],
        [b"data: {"],
        [*WHOLE, None],
    ]
    with fake_openai_server(lambda call: answers[call.index % 9]) as server:
        load = ["--num-prompts", "18", "--num-warmups", "8", "--max-concurrency", "1"]
        code, report = bench(server.url, *SMALL, *load, "--save-details", output=output)
        assert len(server.calls) == 1 + 8 + 18, "one to see whether ids are taken, and no request twice"
    result = report["figures"]
    assert (code, result["completed"], result["failed"]) == (0, 4, 14)
    assert result["failures"][0]["kind"] == "cut off", "the most frequent first"
    assert {failure["kind"]: failure["count"] for failure in result["failures"]} == {
        "HTTP 429": 2, "HTTP 500": 2, "cut off": 4, "error in the stream": 2, "no tokens": 2, "unreadable chunk": 2
    }  # fmt: skip
    assert {failure["example"] for failure in result["failures"]} >= {"it is 429", "it is 500", "the response is empty"}
    assert [r["failure"] for r in result["requests"]][:3] == ["", "HTTP 429", "HTTP 500"]
    assert (result["output_tokens"], result["ended_early"]) == (8, 4)
    said = capsys.readouterr()
    assert "failed      2 x HTTP 429: it is 429" in said.out and "4 responses are shorter" in said.err


def test_nothing_completed(output: Path) -> None:
    with fake_openai_server(lambda call: 500) as server:
        code, report = bench(server.url, *SMALL, "--num-prompts", "3", "--plot", str(output.with_suffix(".svg")), output=output)
    assert code == 1 and report["figures"]["failures"] == [{"kind": "HTTP 500", "count": 3, "example": "it is 500"}]


def prompts_sent(*arguments: str, output: Path) -> tuple[list[Any], dict[str, Any]]:
    """The bodies of the measured requests, to a server that takes no token ids if the arguments say so."""
    refuses = "words" in arguments
    rest = [argument for argument in arguments if argument != "words"]
    with fake_openai_server(lambda call: 400 if refuses and isinstance(call.body["prompt"], list) else WHOLE) as server:
        code, report = bench(server.url, *SMALL, "--num-prompts", "6", "--max-concurrency", "1", *rest, output=output)
        assert code == 0
        return [call.body["prompt"] for call in server.calls[-6:]], report["workload"]


def test_the_seed_says_it_all(output: Path) -> None:
    first, _ = prompts_sent("--prefix-len", "4", output=output)
    again, _ = prompts_sent("--prefix-len", "4", output=output)
    other, _ = prompts_sent("--prefix-len", "4", "--seed", "1", output=output)
    assert first == again and not {*map(tuple, first)} & {*map(tuple, other)}
    assert {len(prompt) for prompt in first} == {24}
    assert len({tuple(prompt[:4]) for prompt in first}) == 1 and len({prompt[4] for prompt in first}) > 1


def test_words_where_ids_are_refused(output: Path) -> None:
    prompts, workload = prompts_sent("words", output=output)
    assert workload["prompts"] == "words" and {len(prompt.split()) for prompt in prompts} == {20} and len({*prompts}) == 6


def test_what_is_sent(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TPSERVE_API_KEY", "from-env")
    with fake_openai_server(lambda call: WHOLE) as server:
        load = ["--num-prompts", "9", "--max-concurrency", "3", "--temperature", "0.5", "--no-ignore-eos", "--model", "mine"]
        code, report = bench(server.url, *SMALL, *load, "--endpoint", "chat", output=output)
        assert code == 0 and server.most_open <= 3 and report["figures"]["peak_concurrency"] <= 3
    call: ReceivedCall = server.calls[-1]
    assert (call.path, call.key) == ("/v1/chat/completions", "Bearer from-env")
    [message] = call.body.pop("messages")
    assert message["role"] == "user" and len(message["content"].split()) == 20
    assert call.body == {
        "model": "mine", "max_tokens": 8, "temperature": 0.5, "stream": True, "stream_options": {"include_usage": True}
    }  # fmt: skip


def test_ignore_eos_is_sent(output: Path) -> None:
    with fake_openai_server(lambda call: 400 if call.index > 0 else WHOLE) as server:
        assert main(["bench", "serve", "--url", server.url]) == 2, "a warm-up that is refused, not broken, ends it"
        assert server.calls[-1].body["ignore_eos"] is True


def delta(finish: str | None = None, **fields: Any) -> bytes:
    return b"data: " + json.dumps({"choices": [{"delta": fields, "finish_reason": finish}]}).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"
FORMS = {
    "usage in a chunk of its own": (
        7,
        [chunk("a", usage=None), chunk("b", "length"), chunk(alone=True, usage=usage(5, 7)), DONE],
    ),
    "usage in every chunk": (
        4,
        [chunk("a", usage=usage(5, 1)), chunk("b", usage=usage(5, 4)), chunk("", "x", usage=usage(5, 4))],
    ),
    "usage, no choices": (3, [chunk("a"), chunk("b", "stop"), b'data: {"usage": {"completion_tokens": 3}, "choices": null}\n\n']),
    "no usage": (3, [chunk("a"), chunk("b"), chunk("c", "length"), DONE]),
    "no finish reason": (2, [chunk("a"), chunk("b"), DONE]),
    "comments and CRLF": (2, [b": hello\r\n\r\n", chunk("a").replace(b"\n", b"\r\n"), b": x\r\n", chunk("b", "stop")]),
    "no space, event names": (2, [b'event: m\ndata:{"choices":[{"text":"a"}]}\nid: 3\n\n', chunk("b", "stop")]),
    "no blank line at the end": (2, [chunk("a"), chunk("b", "stop").rstrip()]),
    "reasoning": (3, [delta(content=""), delta(reasoning_content="a"), delta(reasoning="b"), delta("stop", content="c")]),
    "tools, nulls": (1, [delta(role="assistant", content=None), delta(tool_calls=[{"index": 0}]), delta("x", content=None)]),
    "content in parts": (1, [delta(content=[{"type": "text", "text": "é"}]), delta("stop", content=[])]),
}
"""How many tokens there are, and the events that say so."""


@pytest.mark.parametrize("bytes_at_once", [None, 7])
@pytest.mark.parametrize("form", FORMS)
def test_forms_of_chunks(form: str, bytes_at_once: int | None) -> None:
    tokens, pieces = FORMS[form]
    stream = b"".join(pieces)
    answer = ResponseRecord(BenchRequest("x", 5, 8), 0.0)
    for at in range(0, len(stream), bytes_at_once or len(stream)):
        answer.feed(stream[at : at + (bytes_at_once or len(stream))], 1.0)
    answer.close(2.0)
    assert (answer.failure, answer.output_tokens, answer.input_tokens) == ("", tokens, 5)
    assert answer.counted is ("usage" in form and form != "no usage")


def answered(*times_s: float, begin_s: float = 0.0, tokens: int | None = None) -> ResponseRecord:
    answer = ResponseRecord(BenchRequest([1], 1, 4), begin_s)
    for index, time_s in enumerate(times_s):
        answer.feed(chunk("x", "length" if index == len(times_s) - 1 else None), begin_s + time_s)
    if tokens is not None:
        answer.feed(chunk(alone=True, usage=usage(10, tokens)), begin_s + times_s[-1] + 1)
    answer.close(begin_s + times_s[-1] + 2)
    return answer


def test_the_arithmetic() -> None:
    one, two = answered(0.5, 0.7, 1.5, begin_s=10), answered(1.0, 2.0, begin_s=11, tokens=5)
    failed = ResponseRecord(BenchRequest([1], 1, 4), 10.0)
    failed.fail("HTTP 500", "", 14.0)
    assert (one.timing.ttft_s, one.timing.e2el_s, one.timing.tpot_s) == pytest.approx((0.5, 1.5, 0.5))
    assert (two.timing.ttft_s, two.timing.e2el_s, two.timing.tpot_s) == pytest.approx((1.0, 2.0, 0.25))
    assert one.timing.itl_s == pytest.approx([0.2, 0.8])
    result = figures([one, two, failed], {"ttft": 600, "e2el": 1500.1}, ClientLoad(0.1, 1.0, 2.0))
    assert (result.duration_s, result.completed, result.failed, result.peak_concurrency) == (4.0, 2, 1, 3)
    assert (result.input_tokens, result.output_tokens, result.tokens_counted_by) == (11, 8, "usage and chunks")
    assert (result.output_tokens_per_s, result.total_tokens_per_s, result.goodput_per_s) == (2.0, 4.75, 0.25)
    assert (result.tokens_per_chunk, result.ended_early) == (1.6, 1)
    assert result.latency["itl"] == LatencyStats(mean_ms=666.667, p50_ms=800.0, p90_ms=1000.0, p99_ms=1000.0)
    assert LatencyStats.of([number / 1000 for number in range(101)]) == LatencyStats(50.0, 50.0, 90.0, 99.0)
    assert peak([(0, 2), (1, 3), (2, 4)]) == 2


def test_the_picture_holds_every_token() -> None:
    timings = [
        RequestTiming(0.0, [1.0], 1.0, 1),
        RequestTiming(0.0, [0.5, 0.5, 2.0], 2.0, 6),
        RequestTiming(1.0, [1.25, 1.9], 2.0, 2),
    ]
    drawn = svg("x", timings, runs=2)
    *_, line = re.findall(r'points="([^"]+)"', drawn)
    points = [tuple(map(float, point.split(","))) for point in line.split()]
    area = sum((after[0] - before[0]) * (plot.TOP + 2 * plot.PANEL + plot.GAP - before[1]) for before, after in pairwise(points))
    most = max(float(label) for label in re.findall(r'anchor="end"[^>]*>([\d.]+)<', drawn))
    assert area * most / plot.PANEL * 2.0 / (plot.WIDTH - plot.LEFT - plot.RIGHT) == pytest.approx(9 / 2, rel=0.01)


def test_arrivals() -> None:
    def gaps(rate: float | None, burstiness: float) -> list[float]:
        workload = Workload(
            endpoint="completions", prompts="ids", num_prompts=4001, num_warmups=0, request_rate=rate, burstiness=burstiness,
            max_concurrency=None, input_len=1, output_len=1, range_ratio=0, prefix_len=0, dataset=None, ignore_eos=True,
            temperature=0, seed=3,
        )  # fmt: skip
        times = arrivals_s(workload)
        assert len(times) == 4001 and times[0] == 0
        return [later - earlier for earlier, later in pairwise(times)]

    assert set(gaps(None, 1)) == {0}
    for burstiness in (0.25, 1.0, 4.0):  # a gamma distribution's variance is its mean squared, divided by the shape
        values = gaps(50.0, burstiness)
        mean = sum(values) / 4000
        assert mean == pytest.approx(1 / 50, rel=0.1)
        assert sum((value - mean) ** 2 for value in values) / 4000 == pytest.approx(mean**2 / burstiness, rel=0.2)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("--url ftp://127.0.0.1:8000", "--url must be an address such as http://127.0.0.1:8000, not 'ftp://127.0.0.1:8000'"),
        ("--url http://h:1 --port 8000", "--url has a host and a port: leave --host and --port out"),
        ("--backend tgi --dataset-name sharegpt", "not 'tgi'; --dataset-name must be one of random, custom, not 'sharegpt'"),
        ("--backend openai-chat --endpoint /v1/completions", "--backend openai-chat takes chat requests, and --endpoint"),
        ("--dataset-name custom", "--dataset-name custom: give --dataset, too"),
        (
            "--metric-percentiles 25,99 --top-p 0.9",
            "--metric-percentiles is refused: these are reported: leave it out; --top-p is",
        ),
        ("--save-result --output x.json", "--output and --save-result both name a file"),
        ("--url http://127.0.0.1:9", "--url http://127.0.0.1:9: no server answers: "),
        ("--num-prompts 0", "--num-prompts must be at least 1, not '0'"),
        ("--num-warmups -1", "--num-warmups must be at least 0, not '-1'"),
        ("--request-rate 0", "--request-rate must be above 0 or inf, not '0'"),
        ("--range-ratio 1", "--range-ratio must be below 1, not '1'"),
        ("--temperature x", "--temperature must be a number, not 'x'"),
        ("--burstiness 2", "--burstiness shapes the gaps between requests: give a --request-rate, too"),
        ("--endpoint embeddings", "--endpoint must be one of completions, chat, "),
        ("--goodput itl:5", "--goodput itl:5 is no bound such as ttft:500"),
        ("--goodput ttft:fast", "--goodput ttft:fast is no bound such as ttft:500"),
        ("--plot load.png", "--plot must be an .svg file"),
        ("--plot /nowhere/load.svg", "--plot /nowhere/load.svg: No such file or directory"),
        ("--output /nowhere/load.json", "--output /nowhere/load.json: No such file or directory"),
        ("--save-detailed", "--save-detailed writes into the report: give --output, too"),
        ("--dataset /nowhere.jsonl", "--dataset /nowhere.jsonl: No such file or directory"),
        ("--dataset {file} --input-len 3", "--input-len is for random prompts, --dataset has its own"),
        ("--dataset {file} --num-prompts 2 --output-len 1", "holds 1 prompts: give a longer file"),
        ("--dataset {file}", "line 1: output_len is None; --output-len is for lines without one"),
        ("--dataset {bad}", 'line 1: Object missing required field `prompt`; a line is {"prompt": "...", "output_len": 128}'),
        ("--api-key wrong --url {url}", "no such key (HTTP 401); give --api-key, or set TPSERVE_API_KEY"),
        ("--url {url}", "refuses the requests of this load: HTTP 400: it is 400"),
    ],
)
def test_what_cannot_be_measured_is_one_line(line: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, bad = tmp_path / "one.jsonl", tmp_path / "bad.jsonl"
    file.write_text('{"prompt": "x"}\n')
    bad.write_text('{"text": "x"}\n')
    with fake_openai_server(lambda call: 400) as server:
        arguments = [word.format(file=file, bad=bad, url=server.url) for word in line.split()]
        assert main(["bench", "serve", *arguments]) == 2
    printed = capsys.readouterr()
    assert (printed.out, printed.err.count("\n")) == ("", 1)
    assert printed.err.startswith("tpserve: error: ") and said in printed.err


def test_a_line_of_vllms(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    line = (
        f"--backend vllm --host 127.0.0.1 --port {server.port} --endpoint /v1/completions --dataset-name random "
        "--random-input-len 20 --random-output-len 4 --num-prompts 3 --request-rate inf --max-concurrency 2 --ignore-eos "
        "--percentile-metrics ttft,tpot,itl,e2el --metric-percentiles 50,99 --seed 7 --save-result --result-dir . --disable-tqdm"
    )
    assert main(["bench", "serve", *line.split()]) == 0
    (written,) = tmp_path.glob("vllm-infqps-concurrency2-*.json")
    report = json.loads(written.read_text())
    assert (report["figures"]["completed"], report["workload"]["seed"], report["workload"]["output_len"]) == (3, 7, 4)
    said = capsys.readouterr().err
    assert said.startswith("tpserve bench serve: these flags change nothing here: --percentile-metrics ttft,tpot,itl,e2el (")
    chat = f"--backend openai-chat --base-url 127.0.0.1:{server.port}/v1/ --num-prompts 1 --result-filename x.json"
    assert main(["bench", "serve", *chat.split(), *SMALL]) == 0
    assert json.loads((tmp_path / "x.json").read_text())["workload"]["endpoint"] == "chat"


def test_the_help_needs_neither_torch_nor_a_server() -> None:
    code = (
        "import sys; from tpserve.__main__ import main; main(['bench', '--help']); main(['bench', 'serve', '--help']);"
        "sys.exit(bool({'torch', 'aiohttp'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0 and "tpserve bench step" in done.stdout and "--request-rate X" in done.stdout
