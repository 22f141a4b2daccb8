"""The `tpserve` command up to the moment a process would be started: what it prints, and the exit code."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cluster import tiny_model
from tpserve import supervisor
from tpserve.__main__ import COMMANDS, main
from tpserve.cli.commands import ABOUT
from tpserve.cluster.discovery import read_failure
from tpserve.config import env
from tpserve.config.flags import Flags
from tpserve.supervisor import curl_line
from tpserve.types.model_files import ModelFiles
from tpserve.types.model_spec import ModelSpec
from tpserve.version import __version__


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model.save(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(autouse=True)
def no_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(supervisor, "visible_gpus", lambda: 0)


def edited(model: Path, where: Path, edit: Callable[[Path], None]) -> Path:
    copy = Path(shutil.copytree(model, where / "m"))
    edit(copy)
    return copy


def drop_field(directory: Path) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text())
    del config["num_attention_heads"]
    path.write_text(json.dumps(config))


def error_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of a user error."""
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("tpserve: error: ") and said.err.count("\n") == 1
    return said.err.removeprefix("tpserve: error: ").rstrip("\n")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("-tp 5", "--tensor-parallel-size 5, but the model has 4 attention heads"),
        ("-pp 4", "--pipeline-parallel-size 4, but the model has 3 layers"),
        ("--nproc-per-node 2 -tp 1", "--tensor-parallel-size 1 x --pipeline-parallel-size 1 = 1: run `tpserve serve"),
        ("--prot 1", "unknown flag --prot: did you mean --port?"),
        ("--nnodes 2", "--nnodes 2 needs --master-addr"),
        ("--nnodes 2 --node-rank 2 --master-addr x", "--node-rank 2 with --nnodes 2: nodes count from 0 to 1"),
        ("--headless", "--headless on node 0, which answers HTTP"),
        ("--num-gpus 2", "--num-gpus belongs to Ray"),
        ("--device cuda", "--device cuda, but no GPU is visible"),
        ("--max-model-len 257", "--max-model-len 257 is beyond the model's 256 positions"),
    ],
)
def test_what_is_refused_before_anything_starts(flags: str, said: str, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert said in error_of(["serve", str(model), *flags.split()], capsys)


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda d: (d / "config.json").unlink(), "config.json does not exist"),
        (lambda d: (d / "config.json").write_text('{"vocab'), "config.json is not valid JSON"),
        (drop_field, "field 'num_attention_heads' is missing"),
    ],
)
def test_models_that_cannot_be(
    edit: Callable[[Path], None], said: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in error_of(["serve", str(edited(model, tmp_path, edit))], capsys)


def test_no_such_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert "no model directory /nowhere" in error_of(["serve", "/nowhere"], capsys)


def test_neither_torchrun_nor_serve(capsys: pytest.CaptureFixture[str]) -> None:
    said = error_of(["my model", "-tp", "2"], capsys)
    assert "run `tpserve serve 'my model' -tp 2` or `torchrun --nproc-per-node 2 -m tpserve 'my model' -tp 2`" in said
    assert "there is no command serv: did you mean `tpserve serve --port 3`?" in error_of(["serv", "--port", "3"], capsys)


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["serve", "--help"], ["serve", "m", "-h"], ["help", "serve"]):
        assert main(arguments) == 0
        assert "--tensor-parallel-size, -tp N" in capsys.readouterr().out
    for arguments in (["--version"], ["version"], ["-v"]):
        assert main(arguments) == 0
        assert capsys.readouterr().out == f"tpserve {__version__}\n"


def test_the_overview_has_a_line_for_each_command(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["help"], ["--help"], ["-h"]):
        assert main(arguments) == 0
        page = capsys.readouterr().out
        listed = re.findall(r"(?m)^  (\w+) +\w", page.partition("commands:\n")[2])
        assert listed == [name for name in COMMANDS if name.isalpha() and name != "ray"]
    for command in set(ABOUT) - {"serve", "help", "version"}:
        assert main(["help", command]) == 0
        assert f"tpserve {command}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "meant"),
    [("run m -tp 2", "serve m -tp 2"), ("collect-env", "report"), ("ps", "status"), ("benchmark serve", "bench serve"),
     ("help run", "serve")],
)  # fmt: skip
def test_commands_of_other_servers(line: str, meant: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert error_of(line.split(), capsys).endswith(f": did you mean `tpserve {meant}`?")


def test_a_gguf_says_what_is_served(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model-Q4_K_M.gguf").touch()
    for given in (tmp_path, tmp_path / "model-Q4_K_M.gguf", tmp_path / "none.gguf", "ORG/NAME/x.gguf"):
        said = error_of(["serve", str(given)], capsys)
        assert ".gguf" in said and "tpserve does not read GGUF; give the original model" in said
    (tmp_path / "model.safetensors").touch()
    assert "--model takes the directory that it is in" in error_of(["serve", str(tmp_path / "model.safetensors")], capsys)


def test_what_holds_anyway_is_one_line_of_the_log(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(supervisor, "serve", lambda *_: 0)
    assert main(["serve", "--use-v2-block-manager", "--swap-space", "0"]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert "INFO  these flags change nothing here: --use-v2-block-manager (" in line and "--swap-space 0 (" in line


def test_a_terminal_has_colors_and_a_pipe_none() -> None:
    command = [sys.executable, "-m", "tpserve", "serve", "/nowhere", "--use-v2-block-manager"]
    environ = {name: text for name, text in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR", "RANK")}
    ours, theirs = os.openpty()
    subprocess.run(command, stderr=theirs, env=environ | {"TERM": "xterm"}, check=False, timeout=60)
    os.close(theirs)
    assert b"\033[32mINFO \033[0m these flags" in os.read(ours, 4096)
    os.close(ours)
    piped = subprocess.run(command, capture_output=True, env=environ | {"TERM": "xterm"}, check=False, timeout=60).stderr
    assert b"INFO  these flags" in piped and b"\033" not in piped


def test_the_builtin_model_and_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[tuple[Flags, ModelFiles, ModelSpec]] = []
    monkeypatch.setattr(supervisor, "serve", lambda *arguments: served.append(arguments) or 0)
    monkeypatch.setattr(env, "overrides", lambda: {"port": "9", "api_key": "k"})
    assert main(["serve"]) == 0
    [(flags, files, spec)] = served
    assert files.directory == files.tokenizer == flags.model and Path(files.directory, "config.json").exists()
    assert len(flags.served_model_name) == 1
    assert (flags.port, flags.api_key, spec.family) == (9, "k", "llama")


def test_a_rank_tells_torchrun_too(model: Path, tmp_path: Path) -> None:
    """Only the first rank of a node prints; each writes the file that torchrun reports from."""
    for local_rank, printed in ((0, True), (1, False)):
        report = tmp_path / f"error{local_rank}.json"
        rank = {
            "RANK": str(local_rank), "LOCAL_RANK": str(local_rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
            "TORCHELASTIC_ERROR_FILE": str(report), "PATH": "/bin",
        }  # fmt: skip
        command = [sys.executable, "-m", "tpserve", str(model), "-tp", "3"]
        done = subprocess.run(command, env=rank, capture_output=True, text=True, check=False, timeout=30)
        assert done.returncode == 2
        assert done.stderr.startswith("tpserve: error: 2 ranks were started but") is printed
        assert json.loads(report.read_text())["message"]["message"].startswith("2 ranks were started but")


def test_what_ends_a_rank_before_anybody_knows_it_is_left_for_the_frontend(tmp_path: Path) -> None:
    """No frontend comes: the rank can tell nobody, and the agent sees an exit code."""
    where = tmp_path / "run"
    where.mkdir(mode=0o700)
    ranks = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    flags = ("-tp", "2", "--device", "cpu", "--start-timeout", "1")
    ended = subprocess.run(
        [sys.executable, "-m", "tpserve", *flags],
        env={**os.environ, **ranks, "TPSERVE_RUNTIME_DIR": str(where)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    failure = read_failure(where)
    assert ended.returncode == 3 and failure is not None and failure.code == 1
    assert "rank 1 (pid " in failure.why and "the frontend was not ready within" in failure.why
    assert "Traceback" not in ended.stderr and "ERROR rank 1 fails: the frontend was not ready" in ended.stderr


def test_a_line_to_paste() -> None:
    line = curl_line("http://127.0.0.1:8000", keyed=True)
    body = line.split(" -d '")[1].removesuffix("'")
    assert json.loads(body)["max_tokens"] > 0
    assert "http://127.0.0.1:8000/v1/completions" in line and "$TPSERVE_API_KEY" in line
    assert "KEY" not in curl_line("http://127.0.0.1:8000", keyed=False)
