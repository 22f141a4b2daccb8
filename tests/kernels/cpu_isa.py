"""The library of CPU kernels on each instruction set: the processor's own, and those above AVX2 emulated where it has them not.

Import `isa` for a fixture that runs each test of a module once on every instruction set; `skip_without_library` as `pytestmark`.
"""

import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tpserve_kernels.cpu import library as module
from tpserve_kernels.cpu.library import FILE_VARIABLE, PACKAGE, Isa, Library, load

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "kernels"))
import build_cpu as build_cpu  # noqa: E402

FILE = Path(os.environ.get(FILE_VARIABLE) or PACKAGE / "libtpserve_cpu.so")
NATIVE, WHY_NOT = load()
skip_without_library = pytest.mark.skipif(NATIVE is None, reason=f"no library of CPU kernels: {WHY_NOT}")


def emulated() -> Path:
    """The emulated library, kept in .tmp until the sources change; sanitized as `FILE` is."""
    sanitize = "asan" in os.environ.get("LD_PRELOAD", "")
    file = ROOT / ".tmp" / f"emulated{'-sanitized' if sanitize else ''}-{build_cpu.version()}.so"
    if not file.exists():
        for old in file.parent.glob(f"emulated{'-sanitized' if sanitize else ''}-????????????????.so"):
            old.unlink()
        build_cpu.build(file, emulate=True, sanitize=sanitize)
    return file


@pytest.fixture(scope="module", params=list(Isa), ids=lambda isa: isa.name.lower())
def isa(request: pytest.FixtureRequest) -> Iterator[Isa]:
    """What the library runs on."""
    wanted: Isa = request.param
    assert NATIVE is not None
    highest = NATIVE.isa
    if wanted > highest:
        if wanted <= Isa.AVX2 or platform.machine() not in ("x86_64", "AMD64") or highest < Isa.AVX2:
            pytest.skip("neither on this processor nor emulated on it")
        found = Library(emulated(), wanted)
    else:
        found = Library(FILE, wanted)
    assert found.isa == wanted
    patch = pytest.MonkeyPatch()
    patch.setattr(module, "load", lambda: (found, ""))
    threads = torch.get_num_threads()
    yield wanted
    torch.set_num_threads(threads)
    patch.undo()
    Library(FILE, highest)  # the choice is one for all users of the file
