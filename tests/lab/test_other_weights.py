"""Two nodes with different weights do not serve together, and hear which file it is."""

import shutil
from pathlib import Path

import pytest

from launch.lab.hosts import Host
from launch.lab.jobs import commands
from tests.cluster import tiny_model
from tests.lab.cluster import cluster

FILE = "model-2.safetensors"
IN_A_SAMPLE, BETWEEN_SAMPLES = -1, -1100
"""Of the last 1024 bytes and those between, of a file of some 86 KB with 32 samples: see `weights/content`."""


@pytest.mark.parametrize(
    ("place_of_byte", "flags", "said"),
    [
        (IN_A_SAMPLE, [], f"has weights {FILE} "),
        (BETWEEN_SAMPLES, ["--verify-weights"], f"--verify-weights: {FILE} of node 1 is not that of node 0, from byte 0 on"),
    ],
)
def test_other_weights_are_refused(
    hosts: list[Host], place: Path, tmp_path: Path, place_of_byte: int, flags: list[str], said: str
) -> None:
    models = [tiny_model.save(tmp_path / "0"), tmp_path / "1"]
    tiny_model.add_weights(models[0])
    shutil.copytree(*models)
    change(models[1] / FILE, place_of_byte)
    lines = commands(hosts, [str(models[0]), "-tp", "2", *flags], [1])
    lines[1] = [str(models[1]) if word == str(models[0]) else word for word in lines[1]]
    with cluster(hosts, [], place, lines=lines) as server:
        assert server.wait(60.0)[0] == 2
        assert said in server.log and "put the same files on every node" in server.log


def change(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
