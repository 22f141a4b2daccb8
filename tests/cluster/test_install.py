"""The package as `pip` makes it: everything a node needs is in the wheel, and it runs from there."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_wheel_is_whole(tmp_path: Path) -> None:
    source, wheelhouse, site = tmp_path / "source", tmp_path / "wheelhouse", tmp_path / "site"
    for name in ("tpserve", "kernels"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(wheelhouse), str(source)]
    subprocess.run(build, check=True, capture_output=True, timeout=120)
    [wheel] = wheelhouse.glob("tpserve-*.whl")
    with zipfile.ZipFile(wheel) as file:
        held = set(file.namelist())
        file.extractall(site)
    ours = {path.relative_to(ROOT).as_posix() for path in (ROOT / "tpserve").rglob("*") if path.is_file()}
    ours |= {f"tpserve_kernels/{path.name}" for path in (ROOT / "kernels" / "tpserve_kernels").glob("*.py")}
    assert not {name for name in ours if "__pycache__" not in name} - held
    # -I: neither the checkout nor the environment's path leads back to the sources
    code = f"import sys; sys.path.insert(0, {str(site)!r}); from tpserve.__main__ import main; sys.exit(main(['--version']))"
    said = subprocess.run([sys.executable, "-I", "-c", code], check=True, capture_output=True, text=True, timeout=60)
    assert said.stdout.startswith("tpserve ")
