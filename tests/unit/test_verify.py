"""`--verify-weights`: the ranks of a node read each byte once between them, and nodes that differ are told where."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import Mock

import pytest
from torch.distributed import HashStore

from tpserve.config.env import RankEnv
from tpserve.engine import verify
from tpserve.errors import UserError
from tpserve.weights import content

NAMES = ["a.safetensors", "b.safetensors"]


def rank(number: int, nodes: list[int]) -> RankEnv:
    """`nodes`: of each rank."""
    same = [other for other, node in enumerate(nodes) if node == nodes[number]]
    return Mock(spec=RankEnv, rank=number, world_size=len(nodes), node_rank=nodes[number], local_rank=same.index(number),
                local_world_size=len(same))  # fmt: skip


def outcomes(directories: list[Path], nodes: list[int]) -> tuple[list[BaseException | None], list[int]]:
    """What became of each rank, and how many bytes it read."""
    store, read = HashStore(), [0] * len(nodes)

    def run(number: int) -> None:
        def progress(done: int, total: int) -> None:
            read[number] = done

        verify.check(rank(number, nodes), directories[nodes[number]], NAMES, store, 2, progress)

    with ThreadPoolExecutor(len(nodes)) as pool:
        return [each.exception() for each in [pool.submit(run, number) for number in range(len(nodes))]], read


@pytest.fixture
def directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    monkeypatch.setattr(content, "SLICE_BYTES", 1000)
    for node in "01":
        (tmp_path / node).mkdir()
        (tmp_path / node / NAMES[0]).write_bytes(bytes(range(256)) * 20)
        (tmp_path / node / NAMES[1]).write_bytes(b"b" * 77)
    return [tmp_path / "0", tmp_path / "1"]


def test_nodes_that_are_alike(directories: list[Path]) -> None:
    found, read = outcomes(directories, [0, 0, 0, 1])
    assert found == [None] * 4
    assert sum(read[:3]) == read[3] == 5120 + 77


@pytest.mark.parametrize(("name", "at", "start"), [(0, 4321, "4,000"), (1, 76, "0")])
def test_one_byte_is_enough(directories: list[Path], name: int, at: int, start: str) -> None:
    with (directories[1] / NAMES[name]).open("r+b") as file:
        file.seek(at)
        file.write(b"?")
    assert_all_hear(directories, f"--verify-weights: {NAMES[name]} of node 1 is not that of node 0, from byte {start} on: put")


def test_a_file_that_is_longer(directories: list[Path]) -> None:
    with (directories[0] / NAMES[1]).open("ab") as file:
        file.write(b"b" * 2000)
    assert_all_hear(directories, f"--verify-weights: {NAMES[1]} of node 1 is not that of node 0, from byte 0 on: put")


def assert_all_hear(directories: list[Path], said: str) -> None:
    found, _ = outcomes(directories, [0, 0, 1])
    assert all(isinstance(each, UserError) and str(each).startswith(said) for each in found), found
