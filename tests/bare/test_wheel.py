"""The package as `pip` makes it: everything a node needs is in the wheel, and what was cloned runs from any directory."""

import email
import zipfile
from pathlib import Path

from tests.bare.installation import ROOT, copy_sources, install


def test_the_wheel_is_whole(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as file:
        held = set(file.namelist())
        [metadata] = [file.read(name).decode() for name in held if name.endswith(".dist-info/METADATA")]
    ours = {path.relative_to(ROOT).as_posix() for path in (ROOT / "tpserve").rglob("*") if path.is_file()}
    ours |= {f"tpserve_kernels/{path.name}" for path in (ROOT / "kernels" / "tpserve_kernels").glob("*.py")}
    assert not {name for name in ours if "__pycache__" not in name} - held
    fields = email.message_from_string(metadata)
    urls = dict(line.split(", ") for line in fields.get_all("Project-URL", []))
    assert {"Source", "Issues", "Changelog"} <= set(urls) and all(url.startswith("https://") for url in urls.values())
    assert set(fields["Requires-Python"].split(",")) == {">=3.11", "<3.14"}


def test_a_clone_is_imported_from_the_directory_above_it(tmp_path: Path) -> None:
    """There a folder called tpserve lies beside the script, which Python takes for a package when nothing better is found."""
    clone = copy_sources(tmp_path / "tpserve")
    made = install(clone, tmp_path / "installed", "--editable")
    code = "import tpserve, tpserve_kernels; from tpserve import LLM; print(tpserve.__file__)"
    for directory in (tmp_path, clone, made.home):
        done = made.run("python", "-c", code, where=directory)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == str(clone / "tpserve" / "__init__.py")
