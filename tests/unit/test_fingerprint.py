"""What a rank tells of itself: it must see what makes ranks differ, and no more."""

import os
import time
from pathlib import Path

import pytest
from msgspec.structs import replace

from tests.specs import small
from tpserve.cli.server_flags import parse
from tpserve.config.engine_config import EngineConfig
from tpserve.config.resolve import resolve
from tpserve.engine import fingerprint as module
from tpserve.engine.fingerprint import fingerprint
from tpserve.types.machine import Machine
from tpserve.types.model_files import ModelFiles
from tpserve.weights.content import samples


def config(directory: Path, *flags: str) -> EngineConfig:
    files = ModelFiles(str(directory), str(directory))
    return resolve(parse(["m", "--device", "cpu", *flags]), files, small(), Machine(1, 1, 1, 0, 2, "torchrun"))


def test_flags_are_told_one_by_one_and_what_is_local_is_not(tmp_path: Path) -> None:
    plain = fingerprint(config(tmp_path), small())
    assert plain["--block-size"] == "16" and plain["Python"].startswith("3.")
    other = fingerprint(config(tmp_path, "--block-size", "8", "--port", "9", "--api-key", "s3cret"), small())
    assert {name for name in plain if plain[name] != other[name]} == {"--block-size"}
    assert "s3cret" not in str(other)
    assert fingerprint(config(tmp_path), replace(small(), hidden_size=128))["model config"] != plain["model config"]


def test_other_weights_are_another_fingerprint(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        directory = tmp_path / name
        directory.mkdir()
        (directory / "model-1.safetensors").write_bytes(b"x" * (9 if name == "b" else 8))
        (directory / "model.safetensors.index.json").write_text(
            '{"weight_map": {"t": "model-1.safetensors"}}' + " " * (name == "c")
        )
    a, b, c = (fingerprint(config(tmp_path / name), small()) for name in "abc")
    assert {name for name in a if a[name] != b[name]} == {"weights model-1.safetensors"}
    assert {name for name in a if a[name] != c[name]} == {"weights model.safetensors.index.json"}
    dummy = fingerprint(config(tmp_path / "a", "--load-format", "dummy"), small())
    assert not [name for name in dummy if name.startswith("weights")]


def test_a_hundred_gigabytes_are_sampled_within_a_second(tmp_path: Path) -> None:
    names = [f"model-{i}.safetensors" for i in range(100)]
    for name in names:
        (tmp_path / name).touch()
        os.truncate(tmp_path / name, 1 << 30)
    began_s = time.monotonic()
    first = samples(tmp_path, names)
    assert time.monotonic() - began_s < 1.0
    with (tmp_path / names[7]).open("r+b") as file:  # in one of the places
        file.seek((1 << 30) // 2)
        file.write(bytes(range(1, 256)) * (1 << 18))
    with (tmp_path / names[8]).open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"x")
    second = samples(tmp_path, names)
    assert {name for name in names if first[name] != second[name]} == {names[7], names[8]}


def test_the_driver_as_the_kernel_tells_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = tmp_path / "version"
    told.write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.133.20  Release Build\nGCC version: 12.2.0\n")
    monkeypatch.setattr(module, "DRIVER", told)
    assert module.driver() == "570.133.20"
    monkeypatch.setattr(module, "DRIVER", tmp_path / "none")
    assert module.driver() == "none"
