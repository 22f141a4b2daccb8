"""Triton interprets the kernels, also where a card is there: this folder is about the card that is not."""

import os
import sys

if os.environ.get("TRITON_INTERPRET") != "1":
    assert "triton" not in sys.modules, "triton was imported before the interpreter was chosen: run tests/card on its own"
    os.environ["TRITON_INTERPRET"] = "1"
