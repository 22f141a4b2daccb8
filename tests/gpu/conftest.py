"""As in tests/kernels: where these files are collected without a card, the interpreter is chosen before triton is imported."""

from tests.kernels.device import DEVICE

__all__ = ["DEVICE"]
