"""The package as `pip` makes it: everything a node needs is in the wheel, and what was cloned runs from any directory."""

import email
import json
import platform
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.bare.installation import ROOT, Installation, build_wheel, copy_sources, install, old_compiler
from tpserve_kernels.cpu.library import Isa, library

LIBRARY = "tpserve_kernels/libtpserve_cpu.so"
LOADS = "from tpserve_kernels.cpu.library import load; lib, why = load(); import json; print(json.dumps([lib and lib.isa, why]))"
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


def test_the_wheel_is_whole(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as file:
        held = set(file.namelist())
        [metadata] = [file.read(name).decode() for name in held if name.endswith(".dist-info/METADATA")]
    ours = {path.relative_to(ROOT).as_posix() for path in (ROOT / "tpserve").rglob("*") if path.is_file()}
    ours |= {f"tpserve_kernels/{path.name}" for path in (ROOT / "kernels" / "tpserve_kernels").glob("*.py")}
    ours |= {f"tpserve_kernels/cpu/{path.name}" for path in (ROOT / "kernels" / "tpserve_kernels" / "cpu").glob("*.py")}
    assert not {name for name in ours if "__pycache__" not in name} - held
    fields = email.message_from_string(metadata)
    urls = dict(line.split(", ") for line in fields.get_all("Project-URL", []))
    assert {"Source", "Issues", "Changelog"} <= set(urls) and all(url.startswith("https://") for url in urls.values())
    assert set(fields["Requires-Python"].split(",")) == {">=3.11", "<3.14"}


def test_a_clone_is_imported_from_the_directory_above_it(tmp_path: Path) -> None:
    """There a folder called tpserve lies beside the script, which Python takes for a package when nothing better is found."""
    clone = copy_sources(tmp_path / "tpserve")
    made = install(clone, tmp_path / "installed", "--editable", compiler=old_compiler(tmp_path, "avx"))
    # Nothing but the portable kernels, which take little time to build.
    code = "import tpserve, tpserve_kernels; from tpserve import LLM; print(tpserve.__file__)"
    for directory in (tmp_path, clone, made.home):
        done = made.run("python", "-c", code, where=directory)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == str(clone / "tpserve" / "__init__.py")
    if shutil.which("g++"):
        assert (clone / "kernels" / LIBRARY).exists()
        assert json.loads(made.run("python", "-c", LOADS).stdout) == [0, ""]


@needs_compiler
def test_the_library_in_the_wheel_is_for_an_old_glibc_and_loads(wheel: Path, bare: Installation) -> None:
    """Of functions it needs those of an old C library alone, which the name of the wheel promises; and it loads."""
    assert wheel.name.endswith(f"-py3-none-manylinux_2_17_{platform.machine()}.whl"), wheel.name
    with zipfile.ZipFile(wheel) as file:
        path = Path(file.extract(LIBRARY, wheel.parent))
    headers = subprocess.run(["objdump", "-p", "-T", str(path)], capture_output=True, text=True, check=True).stdout.splitlines()
    needed = {line.split()[1] for line in headers if "NEEDED" in line}
    assert needed <= {"libc.so.6", "ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1"}, needed
    versions = {word.strip("()") for line in headers for word in line.split() if word.startswith(("GLIBC", "(GLIBC"))}
    assert versions and all(tuple(map(int, name.removeprefix("GLIBC_").split("."))) <= (2, 17) for name in versions), versions
    isa, why = json.loads(bare.run("python", "-c", LOADS).stdout)
    native = library()
    assert not why and (native is None or isa == min(native.isa, Isa.AVX2)), "the compiler knew no AVX-512"


def test_without_a_compiler_the_wheel_is_for_every_platform(tmp_path: Path) -> None:
    wheel = build_wheel(tmp_path, "no-such-compiler")
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as file:
        assert LIBRARY not in file.namelist()


def test_a_source_distribution_has_the_sources_of_the_library(tmp_path: Path) -> None:
    source = copy_sources(tmp_path / "source")
    command = [sys.executable, "setup.py", "--quiet", "sdist", "--dist-dir", str(tmp_path)]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    [archive] = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        held = {name.partition("/")[2] for name in file.getnames()}
    ours = {path.relative_to(ROOT).as_posix() for path in (ROOT / "kernels" / "cpu").iterdir()}
    assert {"setup.py", "kernels/build_cpu.py", *ours} <= held, ours - held
