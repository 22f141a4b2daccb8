"""The completion scripts in the shells themselves: what Tab offers is what the commands take."""

import os
import pty
import re
import select
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from tpserve.__main__ import COMMANDS, main
from tpserve.cli.completion import SHELLS
from tpserve.cli.option import OPTIONS
from tpserve.completion_command import completed_commands

CASES = {
    "tpserve ": {"serve", "bench", "chat", "completion", "plan"},
    "tpserve ch": {"chat"},
    "tpserve bench ": {"serve", "latency", "throughput", "frontend", "roofline", "step"},
    "tpserve bench se": {"serve"},
    "tpserve serve --dtype ": {"auto", "bfloat16", "float16", "float32"},
    "tpserve serve --dtype fl": {"float16", "float32"},
    "tpserve serve --tensor-parallel": {"--tensor-parallel-size"},
    "tpserve serve -q int8": {"int8", "int8-head"},
    "tpserve bench step --transport ": {"ipc", "tcp"},
    "tpserve bench roofline --dty": {"--dtype"},
    "tpserve completion ": {"bash", "zsh", "fish"},
    "tpserve chat --no": {"--no-history"},
    "tpserve status --": {"--url", "--help"},
    "tpserve serve --config ": {"a file.yaml", "models"},
    "tpserve serve mo": {"models"},
    "tpserve secret a": {"a file.yaml"},
    "tpserve serve --port ": set(),
}
"""A line up to the cursor -> what must be offered; the first is a part of it, as other files may lie around."""
PARTLY = {"tpserve "}
CLEAR_LINE = "\x15"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a directory and a file in it, beside the scripts."""
    place = tmp_path_factory.mktemp("place")
    (place / "models").mkdir()
    (place / "a file.yaml").touch()
    scripts = place.parent / "scripts"
    scripts.mkdir()
    for name, make in SHELLS.items():
        (scripts / name).write_text(make(completed_commands()))
    return place


def needs(shell: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(shutil.which(shell) is None, reason=f"{shell} is not installed")


def check(offered: dict[str, set[str]]) -> None:
    for line, expected in CASES.items():
        assert offered[line] == expected or (line in PARTLY and expected < offered[line]), (line, offered[line])


def bash_offers(place: Path, lines: Sequence[str]) -> dict[str, set[str]]:
    """What bash's own completion offers: the function, called as Tab calls it."""
    calls = []
    for line in lines:
        words = [*line.split(" ")] if line.endswith(" ") else line.split(" ")
        words = [word for at, word in enumerate(words) if word or at == len(words) - 1]
        array = " ".join(map(shlex.quote, words))
        calls.append(f"COMP_WORDS=({array}); COMP_CWORD={len(words) - 1}; _tpserve; printf '%s\\n' \"${{COMPREPLY[@]}}\" --END--")
    script = f"compopt() {{ :; }}; source ../scripts/bash; complete -p tpserve >&2; {'; '.join(calls)}"
    done = subprocess.run(["bash", "--norc", "-c", script], cwd=place, capture_output=True, text=True, timeout=30, check=True)
    assert done.stderr == "complete -F _tpserve tpserve\n"
    parts = done.stdout.split("--END--\n")
    return {line: set(filter(None, part.split("\n"))) for line, part in zip(lines, parts, strict=False)}


@needs("bash")
def test_bash(place: Path) -> None:
    check(bash_offers(place, list(CASES)))


@needs("bash")
def test_every_command_and_flag_is_offered(place: Path) -> None:
    commands = completed_commands()
    shown = {command.words[0] for command in commands}
    assert shown == {name for name in COMMANDS if name[0] != "-"} - {"ray"}
    offered = bash_offers(place, [f"tpserve {command.name} -" for command in commands])
    for command in commands:
        expected = {name for option, _ in command.options() for name in option.spellings} | {"--help"}
        assert offered[f"tpserve {command.name} -"] == expected
    assert all(set(option.spellings) <= offered["tpserve serve -"] for option in OPTIONS.values())


@needs("fish")
def test_fish(place: Path) -> None:
    quoted = "; ".join(f"complete -C {shlex.quote(line)}; echo --END--" for line in CASES)
    command = ["fish", "--no-config", "-c", f"source ../scripts/fish; {quoted}"]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=60, check=True)
    assert done.stderr == ""
    parts = done.stdout.split("--END--\n")
    offered = {
        line: {each.split("\t")[0].rstrip("/").replace("\\ ", " ") for each in part.splitlines()}
        for line, part in zip(CASES, parts, strict=False)
    }
    check(offered)
    assert "Type of weights" in parts[list(CASES).index("tpserve serve --dtype ")], "with what it is for"


def typed(command: list[str], place: Path, begin: str, lines: Mapping[str, str]) -> str:
    """Type lines into an interactive shell on a terminal, each until it shows what belongs to it; what it shows of the last."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(place)
        os.execvpe(command[0], command, {**os.environ, "TERM": "xterm", "PS1": "ready> ", "HOME": str(place)})
    shown = ""
    try:
        for text, mark in ((f"{begin}; echo BEG''UN\n", "BEGUN"), *((CLEAR_LINE + keys, mark) for keys, mark in lines.items())):
            os.write(terminal, text.encode())
            deadline = time.monotonic() + 30
            shown = ""
            while mark not in re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown):
                assert time.monotonic() < deadline, (text, shown)
                if select.select([terminal], [], [], 0.2)[0]:
                    shown += os.read(terminal, 65536).decode(errors="replace")
        return shown
    finally:
        os.close(terminal)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


@needs("bash")
def test_bash_on_a_terminal(place: Path) -> None:
    line = {"tpserve serve --tensor-par\t8 --conf\t a\\ f\t": "file.yaml"}
    shown = typed(["bash", "--norc", "--noprofile", "-i"], place, "source ../scripts/bash", line)
    assert "--tensor-parallel-size 8 --config" in shown


@needs("zsh")
def test_zsh_on_a_terminal(place: Path) -> None:
    """zsh completes in its line editor alone."""
    lines = {
        "tpserve ch\t": "chat ",
        "tpserve bench \t": "roofline",
        "tpserve bench ser\t": "serve ",
        "tpserve serve --dtype \t": "float32",
        "tpserve serve --dtype=fl\t\t": "float16",
        "tpserve serve --tensor-para\t": "--tensor-parallel-size",
        "tpserve serve --state\t": "--state-dir",
        "tpserve serve --config a\t": "file.yaml",
        "tpserve serve -q \t\t": "int8-head",
        "tpserve serve mo\t": "models",
        "tpserve status --\t": "Where the server answers",
    }
    typed(["zsh", "-f", "-i"], place, "autoload -U compinit; compinit -D -u; source ../scripts/zsh", lines)


def test_what_is_no_shell(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["tcsh"], [], ["bash", "zsh"]):
        assert main(["completion", *arguments]) == 2
        assert "`tpserve completion bash` prints" in capsys.readouterr().err
    assert main(["completion", "bash"]) == 0
    assert capsys.readouterr().out == SHELLS["bash"](completed_commands())
