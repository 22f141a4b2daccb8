"""The README is run: its two-node lines, their log, its curl line and its Python; every other command of it is understood."""

import contextlib
import io
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.server import BIN, Server, free_port, running
from tpserve.cli import server_flags
from tpserve.config.resolve import num_local_ranks, resolve
from tpserve.models import model_spec
from tpserve.types.machine import Machine
from tpserve.types.model_files import ModelFiles

README = (Path(__file__).resolve().parents[2] / "README.md").read_text()
LLAMA_70B = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 128256, "hidden_size": 8192, "intermediate_size": 28672,
    "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8, "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "torch_dtype": "bfloat16", "tie_word_embeddings": False, "hidden_act": "silu",
    "bos_token_id": 128000, "eos_token_id": 128001,
}  # fmt: skip


def lines(start: str) -> list[str]:
    """Indented lines of the README that begin with a word, without what a shell would drop."""
    text = README.replace("\\\n", " ")
    return [line.strip().partition("  #")[0] for line in text.splitlines() if line.startswith(f"    {start}")]


TWO_NODES = [line for line in lines("torchrun") if "127.0.0.1" in line]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    port, meeting = free_port(), free_port()
    commands = [
        [*shlex.split(f"{BIN}/{line}".replace(" -m tpserve", f" --master_port {meeting} -m tpserve")), "--port", str(port)]
        for line in TWO_NODES
    ]
    with running(commands, port, tmp_path_factory.mktemp("readme") / "log") as server:
        yield server
        server.stop()
        server.assert_nothing_left()


def shape(line: str) -> str:
    """A log line without its numbers, units and paths, and without the parts of a start, which are told if they took long."""
    line = re.sub(r"start: agent .* s$", "start", line)
    line = re.sub(r"\([^()]*builtin/model\)", "(model)", line)
    line = re.sub(r"http://[\d.:]+", "URL", line)
    return re.sub(r"[\d,.]+ (B|KiB|MiB|GiB|GB)|[\d,.]*\d", "N", line)


def test_the_two_node_log(server: Server) -> None:
    assert len(TWO_NODES) == 2
    shown = [shape(line) for line in README.split("```")[1].strip().splitlines()]
    printed = [shape(line) for line in server.log.splitlines() if line.startswith("[") and "waiting for" not in line]
    assert sorted(printed[-2:]) == sorted(shown[-2:]), "two processes say that it is ready"
    own = [line for line in shown[:-2] if line.startswith("[nN rN sN] N:N:N INFO  node N")]
    assert len(own) == 2, "one for each node, in any order"
    assert sorted(printed[:-2]) == sorted(shown[:-2])
    assert [line for line in printed[:-2] if line not in own] == [line for line in shown[:-2] if line not in own]


def test_the_curl_line(server: Server) -> None:
    (line,) = lines("curl")
    command = shlex.split(line.replace(":8000", f":{server.port}"))
    answer = subprocess.run(["curl", "-s", *command[1:]], capture_output=True, text=True, timeout=60, check=True)
    assert '"text":"' in answer.stdout


def test_the_python_lines(server: Server) -> None:
    block = re.search(r"(?m)^    from openai.*\n(?:    .*\n)+", README)
    assert block is not None
    code = "\n".join(line.strip() for line in block.group().splitlines()).replace(":8000", f":{server.port}")
    with contextlib.redirect_stdout(io.StringIO()) as said:
        exec(code, {})  # noqa: S102
    assert len(said.getvalue()) > 3


def test_the_bench_line(server: Server, tmp_path: Path) -> None:
    (line,) = lines("tpserve bench")
    command = shlex.split(f"{BIN}/{line.replace(':8000', f':{server.port}')}")
    table = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True, cwd=tmp_path).stdout
    assert "completed   20 in " in table and "TTFT" in table and (tmp_path / "load.svg").stat().st_size > 1000


@pytest.mark.parametrize("line", [*lines("torchrun"), *lines("tpserve serve")])
def test_every_command_is_understood(line: str) -> None:
    launcher, _, rest = line.partition("tpserve serve" if "tpserve serve" in line else "-m tpserve")
    serve = "tpserve serve" in line
    flags = server_flags.parse(["--model", "MODEL", *shlex.split(rest)], launch=serve)
    words = shlex.split(launcher.replace("-", "_"))

    def said(name: str, default: int) -> int:
        return int(words[words.index(name) + 1]) if name in words else default

    local = num_local_ranks(flags, 8) if serve else said("__nproc_per_node", 1)
    nodes = flags.nnodes if serve else said("__nnodes", 1)
    config = resolve(
        flags,
        ModelFiles("m", "m"),
        model_spec(LLAMA_70B, "config.json"),
        Machine(local * nodes, local, nodes, 8, 64, "serve" if serve else "torchrun"),
    )
    assert config.layout.world_size == local * nodes


def test_every_document_exists() -> None:
    for target in re.findall(r"\]\((docs/[^)]+)\)", README):
        assert (Path(__file__).resolve().parents[2] / target).is_file(), target
