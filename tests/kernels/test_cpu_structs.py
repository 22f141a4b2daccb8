"""The structs of kernels/cpu/api.h and their ctypes twins: the same names, offsets and sizes, as the compiler has them."""

import ctypes
import importlib
import pkgutil
import re
import subprocess
from collections.abc import Iterator
from enum import IntEnum
from pathlib import Path
from typing import TypeVar

import pytest

import tpserve_kernels.cpu as package
from tests.kernels import cpu_isa
from tpserve_kernels.cpu.library import source_version

for _module in pkgutil.iter_modules(package.__path__):
    importlib.import_module(f"{package.__name__}.{_module.name}")

Twin = TypeVar("Twin", ctypes.Structure, IntEnum)
NO_TWIN = {"PackedHead"}
"""Made and read by the library alone."""
PARTS = {"Call", "Heads", "Page"}
"""The others are the arguments of operations."""


def of_package(base: type[Twin]) -> Iterator[tuple[str, type[Twin]]]:
    """The classes of tpserve_kernels.cpu and the name in api.h that their docstrings give."""
    for twin in base.__subclasses__():
        if twin.__module__.startswith(f"{package.__name__}."):
            named = re.match(r"`(\w+)` of kernels/cpu/api\.h|.*as in kernels/cpu/api\.h", twin.__doc__ or "", re.DOTALL)
            assert named, f"{twin.__name__}: its docstring does not say what it is in api.h"
            yield named[1] or twin.__name__, twin


def checks(name: str, twin: type[ctypes.Structure]) -> Iterator[str]:
    """C++ that compiles if the struct is as its twin."""
    yield f'static_assert(sizeof({name}) == {ctypes.sizeof(twin)}, "{name} has another size");'
    fields = [field[0] for field in twin._fields_]
    for field in fields:
        place = getattr(twin, field)
        c_name = field.rstrip("_")  # `from` is a word of Python's
        same = f"offsetof({name}, {c_name}) == {place.offset} && sizeof({name}::{c_name}) == {place.size}"
        yield f'static_assert({same}, "{name}.{c_name} lies elsewhere");'
    yield f"inline void all_of({name}& one) {{ auto& [{', '.join(f'f{i}' for i in range(len(fields)))}] = one; }}"


def compiled(code: str, folder: Path) -> str:
    """What the compiler says against `code`, which includes api.h; "" when nothing."""
    source = folder / "structs.cc"
    source.write_text(f'#include <stddef.h>\n#include "api.h"\n{code}\n')
    command = [*cpu_isa.build_cpu.compiler(), "-std=c++17", "-fsyntax-only", "-I", str(cpu_isa.build_cpu.SOURCES), str(source)]
    return subprocess.run(command, capture_output=True, text=True, check=False).stderr


@pytest.mark.skipif(not cpu_isa.build_cpu.compiler(), reason="needs a C++ compiler")
def test_structs_have_the_layout_of_their_twins(tmp_path: Path) -> None:
    twins = dict(of_package(ctypes.Structure))
    declared = set(re.findall(r"^struct (\w+) {", (cpu_isa.build_cpu.SOURCES / "api.h").read_text(), re.MULTILINE))
    assert twins.keys() == declared - NO_TWIN
    assert all(twin.__name__ == (name if name in PARTS else f"{name}Args") for name, twin in twins.items())
    code = [line for name, twin in twins.items() for line in checks(name, twin)]
    assert compiled("\n".join(code), tmp_path) == ""

    class Product(ctypes.Structure):
        """Without the last field, which the padding of the size would hide, and with two that are exchanged."""

        _fields_ = (*twins["Product"]._fields_[1::-1], *twins["Product"]._fields_[2:-1])

    assert ctypes.sizeof(Product) < ctypes.sizeof(twins["Product"])
    said = compiled("\n".join(checks("Product", Product)), tmp_path)
    assert "Product.weight lies elsewhere" in said and "Product has another size" in said and "all_of" in said


@pytest.mark.skipif(not cpu_isa.build_cpu.compiler(), reason="needs a C++ compiler")
def test_enumerations_have_the_numbers_of_their_twins(tmp_path: Path) -> None:
    twins = dict(of_package(IntEnum))
    declared = set(re.findall(r"^enum (\w+) :", (cpu_isa.build_cpu.SOURCES / "api.h").read_text(), re.MULTILINE))
    assert twins.keys() == declared - {"Dtype"}
    code = [f'static_assert({member.name} == {member.value}, "");' for twin in twins.values() for member in twin]
    code.append(f'static_assert(NUM_OPERATIONS == {len(twins["Operation"])}, "");')
    assert compiled("\n".join(code), tmp_path) == ""


def test_both_sides_hash_the_same_files() -> None:
    assert cpu_isa.build_cpu.version() == source_version()
