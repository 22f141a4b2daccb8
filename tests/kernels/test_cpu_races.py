"""Barriers inside operations, under ThreadSanitizer."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.kernels import cpu_isa

NO_ROOM = "unexpected memory mapping"


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)


@pytest.mark.skipif(not cpu_isa.build_cpu.compiler(), reason="needs a C++ compiler")
def test_what_a_thread_reads_of_another_is_behind_a_barrier(tmp_path: Path) -> None:
    program, source = tmp_path / "races", Path(__file__).with_name("races.cc")
    flags = ["-std=c++17", "-O1", "-fsanitize=thread", "-Wno-psabi", "-pthread", "-I", str(cpu_isa.build_cpu.SOURCES)]
    built = run([*cpu_isa.build_cpu.compiler(), *flags, str(source), "-o", str(program)])
    if built.returncode and "tsan" in built.stderr:
        pytest.skip("the compiler has no ThreadSanitizer here")
    assert not built.returncode, built.stderr
    ran = run([str(program)])
    if NO_ROOM in ran.stderr:  # the system's randomisation of addresses took what it needs
        ran = run(["setarch", os.uname().machine, "-R", str(program)])
        if NO_ROOM in ran.stderr or "personality" in ran.stderr:
            pytest.skip("ThreadSanitizer has no room for its memory here")
    assert not ran.returncode, ran.stdout + ran.stderr[:4000]
