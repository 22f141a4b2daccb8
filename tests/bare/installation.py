"""An installation of tpserve with what `install_requires` asks for, and nothing else.

It is a virtual environment of its own. tpserve is installed in it by pip, from its wheel. What tpserve requires, and what that
requires in turn, are links to the packages of the environment that runs the tests: the same files, so that torch is neither
downloaded nor copied. No other package can be imported, and `PATH` holds no compiler.
"""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "tpserve", "kernels")


@dataclass(frozen=True)
class Installation:
    """`root`: the virtual environment. `home`: an empty directory, for HOME, TMPDIR and the working directory."""

    root: Path
    home: Path

    def command(self, *words: str, **environment: str) -> list[str]:
        """A program of this installation, in an environment that holds nothing of ours."""
        program, *arguments = words
        variables = {"PATH": str(self.root / "bin"), "HOME": str(self.home), "TMPDIR": str(self.home), "OMP_NUM_THREADS": "1"}
        given = [f"{name}={value}" for name, value in (variables | environment).items()]
        return [shutil.which("env") or "/usr/bin/env", "-i", *given, str(self.root / "bin" / program), *arguments]

    def run(self, *words: str, where: Path | None = None, timeout_s: float = 60.0) -> "subprocess.CompletedProcess[str]":
        """Run a program to its end, in the directory `where` or the empty one."""
        command = self.command(*words)
        return subprocess.run(command, cwd=where or self.home, capture_output=True, text=True, check=False, timeout=timeout_s)


def copy_sources(to: Path) -> Path:
    """What is needed to build tpserve, and nothing that an earlier build left."""
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, to / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
        else:
            to.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, to)
    return to


def old_compiler(directory: Path, *unknown: str) -> str:
    """A C++ compiler that does not know flags that contain one of `unknown`. Fewer sets, less optimized: it saves time."""
    script = directory / "old-g++"
    patterns = "|".join(f"*{text}*" for text in unknown)
    script.write_text(f'#!/bin/sh\ncase "$*" in {patterns}) echo "error: unknown flag" >&2; exit 1 ;; esac\nexec g++ "$@" -O1\n')
    script.chmod(0o755)
    return str(script)


def build_wheel(directory: Path, compiler: str) -> Path:
    source = copy_sources(directory / "source")
    pip("wheel", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", str(directory), str(source), CXX=compiler)
    [wheel] = directory.glob("tpserve-*.whl")
    return wheel


def install(what: Path, directory: Path, *options: str, compiler: str = "none") -> Installation:
    """`what`: a wheel, or with the option --editable a directory, where `compiler` builds the library of CPU kernels."""
    made = Installation(directory / "venv", directory / "home")
    made.home.mkdir(parents=True)
    venv.EnvBuilder(symlinks=True).create(made.root)
    site = made.root / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    for distribution in required():
        _link(distribution, site)
        _write_scripts(distribution, made.root / "bin")
    options = ("--no-deps", "--no-index", "--no-build-isolation", *options)
    pip("--python", str(made.root / "bin" / "python"), "install", *options, str(what), CXX=compiler)
    return made


def required() -> list[importlib.metadata.Distribution]:
    """tpserve's requirements without extras, and theirs."""
    found: dict[str, importlib.metadata.Distribution] = {}
    waiting = _requirements(importlib.metadata.distribution("tpserve"), set())
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if name not in found or requirement.extras:
            found[name] = importlib.metadata.distribution(name)
            waiting += [
                needed for needed in _requirements(found[name], requirement.extras) if canonicalize_name(needed.name) not in found
            ]
    return list(found.values())


def _requirements(distribution: importlib.metadata.Distribution, extras: set[str]) -> list[Requirement]:
    parsed = map(Requirement, distribution.requires or ())
    return [
        requirement
        for requirement in parsed
        if requirement.marker is None or any(requirement.marker.evaluate({"extra": extra}) for extra in ("", *extras))
    ]


def _link(distribution: importlib.metadata.Distribution, site: Path) -> None:
    for top in {path.parts[0] for path in distribution.files or ()} - {"..", "__pycache__"}:
        link = site / top
        if not link.is_symlink():
            link.symlink_to(Path(str(distribution.locate_file(top))).resolve())


def _write_scripts(distribution: importlib.metadata.Distribution, directory: Path) -> None:
    """As pip writes them."""
    for point in distribution.entry_points.select(group="console_scripts"):
        script = directory / point.name
        code = f"import sys\nfrom {point.module} import {point.attr} as main\nsys.exit(main())\n"
        script.write_text(f"#!{directory}/python\n{code}")
        script.chmod(0o755)


def pip(*arguments: str, **environment: str) -> None:
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
    environ = {**os.environ, **environment}
    done = subprocess.run(
        command, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120, env=environ
    )
    assert done.returncode == 0, done.stdout
