"""README and tour are run, as they are pasted into a fresh shell; what needs a model or eight GPUs is understood."""

import os
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

ROOT = Path(__file__).resolve().parents[2]
PAGES = (ROOT / "README.md", ROOT / "docs" / "tour.md")
TEXT = "\n".join(page.read_text() for page in PAGES)
LLAMA_70B = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 128256, "hidden_size": 8192, "intermediate_size": 28672,
    "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8, "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "torch_dtype": "bfloat16", "tie_word_embeddings": False, "hidden_act": "silu",
    "bos_token_id": 128000, "eos_token_id": 128001,
}  # fmt: skip


BLOCKS = re.findall(r"(?ms)^```bash\n(.*?)^```", TEXT)


def lines(start: str) -> list[str]:
    """Lines of the blocks to paste that begin with a word, without their comments."""
    return [line.partition("  #")[0] for block in BLOCKS for line in block.splitlines() if line.startswith(start)]


TWO_NODES = [line for line in lines("torchrun") if "127.0.0.1" in line]
INSTALLS = ("git clone", ". .venv", "python3 docs/examples/")
"""In the clone; `test_examples` runs the last one."""
PASTED = [block for block in BLOCKS if "MODEL" not in block and "torchrun" not in block and not block.startswith(INSTALLS)]
"""What runs as it stands, beside the server of the two nodes."""


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
    """A log line without its numbers, units and paths."""
    line = re.sub(r"\([^()]*builtin/model\)", "(model)", line)
    line = re.sub(r"http://[\d.:]+", "URL", line)
    return re.sub(r"[\d,.]+ (B|KiB|MiB|GiB|GB)|[\d,.]*\d", "N", line)


def test_the_log_of_three_lines(server: Server) -> None:
    [block] = re.findall(r"(?ms)^```\n(\[n0 .*?)^```", TEXT)
    shown = [shape(line) for line in block.splitlines()]
    printed = [shape(line) for line in server.log.splitlines()]
    assert len(shown) == 3 and [line for line in printed if line in shown] == shown


@pytest.mark.parametrize("block", PASTED, ids=lambda block: block.splitlines()[-2 if block.startswith("python") else 0][:40])
def test_what_is_pasted_into_a_fresh_shell(block: str, server: Server, tmp_path: Path) -> None:
    """From a directory in which a folder has the package's name, as the one above a clone."""
    (tmp_path / "tpserve" / "docs").mkdir(parents=True)
    kept = {name: os.environ[name] for name in ("PYTHONPATH",) if name in os.environ}
    environment = {"PATH": f"{BIN}:/usr/bin:/bin", "HOME": str(tmp_path), **kept}
    command = ["bash", "--noprofile", "--norc", "-e"]
    pasted = block.replace(":8000", f":{server.port}")
    done = subprocess.run(command, input=pasted, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(done.stdout) > 3
    if "bench" in block:
        assert "completed   20 in " in done.stdout and (tmp_path / "load.svg").stat().st_size > 1000
    if "curl" in block:
        assert '"text":"' in done.stdout


def test_every_block_is_run_or_understood() -> None:
    understood = ("torchrun", "tpserve serve", "tpserve plan", "tpserve doctor", *INSTALLS)
    assert [block for block in BLOCKS if block not in PASTED and not block.startswith(understood)] == []
    assert len(PASTED) == 5


def test_the_plan_lacks_a_model_and_nothing_else() -> None:
    [line] = lines("tpserve plan")
    done = subprocess.run(shlex.split(f"{BIN}/{line}"), capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "MODEL" in done.stderr, done.stderr


def test_the_doctor_is_understood() -> None:
    """It is run in tests/bare; this line would start eight ranks."""
    [line] = lines("tpserve doctor")
    assert server_flags.parse(shlex.split(line)[2:]).tensor_parallel_size == 8


@pytest.mark.parametrize("line", [*lines("torchrun"), *lines("tpserve serve")])
def test_every_command_is_understood(line: str) -> None:
    launcher, _, rest = line.partition("tpserve serve" if "tpserve serve" in line else "-m tpserve")
    served = "tpserve serve" in line
    flags = server_flags.parse(["--model", "MODEL", *shlex.split(rest)], launch=served)
    words = shlex.split(launcher.replace("-", "_"))

    def said(name: str, default: int) -> int:
        return int(words[words.index(name) + 1]) if name in words else default

    local = num_local_ranks(flags, 8) if served else said("__nproc_per_node", 1)
    nodes = flags.nnodes if served else said("__nnodes", 1)
    config = resolve(
        flags,
        ModelFiles("m", "m"),
        model_spec(LLAMA_70B, "config.json"),
        Machine(local * nodes, local, nodes, 8, 64, "serve" if served else "torchrun"),
    )
    assert config.layout.world_size == local * nodes


def test_every_document_exists() -> None:
    """Of every page, and each heading that a link names."""
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))):
        for target, _, heading in re.findall(r"\]\(([\w./-]*)(#([\w-]+))?\)", page.read_text()):
            other = page.parent / target if target else page
            assert other.exists(), f"{page.name}: {target}"
            assert not heading or heading in headings(other), f"{page.name}: {target}#{heading}"


def headings(page: Path) -> list[str]:
    """As GitHub names them in links."""
    titles = re.findall(r"(?m)^#+ (.*)$", page.read_text())
    return [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
