"""Cores near a card: from what the kernel tells of it, within what this process may use. The card itself is made up."""

import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tpserve.worker.device import bind, cores_of

CARD = torch.device("cuda", 3)
UUID = "5a8bc2bd-3fc4-0d2f-0d4c-8b6d8b0b7f21"


@pytest.fixture(autouse=True)
def affinity() -> Iterator[set[int]]:
    before = os.sched_getaffinity(0)
    yield before
    os.sched_setaffinity(0, before)


def card(monkeypatch: pytest.MonkeyPatch, where: Path, near: str) -> tuple[Path, Path]:
    """What driver and kernel tell of two cards, of which ours is the second."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=UUID))
    driver, buses = where / "driver", where / "pci"
    for place, uuid, cores in (("0000:1A:00.0", "0" * 36, "4096-4111"), ("0000:4F:00.0", UUID, near)):
        (driver / place).mkdir(parents=True)
        (driver / place / "information").write_text(f"Model: \t NVIDIA H200\nGPU UUID: \t GPU-{uuid}\nBus Location: {place}\n")
        (buses / place.lower()).mkdir(parents=True)
        (buses / place.lower() / "local_cpulist").write_text(f"{cores}\n")
    return driver, buses


def test_sets_of_cores() -> None:
    assert cores_of("0-3,8,10-11") == {0, 1, 2, 3, 8, 10, 11}
    assert cores_of("") == set()


def test_a_rank_keeps_to_the_cores_near_its_card(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, affinity: set[int]) -> None:
    one = min(affinity)
    found = card(monkeypatch, tmp_path, f"{one},4000-4015")
    assert bind(CARD, *found) == f"runs on 1 cores near GPU 3 ({one},4000-4015); --no-binding leaves that to the system"
    assert os.sched_getaffinity(0) == {one}


def test_nothing_is_done_where_nothing_is_known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, affinity: set[int]) -> None:
    assert bind(torch.device("cpu")) == ""
    driver, buses = card(monkeypatch, tmp_path, "4000-4015")
    assert bind(CARD, driver, buses) == "", "none of them is ours"
    assert bind(CARD, driver, tmp_path) == bind(CARD, tmp_path, buses) == "", "a system that does not tell where the card is"
    assert os.sched_getaffinity(0) == affinity
