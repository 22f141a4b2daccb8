"""The bare and the parity share on other versions of Python and torch; prints a table for docs/install.md.

    python tests/matrix.py 3.12=2.14.1 3.13=2.14.1       an environment for each pair, in .tmp/matrix
    python tests/matrix.py                               Python 3.11 to 3.13 with torch 2.11 to 2.15, as far as they are found

Standard library only. Exit code 1 when a pair failed; a Python that is not installed here is listed and does not count.
"""

import datetime
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ALL = [*(f"3.11={torch}" for torch in ("2.11.0", "2.12.0", "2.13.0", "2.14.1", "2.15.0")), "3.12=2.14.1", "3.13=2.14.1"]
SHARES = ("bare", "parity")


def main() -> int:
    os.chdir(ROOT)
    results = {pair: tried(*pair.split("=")) for pair in sys.argv[1:] or ALL}
    print(f"\n{datetime.date.today()}\n{'Python':<8}{'torch':<14}result")
    for pair, result in results.items():
        python, torch = pair.split("=")
        print(f"{python:<8}{torch:<14}{result}")
    return int(any("not here" not in result and not result.endswith("0 failed") for result in results.values()))


def tried(python: str, torch: str) -> str:
    """One pair, in words."""
    if subprocess.run([f"python{python}", "--version"], check=False, capture_output=True).returncode:
        return f"python{python} is not here"
    venv = ROOT / ".tmp" / "matrix" / f"python{python}-torch{torch}"
    venv.parent.mkdir(parents=True, exist_ok=True)
    chosen = {"PYTHON": f"python{python}", "TORCH": f"torch=={torch}"}
    install = [str(venv / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "install", "--editable", ".[test]"]
    for command in ([str(ROOT / "launch" / "make_venv.sh"), str(venv)], install):
        if subprocess.run(command, check=False, env={**os.environ, **chosen}).returncode:
            return "could not be installed"
    shares = [str(venv / "bin" / "python"), "tests/run.py", *SHARES]
    with subprocess.Popen(shares, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        last = ""
        for line in run.stdout:
            print(line, end="", flush=True)
            last = line
    counts = re.match(r"(\d+ passed, \d+ failed)", last)
    return counts[1] if counts else "ended without a result"


if __name__ == "__main__":
    sys.exit(main())
