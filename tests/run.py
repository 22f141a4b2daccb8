"""The whole suite in shares, each with its time budget on two cores; prints a table and, last, how many tests passed and failed.

    python tests/run.py                   everything but what needs a card or a long time
    python tests/run.py lint unit rules   some shares: these are `make check`
    python tests/run.py --gpu             what needs a card; reports go to $OUT or .tmp

Shares that only compute run one after another beside the others, at a lower priority: the others mostly wait, and some of their
tests look at the clock. Standard library only. Exit code 1 when anything failed; a share over its budget is marked, not failed.
"""

import argparse
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LINT = (
    ("ruff", "check", "."),
    ("ruff", "format", "--check", "."),
    ("mypy",),
)
SHARES: dict[str, tuple[int, tuple[str, ...]]] = {
    "unit": (200, ("unit",)),
    "rules": (90, ("scheduling", "architecture")),
    "simulation": (80, ("simulation",)),
    "numerics": (90, ("numerics",)),
    "parity": (400, ("parity",)),
    "kernels": (300, ("kernels", "card")),
    "http": (175, ("http",)),
    "cluster": (900, ("cluster",)),
    "crash": (110, ("crash",)),
    "lab": (130, ("lab",)),
    "bare": (95, ("bare",)),
}
"""Name to (budget in seconds, folders of tests/)."""
COMPUTING = ("unit", "rules", "simulation", "numerics", "parity", "kernels")
"""Shares that run beside the others where there are two cores."""
NICE = 10
GPU = {
    "kernels-on-card": ("tests/kernels", "tests/gpu/test_kernels_on_card.py"),
    "engine-on-card": (
        "tests/gpu/test_engine_on_card.py",
        "tests/gpu/test_sampler_on_card.py",
        "tests/parity/test_two_forms.py",
    ),
}
INSTALL_S, LINT_S = 200, 160


@dataclass
class Row:
    name: str
    budget_s: int
    took_s: float
    passed: int = 0
    failed: int = 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shares", nargs="*", choices=[*SHARES, "lint", []], help="default: all")
    parser.add_argument("--gpu", action="store_true")
    options = parser.parse_args()
    os.chdir(ROOT)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a parent in the background, or nohup, may have them ignored
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    begin_s = time.monotonic()
    if options.gpu:
        return report(gpu_check(), time.monotonic() - begin_s)
    wanted = options.shares or ["lint", *SHARES]
    first, second = lanes([name for name in SHARES if name in wanted])
    with ThreadPoolExecutor(2) as beside:
        linted = beside.submit(lint) if "lint" in wanted else None
        computed = beside.submit(lambda: [share(name, beside=True) for name in second])
        rows = [share(name) for name in first]
    rows = ([] if linted is None else [linted.result()]) + computed.result() + rows
    installed = [] if options.shares else [install()]
    return report(installed + rows, time.monotonic() - begin_s + sum(row.took_s for row in installed))


def lanes(names: list[str]) -> tuple[list[str], list[str]]:
    """What runs one after another, and what beside it: the shares that compute, or all but the first when all of them do."""
    computing = [name for name in names if name in COMPUTING]
    others = [name for name in names if name not in COMPUTING]
    if (os.cpu_count() or 1) < 2:
        return computing + others, []
    return (others, computing) if others else (computing[:1], computing[1:])


def install() -> Row:
    """What the installation took, the last time there was one."""
    seconds = [int(path.read_text()) for path in (ROOT / ".venv").glob("t*.stamp")]
    return Row("install", INSTALL_S, sum(seconds))


def lint() -> Row:
    row, begin_s = Row("lint + types", LINT_S, 0.0), time.monotonic()
    for tool in LINT:
        done = subprocess.run(
            [sys.executable, "-m", *tool], check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        print(f"== {' '.join(tool)}\n{done.stdout}", end="", flush=True)
        row.passed += done.returncode == 0
        row.failed += done.returncode != 0
    row.took_s = time.monotonic() - begin_s
    return row


def share(name: str, beside: bool = False) -> Row:
    budget_s, folders = SHARES[name]
    paths = [f"tests/{folder}" for folder in folders if (ROOT / "tests" / folder).is_dir()]
    options = ["-m", "not gpu and not long and not lab", "--durations=12", "--durations-min=3"]
    return pytest(name, budget_s, [*paths, *options], beside=beside)


def gpu_check() -> list[Row]:
    """On a card: every kernel against its reference, the engine's other form against the CPU's, and the roofline."""
    if subprocess.run(
        [sys.executable, "-c", "import torch; assert torch.cuda.is_available()"], stderr=subprocess.DEVNULL, check=False
    ).returncode:
        sys.exit("gpu-check needs a card that torch can use, and there is none")
    out = Path(os.environ.get("OUT", ".tmp"))
    out.mkdir(parents=True, exist_ok=True)
    rows = [pytest(name, 300, [*paths, "-rs", f"--junitxml={out}/{name}.xml"]) for name, paths in GPU.items()]
    begin_s = time.monotonic()
    print("== roofline", flush=True)
    code = subprocess.run(
        [sys.executable, "kernels/bench_roofline.py", "--output", str(out / "roofline.json")], check=False
    ).returncode
    return [*rows, Row("roofline", 300, time.monotonic() - begin_s, passed=int(code == 0), failed=int(code != 0))]


def pytest(name: str, budget_s: int, arguments: list[str], *, beside: bool = False) -> Row:
    """One pytest process, its output shown as it comes, or whole at its end when others run beside it; its last line counted."""
    if not beside:
        print(f"== {name}", flush=True)
    begin_s = time.monotonic()
    row = Row(name, budget_s, 0.0)
    nice = ["nice", "-n", str(NICE)] if beside else []
    child = subprocess.Popen([*nice, sys.executable, "-m", "pytest", *arguments], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    summary, lines = "", []
    for line in child.stdout:
        if beside:
            lines.append(line)
        else:
            print(line, end="", flush=True)
        if re.search(r"\bin [\d.]+s", line):
            summary = line
    code = child.wait()
    if beside:
        print(f"== {name}\n{''.join(lines)}", end="", flush=True)
    counts = {what: int(number) for number, what in re.findall(r"(\d+) (passed|failed|error)", summary)}
    row.passed, row.failed = counts.get("passed", 0), counts.get("failed", 0) + counts.get("error", 0)
    if code not in (0, 5) and not row.failed:  # 5: no test was selected
        row.failed = 1
    row.took_s = time.monotonic() - begin_s
    return row


def report(rows: list[Row], took_s: float) -> int:
    """The table. `took_s`: by the clock, which is less than the sum where shares ran beside each other."""
    print(f"\n{'share':<14}{'seconds':>9}{'budget':>9}{'passed':>9}{'failed':>9}")
    total = Row(
        "total",
        INSTALL_S + sum(row.budget_s for row in rows if row.name in SHARES and row.name not in COMPUTING),
        took_s,
        sum(r.passed for r in rows),
        sum(r.failed for r in rows),
    )
    for row in [*rows, total]:
        over = "  over budget" if row.took_s > row.budget_s else ""
        print(f"{row.name:<14}{row.took_s:>9.0f}{row.budget_s:>9}{row.passed:>9}{row.failed:>9}{over}")
    print(f"\n{total.passed} passed, {total.failed} failed in {total.took_s:.0f}s")
    return 1 if total.failed else 0


if __name__ == "__main__":
    sys.exit(main())
