"""The programs of docs/examples that need a server, run by the line that stands on top of each.

The one of OpenAI's client runs in tests/clients, the offline one in `test_offline`.
"""

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.server import Server, free_port, running, serve

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "docs" / "examples"
LONGEST = 60
"""Lines of an example: what is shown fits a screen or little more."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    port = free_port()
    with running([serve("--nproc-per-node", "2", port=port)], port, tmp_path_factory.mktemp("examples") / "log") as server:
        yield server
        assert server.stop() == [0]
        server.assert_nothing_left()


def run(name: str, url: str) -> str:
    """What an example prints; it must end well."""
    [line] = re.findall(r"(?m)^    python (.*)$", (EXAMPLES / f"{name}.py").read_text())
    command = [sys.executable, *shlex.split(line.replace("[URL]", url))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_structured_output(server: Server) -> None:
    person = json.loads(run("structured_output", server.url))
    assert list(person) == ["name", "work", "friends"] and person["work"] in ("baker", "beekeeper", "doctor", "sailor")


def test_a_loop_of_tools(server: Server) -> None:
    lines = run("tool_loop", server.url).splitlines()
    assert re.fullmatch(r"door_color\(\{'name': '(Mina|Ines|Elsa)'\}\) is (yellow|blue|green)", lines[0])
    assert lines[-1] and not lines[-1].startswith("door_color(")


def test_a_stream_goes_on_while_a_rank_is_killed(server: Server) -> None:
    out = run("kill_a_rank", server.url)
    assert "that was rank 1" in out and out.splitlines()[-1].startswith("the same text as without the kill")


def test_every_example_is_short_and_says_how_it_is_run() -> None:
    pages = (ROOT / "README.md").read_text() + "".join(page.read_text() for page in (ROOT / "docs").glob("*.md"))
    for path in sorted(EXAMPLES.glob("*.py")):
        lines = path.read_text().splitlines()
        assert lines[0].startswith('"""') and lines[0].endswith(".") and len(lines) < LONGEST, path
        assert re.search(rf"(?m)^    (python|torchrun --nproc-per-node 2) docs/examples/{path.name}( |$)", "\n".join(lines)), path
        assert f"examples/{path.name}" in pages, f"no page names {path}"
