"""Serve the built-in model and run the tests of clients against it, in an environment that has the clients.

python tests/clients/run.py PYTHON OTEL [PYTEST-ARGS]    PYTHON: the interpreter of that environment; OTEL: a directory with
OpenTelemetry's SDK, which the server imports from there
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
CLIENTS = (
    *("openai", "anthropic", "langchain-openai", "litellm", "pydantic-ai-slim", "lm-eval", "schemathesis"),
    "opentelemetry-proto",
)
SHORT = ("--max-model-len", "96")
"""Of a second server: answers without max_tokens are short there."""


def main() -> int:
    python, otel, port, short_port = sys.argv[1], sys.argv[2], free_port(), free_port()
    collector = f"127.0.0.1:{free_port()}"
    common = ("--device", "cpu", "--served-model-name", MODEL)
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), otel]))
    env = {"PYTHONPATH": path, "OTEL_BSP_SCHEDULE_DELAY": "200"}
    traced = serve(*common, "-tp", "2", "--otlp-traces-endpoint", f"http://{collector}", port=port)
    with (
        tempfile.TemporaryDirectory() as directory,
        running([traced], port, Path(directory) / "log", env=env),
        running([serve(*common, *SHORT, "--nproc-per-node", "1", port=short_port)], short_port, Path(directory) / "short.log"),
    ):
        environment = {
            **os.environ,
            "TPSERVE_URL": f"http://127.0.0.1:{port}/v1",
            "TPSERVE_SHORT_URL": f"http://127.0.0.1:{short_port}",
            "TPSERVE_FREE_ADDRESS": f"127.0.0.1:{free_port()}",
            "TPSERVE_OTLP_ADDRESS": collector,
            "TPSERVE_MODEL": MODEL,
        }
        tests = [
            python,
            "-m",
            "pytest",
            "-q",
            "-rs",
            "--tb=short",
            "--disable-warnings",
            *sys.argv[3:],
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
