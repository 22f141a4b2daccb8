"""`LLM` with real ranks: in this process, in plain scripts, in a loop that runs, under torchrun; what it says, how it ends."""

import asyncio
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster import tiny_model
from tests.cluster.conftest import assert_nothing_left, of_place
from tests.server import BIN, Server, free_port, running, serve
from tpserve import LLM, EngineFailure, RequestOutput, SamplingParams, UserError

ROOT = Path(__file__).resolve().parents[2]
FLOAT32 = {"device": "cpu", "dtype": "float32", "log_level": "warning"}
PIPES: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
LONG = SamplingParams(max_tokens=1900, ignore_eos=True)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(tensor_parallel_size=2, **FLOAT32) as llm:
        yield llm


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    port = free_port()
    command = serve("--device", "cpu", "--dtype", "float32", port=port)
    with running([command], port, tmp_path_factory.mktemp("server") / "log") as server:
        yield server
        server.stop()


def script(place: Path, text: str, *launcher: str, **environ: str) -> "subprocess.Popen[str]":
    """A script of a user, without a main guard."""
    path = place / f"script-{time.monotonic_ns()}.py.log"  # the suffix that `assert_nothing_left` looks past
    path.write_text(text)
    command = [*(launcher or (sys.executable,)), str(path)]
    env = {**os.environ, "TMPDIR": str(place), "OMP_NUM_THREADS": "1", **environ}
    return subprocess.Popen(command, env=env, start_new_session=True, **PIPES)


def finished(process: "subprocess.Popen[str]", timeout_s: float = 60.0) -> str:
    """What it printed; it must end well."""
    out, err = process.communicate(timeout=timeout_s)
    assert process.returncode == 0, err
    return out


# What it answers

ASKED: list[tuple[str, dict[str, Any]]] = [
    ("Once upon a time", {"temperature": 0.0, "max_tokens": 12}),
    ("The harbour of", {"seed": 7, "max_tokens": 12, "logprobs": 2, "n": 2}),
    ("Mina said", {"seed": 8, "max_tokens": 40, "stop": [" the"], "top_p": 0.9, "repetition_penalty": 1.1}),
]
PIPELINE = """
import json
from tpserve import LLM, SamplingParams
asked = json.loads({asked!r})
llm = LLM(pipeline_parallel_size=2, device="cpu", dtype="float32")
outputs = llm.generate([prompt for prompt, _ in asked], [SamplingParams(**fields) for _, fields in asked])
print(json.dumps([[[o.token_ids, o.text, o.finish_reason] for o in r.outputs] for r in outputs]))
"""


def told(outputs: list[RequestOutput]) -> list[Any]:
    return [[[o.token_ids, o.text, o.finish_reason] for o in output.outputs] for output in outputs]


def test_the_servers_tokens(llm: LLM, server: Server, place: Path) -> None:
    """TP 2 in this process, PP 2 in a script without a main guard, and the server with one rank."""
    pipeline = script(place, PIPELINE.format(asked=json.dumps(ASKED)))
    served = []
    for prompt, fields in ASKED:
        status, body = server.post("/v1/completions", {"prompt": prompt, "return_token_ids": True, **fields})
        assert status == 200, body
        served.append([[c["token_ids"], c["text"], c["finish_reason"]] for c in body["choices"]])
    assert told(llm.generate([p for p, _ in ASKED], [SamplingParams(**fields) for _, fields in ASKED])) == served
    out, err = pipeline.communicate(timeout=60)
    assert pipeline.returncode == 0 and json.loads(out) == served, err
    assert re.search(r"^3/3 prompts in [\d.]+ s, [\d,]+ tokens/s$", err, re.M), err
    assert_nothing_left(place, timeout_s=2.0)


def test_chat_is_the_servers(llm: LLM, server: Server) -> None:
    messages = [{"role": "user", "content": "Hello!"}]
    status, body = server.post("/v1/chat/completions", {"messages": messages, "seed": 5, "max_tokens": 16})
    assert status == 200
    [one, two] = llm.chat([messages, messages], SamplingParams(seed=5), use_tqdm=False)
    assert one.outputs[0].text == two.outputs[0].text == body["choices"][0]["message"]["content"]
    assert one.prompt is not None and "Hello!" in one.prompt
    [plain] = llm.chat(messages, SamplingParams(max_tokens=1), use_tqdm=False, chat_template="<{{ messages[0].content }}>")
    assert plain.prompt == "<Hello!>"


def test_a_fork_is_told_that_it_has_no_engine(llm: LLM) -> None:
    reader, writer = os.pipe()
    if (pid := os.fork()) == 0:
        try:
            llm.generate("x")
        except UserError as error:
            os.write(writer, str(error).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as said:
        assert "in the process that made it" in said.read()
    os.waitpid(pid, 0)
    assert llm.generate("x", use_tqdm=False)[0].finished


def test_shapes_of_prompts(llm: LLM, capfd: pytest.CaptureFixture[str]) -> None:
    greedy = SamplingParams(temperature=0, max_tokens=4)
    [text] = llm.generate("Once upon a time", greedy, use_tqdm=False)
    ids = text.prompt_token_ids
    shapes: list[Any] = [ids, [ids], {"prompt_token_ids": ids}, iter([{"prompt": "Once upon a time", "multi_modal_data": None}])]
    shapes.append(["Once upon a time", {"prompt": "whatever it is", "prompt_token_ids": ids, "cache_salt": "mine"}])
    for prompts in shapes:
        outputs = llm.generate(prompts, greedy, use_tqdm=False)
        assert [o.prompt_token_ids for o in outputs] == [ids] * len(outputs)
        assert {o.outputs[0].text for o in outputs} == {text.outputs[0].text}
    assert [o.prompt for o in outputs] == ["Once upon a time", "whatever it is"] and outputs[1].num_cached_tokens == 0
    assert int(outputs[1].request_id) == int(outputs[0].request_id) + 1 and outputs[0].finished
    assert llm.generate([]) == llm.chat([]) == []
    assert len(llm.generate(ids, use_tqdm=False)[0].outputs[0].token_ids) <= 16, "vLLM's default"
    assert capfd.readouterr().err == ""


def test_what_an_output_holds(llm: LLM) -> None:
    [output] = llm.generate(
        "Once upon a time", SamplingParams(seed=1, max_tokens=5, logprobs=2, prompt_logprobs=1), use_tqdm=False
    )
    [choice] = output.outputs
    assert choice.logprobs is not None and len(choice.logprobs) == len(choice.token_ids) == 5
    chosen = [at[token].logprob for at, token in zip(choice.logprobs, choice.token_ids, strict=True)]
    assert choice.cumulative_logprob == pytest.approx(sum(chosen)) and all(2 <= len(at) <= 3 for at in choice.logprobs)
    assert all(sorted(p.rank for p in at.values() if p.rank) == [1, 2] for at in choice.logprobs)
    assert "".join(at[t].decoded_token or "" for at, t in zip(choice.logprobs, choice.token_ids, strict=True)) == choice.text
    assert output.prompt_logprobs is not None and output.prompt_logprobs[0] is None
    scored = zip(output.prompt_logprobs[1:], output.prompt_token_ids[1:], strict=True)
    assert all(at is not None and id in at for at, id in scored)
    times = output.metrics
    assert 0 <= time.time() - times.arrival_time < 60 and times.num_generation_tokens == len(times.token_ts) == 5
    assert times.queued_ts <= times.scheduled_ts < times.first_token_ts < times.last_token_ts <= time.monotonic()
    assert times.first_token_ts - times.queued_ts <= times.first_token_latency < 60 and times.token_ts == sorted(times.token_ts)
    drawn = llm.generate("The", SamplingParams(seed=1, n=5, logprobs=0, max_tokens=6), use_tqdm=False)[0].outputs
    best = llm.generate("The", SamplingParams(seed=1, n=2, best_of=5, max_tokens=6), use_tqdm=False)[0].outputs
    ranked = sorted(drawn, key=lambda o: (o.cumulative_logprob or 0.0) / len(o.token_ids), reverse=True)
    assert [o.token_ids for o in best] == [o.token_ids for o in ranked[:2]] and [o.index for o in best] == [0, 1]
    assert best[0].logprobs is None and best[0].cumulative_logprob is None
    [stopped] = llm.generate("The", SamplingParams(seed=1, n=2, max_tokens=40, stop=[" "]), use_tqdm=False)
    assert stopped.metrics.num_generation_tokens == sum(len(choice.token_ids) for choice in stopped.outputs)
    [ids_only] = llm.generate("The", SamplingParams(seed=1, max_tokens=6, detokenize=False), use_tqdm=False)
    assert ids_only.outputs[0].token_ids == drawn[0].token_ids and ids_only.outputs[0].text == ""


def test_the_context_bounds_max_tokens(llm: LLM) -> None:
    ids = [5, 6, 7, 8] * 510
    for asked in (None, 500):
        [output] = llm.generate(ids, SamplingParams(max_tokens=asked, ignore_eos=True), use_tqdm=False)
        assert len(output.outputs[0].token_ids) == 8 and output.outputs[0].finish_reason == "length"
    again = llm.generate(ids, use_tqdm=False)[0]
    assert again.num_cached_tokens > 2000


@pytest.mark.parametrize(
    ("prompts", "params", "said"),
    [
        ("word " * 4000, None, "maximum context length is 2048 tokens"),
        (["fine", [1 << 30]], None, "prompts[1]: prompt: token id 1073741824 is out of vocabulary"),
        (["fine", 3.5], None, "prompts[1] must be a text or a list of token ids, not float"),
        (3, None, "prompts must be a prompt or a list of them, not int"),
        ([["a", 1]], None, "prompts[0] must be a text or a list of token ids, not a list of str"),
        ([{"prompt": "x", "multi_modal_data": {}}], None, "prompts[0]: multi_modal_data is not supported"),
        ("half \ud800", None, "half of a surrogate pair"),
        ("x", {"n": 2}, "sampling_params must be one SamplingParams or a list of 1"),
        ("x", [SamplingParams()] * 2, "a list of 1, one for each prompt"),
        ("x", SamplingParams(stop_token_ids=[1 << 30]), "stop_token_ids: token id 1073741824"),
    ],
)
def test_what_cannot_be_asked(llm: LLM, prompts: Any, params: Any, said: str) -> None:
    with pytest.raises(UserError) as error:
        llm.generate(prompts, params, use_tqdm=False)
    assert said in str(error.value) and "\n" not in str(error.value)


# Where it runs


def test_a_loop_that_runs(llm: LLM) -> None:
    """A notebook's cells run inside an event loop of the main thread."""

    async def cell() -> str:
        return llm.generate("Once", SamplingParams(temperature=0), use_tqdm=False)[0].outputs[0].text

    assert asyncio.run(cell()) == llm.generate("Once", SamplingParams(temperature=0), use_tqdm=False)[0].outputs[0].text


def test_an_interactive_interpreter_with_a_loop(place: Path) -> None:
    """`python -m asyncio` is what a notebook's kernel is: lines from outside, run in a loop that runs."""
    lines = [
        "from tpserve import LLM, SamplingParams",
        "llm = LLM(device='cpu', log_level='warning')",
        "import asyncio; await asyncio.sleep(0)",
        "print('said', len(llm.generate(['a', 'b'], SamplingParams(max_tokens=3, ignore_eos=True))))",
        "exit()",
    ]
    process = subprocess.Popen([sys.executable, "-m", "asyncio"], env={**os.environ, "TMPDIR": str(place)}, **PIPES)
    out, err = process.communicate("\n".join(lines) + "\n", timeout=60)
    assert "said 2" in out and "Traceback" not in err, (out, err)
    assert_nothing_left(place, timeout_s=2.0)


def test_ctrl_c_ends_the_call_and_not_the_engine(llm: LLM) -> None:
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    began_s = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["x"] * 300, LONG, use_tqdm=False)
    assert time.monotonic() - began_s < 2.0
    assert llm.generate("Once", SamplingParams(max_tokens=2, ignore_eos=True), use_tqdm=False)[0].finished
    assert time.monotonic() - began_s < 4.0, "what was interrupted is not computed any more"


def test_docs(place: Path) -> None:
    """The code of docs/offline.md, one block after another, as one script."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "offline.md").read_text(), re.S)
    out = finished(script(place, "\n".join(blocks), TPSERVE_ARG_PORT="1"))
    assert len(out.splitlines()) >= 3
    assert_nothing_left(place, timeout_s=2.0)


# How it fails, and how it ends


def test_a_killed_rank_changes_nothing(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(place))
    monkeypatch.setenv("TMPDIR", str(place))
    llm = LLM(tensor_parallel_size=2, **FLOAT32)
    params = SamplingParams(max_tokens=300, ignore_eos=True, temperature=0.9, seed=4)
    wanted = [output.outputs[0].token_ids for output in llm.generate(["x"] * 4, params, use_tqdm=False)]
    rank = min(pid for pid in of_place(place) if Path(f"/proc/{pid}/comm").read_text().startswith("tpserve rank "))
    threading.Timer(0.2, os.kill, (rank, signal.SIGKILL)).start()
    assert [output.outputs[0].token_ids for output in llm.generate(["x"] * 4, params, use_tqdm=False)] == wanted
    llm.close()
    assert_nothing_left(place, timeout_s=1.0)


def test_a_killed_agent_is_named(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(place))
    monkeypatch.setenv("TMPDIR", str(place))
    llm = LLM(tensor_parallel_size=2, **FLOAT32)
    (agent,) = [
        pid
        for pid in of_place(place)
        if b"tpserve.agent" in Path(f"/proc/{pid}/cmdline").read_bytes()
        and not Path(f"/proc/{pid}/comm").read_text().startswith("tpserve")  # what it has forked calls itself so
    ]
    killed: list[float] = []
    threading.Timer(0.5, lambda: (killed.append(time.monotonic()), os.kill(agent, signal.SIGKILL))).start()
    with pytest.raises(EngineFailure, match=f"the agent \\(pid {agent}\\) that started the ranks has ended"):
        llm.generate(["x"] * 8, LONG, use_tqdm=False)
    assert time.monotonic() - killed[0] < 3.0
    for _ in range(2):
        with pytest.raises(EngineFailure, match=f"pid {agent}"):
            llm.generate("x")
    llm.close()
    llm.close()
    assert_nothing_left(place, timeout_s=1.0)
    with pytest.raises(EngineFailure):
        llm.generate("x")


@pytest.mark.parametrize("delay_s", [0.0, 1.0])
def test_ctrl_c_while_starting_leaves_nothing(delay_s: float, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(place))
    monkeypatch.setenv("TMPDIR", str(place))

    def interrupt() -> None:
        while not list(place.iterdir()):
            time.sleep(0.001)
        time.sleep(delay_s)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    began_s = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        LLM(tensor_parallel_size=2, **FLOAT32)
    assert time.monotonic() - began_s < 5.0
    assert_nothing_left(place, timeout_s=1.0)


@pytest.mark.parametrize("moment", ["starting", "generating"])
def test_nothing_outlives_a_killed_script(moment: str, place: Path) -> None:
    text = "from tpserve import LLM, SamplingParams\nllm = LLM(device='cpu', tensor_parallel_size=2)\nprint('up', flush=True)\n"
    process = script(place, text + "llm.generate('x', SamplingParams(max_tokens=1900, ignore_eos=True))\n")
    assert process.stdout is not None
    if moment == "generating":
        assert process.stdout.readline() == "up\n"
        time.sleep(0.2)
    else:
        deadline_s = time.monotonic() + 20.0
        while len(of_place(place)) < 3:  # the script, its tempdir reaper, its agent
            assert time.monotonic() < deadline_s and process.poll() is None
            time.sleep(0.01)
    assert list(place.glob("tpserve-*"))
    process.kill()
    process.communicate()
    assert_nothing_left(place, timeout_s=5.0)


def test_what_cannot_be_loaded_is_one_line(tmp_path: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(place))
    with pytest.raises(UserError, match="no model directory /no/such/model: give the path"):
        LLM("/no/such/model")
    with pytest.raises(UserError, match="unknown keyword tensor_paralel_size: did you mean tensor_parallel_size"):
        LLM(tensor_paralel_size=2)
    model = tiny_model.save(tmp_path)
    config = json.loads((model / "config.json").read_text())
    config |= {"max_position_embeddings": 1 << 20, "num_hidden_layers": 16, "hidden_size": 256, "num_key_value_heads": 4}
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError) as error:
        LLM(model, load_format="dummy", max_num_seqs=1, device="cpu", log_level="error")
    assert "pass --max-model-len" in str(error.value) and "\n" not in str(error.value), error.value
    assert_nothing_left(place, timeout_s=1.0)


# Under torchrun

JOB = """
import json, os, signal, sys, threading, time
from pathlib import Path
from tpserve import LLM, EngineFailure, SamplingParams, UserError
rank = os.environ["RANK"]
llm = LLM(pipeline_parallel_size=2, device="cpu", dtype="float32", log_level="warning",
          override_generation_config={{"temperature": 0, "max_new_tokens": 12}})
asked = [SamplingParams(temperature=0.0, max_tokens=12), SamplingParams(max_tokens=5)]
outputs = llm.generate(["Once upon a time", "The harbour"], asked)
said = {{"outputs": [[r.prompt, r.outputs[0].token_ids, r.outputs[0].text] for r in outputs]}}
said["times"] = [r.metrics.token_ts for r in outputs]
said["default"] = llm.generate("Once upon a time")[0].outputs[0].token_ids
said["params"] = vars(llm.get_default_sampling_params())
try:
    llm.generate("word " * 4000)
except UserError as error:
    said["refused"] = str(error)
if rank == "1" and {kill}:
    [task] = [p for p in Path("/proc/self/task").glob("*/children") if p.read_text()]
    child = int(task.read_text().split()[0])
    threading.Timer(1.0, os.kill, (child, signal.SIGKILL)).start()
if {kill}:
    began_s = time.monotonic()
    for attempt in ("failed", "again"):
        try:
            llm.generate(["x"] * 8, SamplingParams(max_tokens=1900, ignore_eos=True))
        except EngineFailure as error:
            said[attempt] = str(error)
    said["took_s"] = time.monotonic() - began_s
Path(os.environ["TMPDIR"], f"said{{rank}}.log").write_text(json.dumps(said))
"""


EXAMPLE = (ROOT / "docs" / "examples" / "offline_two_ranks.py").read_text()
"""Runs at the end of the job on one node."""
PROMPTS = ["Once upon a time", "In the harbour of Tidewick", "Mina the beekeeper"]


def agent(node: int, nodes: int, port: int) -> tuple[str, ...]:
    own = 2 // nodes
    return (str(BIN / "torchrun"), "--nnodes", str(nodes), "--node_rank", str(node), "--nproc_per_node", str(own),
            "--master_addr", "127.0.0.1", "--master_port", str(port))  # fmt: skip


@pytest.mark.parametrize(("nodes", "kill"), [(1, False), (2, True)])
def test_torchrun(nodes: int, kill: bool, place: Path, llm: LLM) -> None:
    """One agent with two scripts, two agents with one each (as on two nodes): the same list on both, the same exceptions."""
    port, text = free_port(), JOB.format(kill=kill)
    if nodes == 1:
        text += f"llm.close()\n{EXAMPLE}"
    jobs = [script(place, text, *agent(node, nodes, port)) for node in reversed(range(nodes))]
    out = "".join(finished(job) for job in jobs)
    assert re.findall(r"(?m)^(.*) \.\.\. ", out) == PROMPTS[: 3 if nodes == 1 else 0]
    first, second = (json.loads((place / f"said{rank}.log").read_text()) for rank in range(2))
    took_s = [said.pop("took_s", 0.0) for said in (first, second)]
    assert first == second
    greedy = llm.generate("Once upon a time", SamplingParams(temperature=0, max_tokens=12), use_tqdm=False)[0].outputs[0]
    assert first["outputs"][0] == ["Once upon a time", greedy.token_ids, greedy.text]
    assert (first["default"], first["params"]) == (greedy.token_ids, vars(SamplingParams(temperature=0, max_tokens=12)))
    assert "maximum context length" in first["refused"]
    if kill:
        assert re.match(r"rank 1 on .* \(pid \d+\) ", first["failed"]) and first["failed"] == first["again"]
        assert max(took_s) < 10.0
    for left in place.glob("torchelastic_*"):  # torchrun's habit
        shutil.rmtree(left)
    assert_nothing_left(place, timeout_s=2.0)
