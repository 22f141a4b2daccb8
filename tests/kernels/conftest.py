"""Chooses card or interpreter while nothing has imported triton yet."""

import numpy as np
import pytest

from tests.kernels.device import DEVICE


@pytest.fixture
def every_row_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter's BLAS rounds a row by its place in the tile, as matrix units do not: have it multiply row by row."""
    matmul = np.matmul
    if DEVICE == "cpu":
        monkeypatch.setattr(np, "matmul", lambda a, b, dtype: np.concatenate([matmul(row[None], b, dtype=dtype) for row in a]))
