"""Where kernel tests run: on the card, or without one in Triton's interpreter. Imported by conftest, before any kernel."""

import os
import sys

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
    assert "triton" not in sys.modules, "triton was imported before the interpreter was chosen: run tests/kernels on its own"
    os.environ["TRITON_INTERPRET"] = "1"
