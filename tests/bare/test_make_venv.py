"""What `make` checks before it installs anything, and which torch it then asks pip for."""

import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.bare.installation import ROOT

REAL = """#!/bin/sh
case "$*" in
*sys.version_info*) exit {fits} ;;
*--version*) echo Python {version} ;;
*ensurepip*) exit {no_venv} ;;
*urllib*) exit {no_index} ;;
"-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
*pip*) echo "pip: $*" ;;
esac
"""


def script(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def make_venv(
    tmp_path: Path, *, uname: str = "Linux", machine: str = "x86_64", gpu: bool = False, **variables: str
) -> tuple[int, str]:
    """Run the script where only the programs in `tmp_path` and a few of the system's are found."""
    script(tmp_path / "uname", f'#!/bin/sh\n[ "$1" = -s ] && echo {uname} || echo {machine}\n')
    script(tmp_path / "nvidia-smi", f"#!/bin/sh\nexit {int(not gpu)}\n")
    for name in ("mkdir", "cp", "sh"):
        (tmp_path / name).symlink_to(f"/bin/{name}")
    command = [str(ROOT / "launch" / "make_venv.sh"), str(tmp_path / "venv")]
    done = subprocess.run(command, env={"PATH": str(tmp_path), **variables}, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def python(path: Path, version: str = "3.12.4", *, no_venv: int = 0, no_index: int = 0) -> None:
    fits = int(version.split(".")[1] not in ("11", "12", "13"))
    script(path, REAL.format(version=version, fits=fits, no_venv=no_venv, no_index=no_index))


@pytest.mark.parametrize(
    ("machine", "says"),
    [
        ({"uname": "Darwin"}, "it runs on Linux, and this is Darwin"),
        ({"machine": "riscv64"}, "torch is built for x86_64 and aarch64, and this machine is riscv64"),
        ({"PYTHON": "python3.14"}, "it needs Python 3.11, 3.12 or 3.13, and python3.14 is "),
    ],
)
def test_what_cannot_work_is_said_in_a_line(tmp_path: Path, machine: dict[str, Any], says: str) -> None:
    python(tmp_path / "python3")
    code, said = make_venv(tmp_path, **machine)
    assert code == 2 and said.startswith(f"tpserve: {says}") and said.count("\n") == 1
    assert not (tmp_path / "venv").exists()


def test_an_old_python_alone_is_named(tmp_path: Path) -> None:
    python(tmp_path / "python3", "3.9.2")
    code, said = make_venv(tmp_path)
    assert code == 2 and "python3 is Python 3.9.2: install one of them" in said


def test_another_python_is_found(tmp_path: Path) -> None:
    python(tmp_path / "python3", "3.10.1")
    python(tmp_path / "python3.12", "3.12.8")
    code, said = make_venv(tmp_path)
    assert code == 0 and "with Python 3.12.8" in said


def test_a_python_without_venv_is_named(tmp_path: Path) -> None:
    python(tmp_path / "python3", no_venv=1)
    code, said = make_venv(tmp_path)
    assert code == 2 and "apt-get install python3-venv" in said


@pytest.mark.skipif(Path("/proc/driver/nvidia/version").exists(), reason="this machine has a GPU")
@pytest.mark.parametrize(
    ("gpu", "no_index", "torch", "asked"),
    [
        (False, 0, "", "install --no-deps --index-url https://download.pytorch.org/whl/cpu torch==2.13.0+cpu"),
        (False, 1, "", "install torch==2.13.0"),
        (True, 0, "", "install torch==2.13.0"),
        (False, 0, "torch==2.12.0", "install torch==2.12.0"),
    ],
)
def test_which_torch(tmp_path: Path, gpu: bool, no_index: int, torch: str, asked: str) -> None:
    python(tmp_path / "python3", no_index=no_index)
    code, said = make_venv(tmp_path, gpu=gpu, TORCH=torch)
    assert code == 0 and said.splitlines()[-1] == f"pip: -m pip --disable-pip-version-check {asked}"


def test_make_alone_prints_what_there_is() -> None:
    done = subprocess.run(["make", "-C", str(ROOT), "--no-print-directory"], capture_output=True, text=True, check=True)
    assert {"make serve", "make check", "make test"} <= {line[:10].strip() for line in done.stdout.splitlines()}
