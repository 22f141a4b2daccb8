"""kill -9 of ranks: the mesh forms again, the epoch grows, and nothing stays behind. `make chaos` runs the long form."""

import pytest

from tests.crash.chaos import chaos


def test_three_kills() -> None:
    report = chaos(nnodes=1, nproc=2, kills=3, seed=1)
    assert report.kills == 3 and report.epochs >= 1 + len(report.outages_s)


@pytest.mark.long
@pytest.mark.parametrize(("nnodes", "nproc"), [(1, 3), (2, 2)])
def test_a_hundred_kills(nnodes: int, nproc: int, capsys: pytest.CaptureFixture[str]) -> None:
    report = chaos(nnodes, nproc, kills=100, seed=nnodes)
    with capsys.disabled():
        print(f"\n{nnodes} nodes x {nproc} ranks: {report}")
    assert report.kills == 100
