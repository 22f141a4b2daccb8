"""Serve the built-in model and run the tests of clients against it, in an environment that has the clients.

python tests/clients/run.py PYTHON      PYTHON: the interpreter of that environment
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.server import free_port, running, serve  # noqa: E402

MODEL = "builtin"
CLIENTS = ("openai", "anthropic", "langchain-openai", "litellm", "pydantic-ai-slim")


def main() -> int:
    python, port = sys.argv[1], free_port()
    with (
        tempfile.TemporaryDirectory() as directory,
        running(
            [serve("--device", "cpu", "-tp", "2", "--served-model-name", "builtin", port=port)], port, Path(directory) / "log"
        ),
    ):
        environment = {**os.environ, "TPSERVE_URL": f"http://127.0.0.1:{port}/v1", "TPSERVE_MODEL": MODEL}
        tests = [
            python,
            "-m",
            "pytest",
            "-q",
            "--tb=short",
            "--disable-warnings",
            *sys.argv[2:],
            "-p",
            "no:cacheprovider",
            "-c",
            os.devnull,
            "--rootdir",
            str(ROOT),
        ]
        done = subprocess.run([*tests, str(ROOT / "tests" / "clients")], env=environment, check=False)
    listed = subprocess.run([python, "-m", "pip", "list", "--format=freeze"], capture_output=True, text=True, check=True).stdout
    print(*(line for line in listed.splitlines() if line.partition("==")[0].replace("_", "-") in CLIENTS), sep="\n")
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
