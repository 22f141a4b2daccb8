"""tpserve without what only its tests need: no NumPy, transformers or openai, no pytest, no compiler."""

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.bare.installation import ROOT, Installation, required
from tests.cluster.test_experts import ACTIVE, EXPERTS, MIXTRAL, save, tokens_of
from tests.server import Server, free_port, running

ABSENT = (
    *("numpy", "transformers", "openai", "pytest", "hypothesis", "ruff", "mypy", "jsonschema", "kubernetes_validate", "pip"),
    "tests",
)
SCRIPT = """
from tpserve import LLM, SamplingParams
llm = LLM(device="cpu", log_level="warning")
print(len(llm.generate("Once upon a time", SamplingParams(max_tokens=8))[0].outputs[0].token_ids))
"""


@pytest.fixture(scope="module")
def server(bare: Installation, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The built-in model on one rank; the mixture has two."""
    port = free_port()
    command = bare.command("tpserve", "serve", "-tp", "1", "--device", "cpu", "--port", str(port))
    with running([command], port, tmp_path_factory.mktemp("served") / "log") as server:
        yield server
        assert server.stop() == [0]
        server.assert_nothing_left()


def printed(bare: Installation, *words: str) -> str:
    """What a command of the installation prints. It must end well and say nothing of NumPy."""
    done = bare.run(*words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "numpy" not in done.stderr.lower(), done.stderr
    return done.stdout


def test_nothing_else_is_there(bare: Installation) -> None:
    code = (
        "import importlib.metadata, importlib.util, json, shutil\n"
        f"found = [name for name in {list(ABSENT)} if importlib.util.find_spec(name)]\n"
        "found += filter(shutil.which, ('cc', 'gcc', 'clang', 'c++', 'git'))\n"
        "print(json.dumps([found, sorted(d.name.lower() for d in importlib.metadata.distributions())]))"
    )
    found, distributions = json.loads(printed(bare, "python", "-c", code))
    assert found == []
    assert distributions == sorted(["tpserve", *(distribution.name.lower() for distribution in required())])


def test_the_built_in_model(server: Server) -> None:
    assert server.complete("Once upon a time", max_tokens=12)["text"]
    assert "numpy" not in server.log.lower() and "Warning" not in server.log, server.log


def test_bench_serve_status_and_report(bare: Installation, server: Server) -> None:
    bench = printed(bare, "tpserve", "bench", "serve", "--url", server.url, "--num-prompts", "4", "--output-len", "4")
    assert "completed" in bench and "TTFT" in bench
    assert "tidewick" in printed(bare, "tpserve", "status", "--url", server.url)
    printed(bare, "tpserve", "report", "--url", server.url, "--output", "report.json")
    packages = json.loads((bare.home / "report.json").read_text())["here"]["packages"]
    assert packages["torch"] and packages["numpy"] is None


def test_a_mixture(bare: Installation, tmp_path: Path) -> None:
    """It counts its experts' tokens in the thread that also answers heartbeats."""
    port, model = free_port(), save(tmp_path, MIXTRAL)
    flags = ("-tp", "2", "--enable-expert-parallel", "--device", "cpu", "--load-format", "dummy", "--served-model-name", "tiny")
    command = bare.command("tpserve", "serve", model, *flags, "--port", str(port))
    with running([command], port, tmp_path / "log") as server:
        body = {"model": "tiny", "prompt": [7, 8, 9], "max_tokens": 6, "temperature": 0, "ignore_eos": True}
        for _ in range(2):
            assert server.post("/v1/completions", body)[0] == 200, server.log
        deadline_s = time.monotonic() + 10
        while not (counts := tokens_of(server)):
            assert time.monotonic() < deadline_s, server.log
            time.sleep(0.2)
        assert sum(counts.values()) % ACTIVE == 0 and {expert for _, expert in counts} <= set(range(EXPERTS))
        assert server.get("/readyz")[0] == 200 and "numpy" not in server.log.lower()
        assert server.stop() == [0]


def test_llm(bare: Installation) -> None:
    (bare.home / "script.py").write_text(SCRIPT)
    assert printed(bare, "python", "script.py").strip() == "8"


def test_plan_and_doctor(bare: Installation) -> None:
    assert "torchrun" in printed(bare, "tpserve", "plan", "--gpus", "2", "--gpu-memory", "16GB")
    assert "torch" in printed(bare, "tpserve", "doctor", "-tp", "1", "--device", "cpu")


def test_what_the_tests_need_is_absent() -> None:
    """A new package of the test extra is one that the product must do without."""
    setup = (ROOT / "setup.py").read_text()
    extra = setup.partition('"test": [')[2].partition("]")[0]
    names = {name.replace("-", "_") for name in re.findall(r'"([\w-]+)[<>=]', extra)}
    names -= {distribution.name.replace("-", "_") for distribution in required()}
    assert names and names <= set(ABSENT), names - set(ABSENT)
