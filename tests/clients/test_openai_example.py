"""The program of docs/examples that needs OpenAI's client."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("openai")
ROOT = Path(__file__).resolve().parents[2]


def test_chat_stream() -> None:
    server = os.environ["TPSERVE_URL"].removesuffix("/v1")
    command = [sys.executable, str(ROOT / "docs" / "examples" / "chat_stream.py"), server]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    answer, _, usage = done.stdout.partition("\n\n")
    assert len(answer.split()) > 3 and usage.startswith(f"{os.environ['TPSERVE_MODEL']}: ") and usage.endswith(" out\n")
