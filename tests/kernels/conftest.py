"""Chooses card or interpreter while nothing has imported triton yet."""

from tests.kernels.device import DEVICE

__all__ = ["DEVICE"]
