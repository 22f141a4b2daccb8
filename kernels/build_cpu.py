"""Builds the library of CPU kernels from `kernels/cpu/`.

    python kernels/build_cpu.py [--emulate] [--sanitize] [--sets avx2] [OUT]

Standard library only; setup.py calls it. One object for each instruction set of this architecture, and one for the entry points.
`--emulate` computes every instruction set with those of AVX2, so that tests run what the processor has not. `--sets`: only these
beside the portable one, which takes less time.
"""

import argparse
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCES = Path(__file__).resolve().parent / "cpu"
LIBRARY = Path(__file__).resolve().parent / "tpserve_kernels" / "libtpserve_cpu.so"
FLAGS = (
    *("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-exceptions", "-fno-rtti", "-fno-threadsafe-statics"),
    *("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off", "-fno-tree-vectorize"),
    *("-Wall", "-Wextra", "-Werror", "-Wno-psabi"),
)
AVX2 = ["-mavx2", "-mfma", "-mf16c", "-mtune=haswell"]
AVX512 = [
    *("-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"),
    *("-mtune=icelake-server", "-mprefer-vector-width=512"),
]
WIDE, BF16, TILES = "-DWIDE", "-DBF16_PAIRS", "-DTILES"
X86_64 = {
    "portable": [],
    "avx2": AVX2,
    "avx512": [*AVX512, WIDE],
    "avx512_bf16": [*AVX512, WIDE, BF16],
    "amx": [*AVX512, WIDE, BF16, TILES],
}
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g"]


def compiler() -> str | None:
    """The C++ compiler: CXX, else the first that is there."""
    return os.environ.get("CXX") or next((name for name in ("g++", "clang++", "c++") if shutil.which(name)), None)


def version() -> str:
    """A hash of the sources, which the library also holds: one built from others is not used."""
    digest = hashlib.sha256()
    for path in sorted(SOURCES.iterdir()):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def build(to: Path = LIBRARY, *, emulate: bool = False, sanitize: bool = False, sets: Sequence[str] = ()) -> Path:
    """Compile and link. FileNotFoundError without a compiler, subprocess.CalledProcessError when it fails."""
    cxx = compiler()
    if cxx is None:
        raise FileNotFoundError("no C++ compiler: install g++ or clang++, or set CXX")
    x86 = platform.machine() in ("x86_64", "AMD64")
    flags_of = {name: flags for name, flags in X86_64.items() if name == "portable" or (x86 and (not sets or name in sets))}
    if emulate:
        flags_of = {
            name: flags if WIDE not in flags else [*AVX2, "-O1", "-DEMULATED", *(flag for flag in flags if flag.startswith("-D"))]
            for name, flags in flags_of.items()
        }
    extra = SANITIZE if sanitize else []
    to.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:

        def compile_one(name: str, source: str, flags: list[str]) -> str:
            target = f"{folder}/{name}.o"
            subprocess.run([cxx, *FLAGS, *extra, *flags, "-c", str(SOURCES / source), "-o", target], check=True)
            return target

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            jobs = [
                pool.submit(compile_one, name, "kernels.cc", [*flags, f"-DSET=tpserve_{name}"])
                for name, flags in flags_of.items()
            ]
            jobs.append(
                pool.submit(
                    compile_one, "library", "library.cc", [f'-DVERSION="{version()}"', *(["-DEMULATED"] if emulate else [])]
                )
            )
            objects = [job.result() for job in jobs]
        # The driver of C leaves libstdc++ out.
        part = f"{folder}/library.so"
        link = [cxx.replace("g++", "gcc").replace("clang++", "clang")] if not extra else [cxx]
        subprocess.run(
            [*link, "-shared", *extra, "-static-libgcc", "-Wl,-z,defs", "-Wl,-z,noexecstack", "-o", part, *objects], check=True
        )
        ready = to.with_suffix(f".{os.getpid()}")
        shutil.copyfile(part, ready)
        ready.replace(to)
    return to


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", type=Path, default=LIBRARY)
    parser.add_argument("--emulate", action="store_true")
    parser.add_argument("--sanitize", action="store_true")
    parser.add_argument("--sets", nargs="+", default=[], choices=[name for name in X86_64 if name != "portable"])
    options = parser.parse_args()
    built = build(options.out, emulate=options.emulate, sanitize=options.sanitize, sets=options.sets)
    sys.stdout.write(f"{built}\n")


if __name__ == "__main__":
    main()
