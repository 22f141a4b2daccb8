"""The library of CPU kernels as a file: what is loaded and refused, what its code is made of, what a call does to threads."""

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.kernels.cpu_isa import FILE, NATIVE, ROOT, skip_without_library
from tpserve_kernels.cpu.library import FILE_VARIABLE, ISA_VARIABLE, Isa, Library, load
from tpserve_kernels.cpu.product import pack, product

pytestmark = skip_without_library
SANITIZED = "asan" in os.environ.get("LD_PRELOAD", "")
needs_objdump = pytest.mark.skipif(shutil.which("objdump") is None, reason="needs objdump")
SETS = [isa.name.lower() for isa in Isa]


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """`load` chooses anew; afterwards the library is as it was."""
    monkeypatch.delenv(ISA_VARIABLE, raising=False)
    yield monkeypatch
    assert NATIVE is not None
    Library(FILE, NATIVE.isa)


def test_another_version_and_other_files_are_refused(fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert NATIVE is not None
    other, file = "0123456789abcdef", tmp_path / "other.so"
    file.write_bytes(FILE.read_bytes().replace(NATIVE.version.encode(), other.encode()))
    fresh.setenv(FILE_VARIABLE, str(file))
    found, why = load.__wrapped__()
    assert found is None and "built from other sources" in why and other in why and NATIVE.version in why
    text, nothing = tmp_path / "text.so", tmp_path / "nothing.so"
    text.write_text("no library")
    fresh.setenv(FILE_VARIABLE, str(text))
    found, why = load.__wrapped__()
    assert found is None and str(text) in why
    fresh.setenv(FILE_VARIABLE, str(nothing))
    assert load.__wrapped__() == (None, f"{nothing} is not there: no C++ compiler was when tpserve was installed")


def test_the_variable_lowers_the_instruction_set(fresh: pytest.MonkeyPatch) -> None:
    assert NATIVE is not None
    for name in ("portable", "AVX2", "avx512-bf16", "amx", ""):
        fresh.setenv(ISA_VARIABLE, name)
        found, why = load.__wrapped__()
        assert found is not None and not why
        limit = Isa[name.upper().replace("-", "_")] if name else Isa.AMX
        assert found.isa == min(limit, NATIVE.isa) and found.numerics == f"{found.isa.name.lower()} {NATIVE.version}"
    fresh.setenv(ISA_VARIABLE, "off")
    assert load.__wrapped__() == (None, "TPSERVE_ISA is off")
    fresh.setenv(ISA_VARIABLE, "sse9")
    with pytest.raises(ValueError, match="it takes portable, avx2, avx512, avx512_bf16, amx and off"):
        load.__wrapped__()


def test_a_limit_is_kept(fresh: pytest.MonkeyPatch) -> None:
    found = Library(FILE, Isa.AMX)
    found.limit(Isa.PORTABLE)
    found.limit(Isa.AMX)
    assert found.isa == Isa.PORTABLE, "what a stage has agreed on is not raised"


def functions() -> tuple[dict[int, str], set[str]]:
    """The source of each function, by address; and the names of those that belong to no single source."""
    table = subprocess.run(["readelf", "-sW", str(FILE)], capture_output=True, text=True, check=True).stdout
    owner, owners, shared = "", {}, set()
    for line in table.partition("'.symtab'")[2].splitlines():
        fields = line.split()
        if len(fields) < 7 or fields[0] == "Num:" or fields[6] == "UND":
            continue
        address, kind, name = int(fields[1], 16), fields[3], fields[7] if len(fields) > 7 else ""
        if kind == "FILE":
            owner = name.removesuffix(".cc")
        elif kind == "FUNC" and fields[4] == "LOCAL" and owner:
            owners[address] = owner
        elif (not owner and (kind == "FUNC" or (kind == "OBJECT" and not name.startswith("_")))) or fields[4] == "WEAK":
            shared.add(name)
    return owners, shared


def code_of_sources(owners: dict[int, str]) -> dict[str, str]:
    """The instructions of each source, those of the functions that `owners` does not have under "entry"."""
    listed = subprocess.run(["objdump", "-d", "--no-show-raw-insn", str(FILE)], capture_output=True, text=True, check=True).stdout
    lines, owner = defaultdict(list), ""
    for line in listed.splitlines():
        if start := re.match(r"([0-9a-f]+) <.*>:$", line):
            owner = owners.get(int(start[1], 16), "entry")
        lines[owner].append(line)
    return {name: "\n".join(some) for name, some in lines.items()}


@needs_objdump
@pytest.mark.skipif(SANITIZED, reason="the sanitizers add functions")
@pytest.mark.skipif(os.uname().machine != "x86_64", reason="x86-64 alone has several instruction sets")
def test_each_instruction_set_has_code_of_its_own() -> None:
    """No instruction set uses registers of a higher one, and the linker had no copies of a function to choose from."""
    owners, shared = functions()
    shared -= {name for name in shared if name.startswith("tpserve_")} | {"_init", "_fini"}
    assert not shared, f"one copy for all instruction sets: {shared}"
    code = code_of_sources(owners)
    assert NATIVE is not None and {"entry", *SETS[: NATIVE.isa + 1]} <= code.keys(), "the build leaves the names of its sources"
    may_use = {"portable": set(), "entry": set(), "avx2": {"ymm"}, "avx512": {"ymm", "zmm"}, "avx512_bf16": {"ymm", "zmm"}}
    may_use["amx"] = {"ymm", "zmm", "tmm"}
    for name in may_use.keys() & code.keys():
        registers = set(re.findall(r"%([yzt]mm)\d", code[name]))
        assert registers == may_use[name], (name, registers)
        assert (re.search("vdpbf16ps", code[name]) is not None) == (name == "avx512_bf16")
        assert (re.search("ldtilecfg", code[name]) is not None) == (name == "amx")
        if name == "portable":
            assert not re.search(r"\bv[a-z0-9]+ ", code[name]), "nothing with the prefix of AVX"


def test_other_threads_go_on_during_a_call() -> None:
    """As the heartbeats of a rank must."""
    x_TK, outputs, inner = torch.randn(600, 1024), 2048, 1024
    blob, beats, ended = pack(torch.randn(outputs, inner)), [], threading.Event()

    def beat() -> None:
        while not ended.is_set():
            beats.append(time.monotonic())
            time.sleep(0.001)

    thread, threads = threading.Thread(target=beat), torch.get_num_threads()
    torch.set_num_threads(1)
    thread.start()
    begin_s = time.monotonic()
    product(x_TK, blob, outputs)
    end_s = time.monotonic()
    ended.set()
    thread.join()
    torch.set_num_threads(threads)
    assert end_s - begin_s > 0.01, "else nothing is seen"
    assert sum(begin_s < beat_s < end_s for beat_s in beats) >= 3


def test_a_forked_child_computes_on_one_thread() -> None:
    """The threads of libgomp do not come along, and waiting for them would not end."""
    blob, x_TK, threads = pack(torch.randn(100, 64)), torch.randn(9, 64), torch.get_num_threads()
    torch.set_num_threads(2)
    expected_TN = product(x_TK, blob, 100)
    child = os.fork()
    if not child:
        signal.alarm(20)
        os._exit(0 if bytes(product(x_TK, blob, 100).untyped_storage()) == bytes(expected_TN.untyped_storage()) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert torch.equal(product(x_TK, blob, 100), expected_TN), "the parent has its threads"
    torch.set_num_threads(threads)


def test_calls_of_several_threads_at_once() -> None:
    """Each has a region and working memory of its own."""
    cases = [(torch.randn(rows, inner), torch.randn(50, inner)) for rows, inner in ((3, 40), (17, 300), (64, 96), (1, 2000))]
    blobs = [pack(weight_NK) for _, weight_NK in cases]
    expected = [product(x_TK, blob, 50) for (x_TK, _), blob in zip(cases, blobs, strict=True)]
    wrong: list[int] = []

    def run(i: int) -> None:
        for _ in range(50):
            if not torch.equal(product(cases[i][0], blobs[i], 50), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(cases))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


ALONE = """
import ctypes, sys
calls, wanted = ctypes.CDLL(sys.argv[1]), int(sys.argv[2])
isa = calls.tpserve_detect(4)
if wanted >= 0: assert isa == wanted, isa
calls.tpserve_start(isa, None, None, None, 0)
I = ctypes.c_int64
class Product(ctypes.Structure):
    _fields_ = [(n, ctypes.c_void_p) for n in ("weight", "x", "bias", "out")] + [
        (n, I) for n in ("rows", "x_stride", "out_stride")] + [("out_dtype", ctypes.c_int32)]
class Call(ctypes.Structure):
    _fields_ = [("operation", ctypes.c_int32), ("arguments", ctypes.c_void_p)]
rows, outputs, inner = 7, 21, 50
weight = [[(3 * n + 5 * k) % 17 - 8 for k in range(inner)] for n in range(outputs)]
x = [[(7 * t + 11 * k) % 15 - 7 for k in range(inner)] for t in range(rows)]
calls.tpserve_packed_bytes.restype = I
size = calls.tpserve_packed_bytes(0, I(outputs), I(inner))
memory = ctypes.create_string_buffer(size + 64)
blob = (ctypes.addressof(memory) + 63) // 64 * 64
flat = (ctypes.c_float * (outputs * inner))(*sum(weight, []))
calls.tpserve_pack(0, I(outputs), I(inner), flat, I(inner), ctypes.c_void_p(blob), 1)
flat_x, out = (ctypes.c_float * (rows * inner))(*sum(x, [])), (ctypes.c_float * (rows * outputs))()
arguments = Product(blob, ctypes.addressof(flat_x), None, ctypes.addressof(out), rows, inner, outputs, 0)
calls.tpserve_run(ctypes.byref(Call(0, ctypes.addressof(arguments))), 1, 2)
assert list(out) == [sum(a * b for a, b in zip(row, each)) for row in x for each in weight]
assert "torch" not in sys.modules
print("right", isa)
"""


@pytest.mark.parametrize(("processor", "isa"), [("", -1), ("Nehalem", 0), ("Haswell", 1)], ids=["here", "Nehalem", "Haswell"])
def test_it_needs_nothing_but_the_c_library(processor: str, isa: int) -> None:
    """No torch and no libgomp; on older processors, emulated, it chooses what they have."""
    emulator = shutil.which("qemu-x86_64") if processor else ""
    if SANITIZED or emulator is None or (processor and os.uname().machine != "x86_64"):
        pytest.skip("needs qemu-user on x86-64, and no sanitizer")
    under = [emulator, "-cpu", processor] if emulator else []
    python = str(Path(sys.executable).resolve())
    environ = {name: text for name, text in os.environ.items() if name not in ("PYTHONPATH", "LD_PRELOAD")}
    command = [*under, python, "-S", "-c", ALONE, str(FILE), str(isa)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=environ, cwd=ROOT)
    assert done.returncode == 0 and done.stdout.startswith("right "), done.stderr
