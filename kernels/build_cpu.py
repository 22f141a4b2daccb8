"""Builds the library of CPU kernels from `kernels/cpu/`: `python kernels/build_cpu.py [OUT]`.

Standard library only; setup.py calls `build_optional`. One object for each instruction set of this architecture, and one for the
entry points.

--optional  what an installation does: nothing when OUT was built from the present sources, fewer instruction sets where the
            compiler is too old for some, and without a compiler one line that says why there is no library
--emulate   the instruction sets above AVX2, computed with those of AVX2, so that tests run what the processor has not
--sanitize  with the address and undefined behaviour sanitizers
--sets avx2 only these beside the portable one, which takes less time
"""

import argparse
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCES = Path(__file__).resolve().parent / "cpu"
LIBRARY = Path(__file__).resolve().parent / "tpserve_kernels" / "libtpserve_cpu.so"
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror", "-Wno-psabi"]
FLAGS += ["-Wno-maybe-uninitialized"]  # gcc warns of what its own AVX-512 header leaves undefined on purpose
FLAGS += ["-fno-exceptions", "-fno-rtti", "-fno-threadsafe-statics"]  # nothing of libstdc++
FLAGS += ["-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off", "-fno-tree-vectorize"]  # sums as they are written
AVX2 = ["-mavx2", "-mfma", "-mf16c", "-mtune=znver3"]
AVX512 = ["-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
AVX512 += ["-mtune=icelake-server", "-mprefer-vector-width=512"]
WIDE, BF16, TILES = "-DWIDE", "-DBF16_PAIRS", "-DTILES"
X86_64 = {
    "portable": [],
    "avx2": AVX2,
    "avx512": [*AVX512, WIDE],
    "avx512_bf16": [*AVX512, WIDE, BF16],
    "amx": [*AVX512, WIDE, BF16, TILES],
}
SANITIZE = ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g"]


def compiler() -> list[str]:
    """The command of the C++ compiler: CXX, else the first that is there; empty without one."""
    chosen = os.environ.get("CXX") or next((name for name in ("g++", "clang++", "c++") if shutil.which(name)), "")
    return shlex.split(chosen)


def version() -> str:
    """A hash of the sources and of this file, which has the flags. The library holds it, too: one of others is not used."""
    digest = hashlib.sha256()
    for path in (*sorted(SOURCES.iterdir()), Path(__file__)):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def glibc(library: Path) -> int:
    """The oldest glibc 2.x that can load the library, by the versions of the functions that it needs."""
    return max(int(minor) for minor in re.findall(rb"GLIBC_2\.(\d+)", library.read_bytes()))


def build_optional(to: Path = LIBRARY) -> str:
    """Build the library unless it is there already, with the instruction sets that the compiler can do.

    Returns one line about what is missing and why; empty when nothing is. Then, at worst, there is no file `to`.
    """
    if to.exists() and version().encode() in to.read_bytes():
        return ""
    without = "no CPU kernels were built, so serving on CPUs is slower"
    try:
        left_out = build(to, optional=True)
    except OSError as error:
        to.unlink(missing_ok=True)
        return f"{without}: {error}"
    except subprocess.CalledProcessError as error:
        to.unlink(missing_ok=True)
        return f"{without}: {_reason(error)}"
    return f"CPU kernels were built without {', '.join(left_out)}: the compiler ({compiler()[0]}) is too old" if left_out else ""


def build(
    to: Path = LIBRARY, *, emulate: bool = False, sanitize: bool = False, sets: Sequence[str] = (), optional: bool = False
) -> list[str]:
    """Compile and link to the file `to`. Returns the names of the sets left out: with `optional`, those that do not compile.

    FileNotFoundError without a compiler, subprocess.CalledProcessError when it fails.
    """
    cxx = compiler()
    if not cxx or shutil.which(cxx[0]) is None:
        raise FileNotFoundError(f"there is no C++ compiler{f' {cxx[0]}' if cxx else ''} (install g++ or clang++, or set CXX)")
    flags_of = _sets(sets, emulate)
    common = [flag for flag in FLAGS if not (optional and flag == "-Werror")] + (SANITIZE if sanitize else [])
    to.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:

        def compile_one(name: str, source: str, flags: list[str]) -> str:
            """A source of its own name, which the library's symbols then show: a test looks which code is of which set."""
            unit = Path(folder, f"{name}.cc")
            unit.write_text(f'#include "{source}"\n')
            target = unit.with_suffix(".o")
            command = [*cxx, *common, "-I", str(SOURCES), "-c", str(unit), "-o", str(target)]
            try:
                _run([*command, *flags], quiet=optional)
            except subprocess.CalledProcessError:
                if not optional:
                    raise
                _run([*command, *(flag for flag in flags if not flag.startswith("-mtune"))], quiet=True)  # unknown to an old one
            return str(target)

        entry = [f'-DVERSION="{version()}"', *(["-DEMULATED"] if emulate else [])]
        jobs = {"library": pool.submit(compile_one, "entry", "library.cc", entry)}
        for name, flags in flags_of.items():
            jobs[name] = pool.submit(compile_one, name, "kernels.cc", [*flags, f"-DSET=tpserve_{name}"])
        left_out = [name for name in flags_of if optional and name != "portable" and jobs[name].exception() is not None]
        objects = [job.result() for name, job in jobs.items() if name not in left_out]
        # --as-needed: the driver of C++ names libstdc++ and libm, of which nothing is used.
        link = ["-shared", "-static-libgcc", "-Wl,--as-needed", "-Wl,-z,defs", "-Wl,-z,noexecstack"]
        if sanitize:
            link = ["-shared", *SANITIZE]
        part = f"{folder}/library.so"
        _run([*cxx, *link, "-o", part, *objects], quiet=optional)
        ready = to.with_suffix(f".{os.getpid()}")
        shutil.copyfile(part, ready)
        ready.replace(to)
    return left_out


def _sets(wanted: Sequence[str], emulate: bool) -> dict[str, list[str]]:
    """The instruction sets to build, with their flags: the portable one, and on x86-64 those `wanted`, all by default."""
    x86 = platform.machine() in ("x86_64", "AMD64")
    flags_of = {name: flags for name, flags in X86_64.items() if name == "portable" or (x86 and (not wanted or name in wanted))}
    if not emulate:
        return flags_of
    return {
        name: [*AVX2, "-O1", "-DEMULATED", *(flag for flag in flags if flag.startswith("-D"))] if WIDE in flags else flags
        for name, flags in flags_of.items()
        if name != "avx2"
    }


def _run(command: list[str], *, quiet: bool) -> None:
    """What the compiler says is shown, or kept for `_reason`."""
    subprocess.run(command, check=True, stderr=subprocess.PIPE if quiet else None, text=True)


def _reason(error: subprocess.CalledProcessError) -> str:
    """The first line in which a compiler that failed speaks of an error, else its last one."""
    said = [line.strip() for line in (error.stderr or "").splitlines() if line.strip()]
    line = next((line for line in said if "error" in line), said[-1] if said else f"exit code {error.returncode}")
    return f"{error.cmd[0]} fails: {line[:200]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", type=Path, default=LIBRARY)
    parser.add_argument("--optional", action="store_true")
    parser.add_argument("--emulate", action="store_true")
    parser.add_argument("--sanitize", action="store_true")
    parser.add_argument("--sets", nargs="+", default=[], choices=[name for name in X86_64 if name != "portable"])
    options = parser.parse_args()
    if options.optional:
        if missing := build_optional(options.out):
            sys.stderr.write(f"tpserve: {missing}\n")
        return
    try:
        build(options.out, emulate=options.emulate, sanitize=options.sanitize, sets=options.sets)
    except (OSError, subprocess.CalledProcessError) as error:
        sys.exit(str(error))
    sys.stdout.write(f"{options.out}\n")


if __name__ == "__main__":
    main()
