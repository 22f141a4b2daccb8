"""Checkpoints as they come: files, formats, names inside other modules, tensors too many. What does not fit is named."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from msgspec.structs import replace
from safetensors.torch import save_file

from tests.unit.weights_case import SPEC, TIED, decoder, poison, range_of, read, tensors, whole_checkpoint
from tpserve.errors import UserError
from tpserve.models.whole_model import sources
from tpserve.weights.checkpoint import Checkpoint
from tpserve.weights.dummy import dummy
from tpserve.weights.load import load
from tpserve.weights.names import LLAMA
from tpserve.weights.unused_weights import unused_tensors

NORM = "model.layers.4.input_layernorm.weight"
AUDIO = {
    "language_model.model.": "model.* (3), vision_tower.* (2)",
    "model.language_model.": "model.audio.* (3), vision_tower.* (2)",
}


@pytest.fixture
def whole() -> dict[str, torch.Tensor]:
    return whole_checkpoint()


@pytest.fixture
def directory(whole: dict[str, torch.Tensor], tmp_path: Path) -> Path:
    save_file(whole, tmp_path / "model.safetensors")
    return tmp_path


def test_files_by_index(whole: dict[str, torch.Tensor], tmp_path: Path) -> None:
    names = sorted(whole)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, held in parts.items():
        save_file({name: whole[name] for name in held}, tmp_path / file)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {name: file for file, held in parts.items() for name in held}}))
    model = poison(decoder(2, 3))
    read(tmp_path, model)
    assert not any(torch.isnan(parameter.tensor).any() for parameter in model.parameters())
    save_file({name: whole[name] for name in parts["b.safetensors"][1:]}, tmp_path / "b.safetensors")
    with pytest.raises(UserError, match=rf"b\.safetensors has no tensor {re.escape(names[1])}, though the index says so"):
        read(tmp_path, decoder())
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(UserError, match=r"b\.safetensors is missing, but model\.safetensors\.index\.json lists it"):
        read(tmp_path, model)
    save_file(whole, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"remaining files, or remove the index and model\.safetensors is read"):
        read(tmp_path, model)
    index.write_text('{"weight_map": {}}')
    with pytest.raises(UserError, match="missing from .*, whose weight files hold no tensors"):
        read(tmp_path, model)
    index.write_text("[]")
    with pytest.raises(UserError, match="not an index of weight files"):
        read(tmp_path, model)


def test_files_without_an_index(whole: dict[str, torch.Tensor], tmp_path: Path) -> None:
    names = sorted(whole)
    for file, held in (("model-1.safetensors", names[::2]), ("model-2.safetensors", names[1::2])):
        save_file({name: whole[name] for name in held}, tmp_path / file)
    model = poison(decoder())
    read(tmp_path, model)
    assert all(torch.equal(got, whole[name]) for name, got in tensors(model.parameters()).items())
    save_file({"model.norm.weight": whole["model.norm.weight"]}, tmp_path / "consolidated.safetensors")
    said = r"model\.norm\.weight is in .*consolidated\.safetensors and in .*model-[12]\.safetensors: leave the files of one"
    with pytest.raises(UserError, match=said):
        read(tmp_path, decoder())
    (tmp_path / "consolidated.safetensors").unlink()
    save_file({names[0]: whole[names[0]]}, tmp_path / "model-1.safetensors")
    with pytest.raises(UserError, match=r"is missing from the 2 files model-1\.safetensors to model-2\.safetensors in"):
        read(tmp_path, decoder())


@pytest.mark.parametrize("name", ["../x.safetensors", "/x.safetensors", "a/../../x.safetensors", "", ".", "x\0.safetensors"])
def test_an_index_that_leaves_its_directory_is_refused(whole: dict[str, torch.Tensor], tmp_path: Path, name: str) -> None:
    directory = tmp_path / "model"
    directory.mkdir()
    save_file(whole, tmp_path / "x.safetensors")
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(whole, f"{tmp_path}{name}" if name.startswith("/") else name)}))
    with pytest.raises(UserError, match=r"index\.json names '.*', which is no file in its directory"):
        read(directory, decoder())


def test_an_index_may_name_links_as_the_cache_of_the_hub_has_them(whole: dict[str, torch.Tensor], tmp_path: Path) -> None:
    directory = tmp_path / "snapshots"
    directory.mkdir()
    save_file(whole, tmp_path / "blob")
    (directory / "a.safetensors").symlink_to("../blob")
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(whole, "a.safetensors")}))
    read(directory, decoder())


def test_tied_embeddings(whole: dict[str, torch.Tensor], tmp_path: Path) -> None:
    save_file({name: tensor for name, tensor in whole.items() if name != "lm_head.weight"}, tmp_path / "model.safetensors")
    embedding = whole["model.embed_tokens.weight"]
    one = decoder(spec=TIED)
    read(tmp_path, one)
    assert sum(parameter.tensor.shape == embedding.shape for parameter in one.parameters()) == 1, "held once"
    last = decoder(stage=1, pp=2, spec=TIED)
    read(tmp_path, last)
    assert torch.equal(tensors(last.parameters())["model.embed_tokens.weight"], embedding)
    with pytest.raises(UserError, match=r"lm_head\.weight with shape \[517, 24\] is missing"):
        read(tmp_path, decoder())


def test_names_without_the_outermost_of_two_prefixes(tmp_path: Path) -> None:
    spec = replace(SPEC, family="opt", qk_norm=None, norm="layer", rope=None, gated=False, activation="relu")
    one = decoder(spec=spec)
    dummy(one.parameters(), seed=3)
    whole: dict[str, torch.Tensor] = {}
    for parameter in one.parameters():
        for source, place in parameter.parts():
            range_of(whole.setdefault(source.name, torch.zeros(source.shape)), source).copy_(place)
    save_file({name.removeprefix("model."): tensor for name, tensor in whole.items()}, tmp_path / "model.safetensors")
    again = poison(decoder(spec=spec))
    read(tmp_path, again)
    assert all(torch.equal(a.tensor, b.tensor) for a, b in zip(again.parameters(), one.parameters(), strict=True))


@pytest.mark.parametrize(
    ("outside", "head"),
    [
        ("", ""),
        ("language_model.model.", "language_model."),
        ("model.language_model.", ""),
        ("model.language_model.", "model.language_model."),
    ],
)
def test_names_inside_other_modules(outside: str, head: str, whole: dict[str, torch.Tensor], tmp_path: Path) -> None:
    """A transformer saved alone, or as a part of a model of images and text, which has embeddings and layers of its own."""
    stored = {f"{head if 'lm_head' in name else outside}{name.removeprefix('model.')}": t for name, t in whole.items()}
    others = {f"{tower}.{name}": torch.ones(1) for tower in ("vision_tower", "model.audio") for name in ("layers.0.a", "b")}
    others["model.audio.embed_tokens.weight"] = torch.ones(1)
    save_file({**stored, **(others if outside else {})}, tmp_path / "model.safetensors")
    model = poison(decoder())
    read(tmp_path, model)
    assert all(torch.equal(got, whole[name]) for name, got in tensors(model.parameters()).items())
    told = unused_tensors(sources(SPEC), Checkpoint.open(tmp_path, LLAMA), SPEC.num_layers)
    assert told == (outside and f"not used of the checkpoint: 5 tensors: {AUDIO[outside]}"), "under the names in the files"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({NORM: None}, r"tensor model\.layers\.4\.input_layernorm\.weight with shape \[24\] is missing"),
        ({NORM: torch.zeros(25)}, r"input_layernorm\.weight in .*model\.safetensors has shape \[25\], .* \[24\]"),
        ({NORM: torch.zeros(24, dtype=torch.int8)}, r"input_layernorm\.weight in .* is I8"),
        (
            {"model.layers.4.mlp.up_proj.weight_scale": torch.zeros(1)},
            r"holds tensor model\.layers\.4\.mlp\.up_proj\.weight_scale",
        ),
        ({"lm_head.bias": torch.zeros(517)}, r"holds tensor lm_head\.bias, which a model with this config"),
    ],
)
def test_what_does_not_fit_is_named(
    whole: dict[str, torch.Tensor], tmp_path: Path, change: dict[str, torch.Tensor | None], message: str
) -> None:
    changed = {name: tensor for name, tensor in {**whole, **change}.items() if tensor is not None}
    save_file(changed, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=message):
        read(tmp_path, decoder())


def test_unused_tensors_are_told_once(whole: dict[str, torch.Tensor], tmp_path: Path) -> None:
    """Those of all ranks together, by the outermost module of which nothing is used; what is no weight is not told."""
    silent = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2), "rotary_emb.inv_freq": torch.ones(2)}
    layer = {f"model.layers.5.{name}.weight": torch.ones(2) for name in ("a", "b", "mlp.up_proj")}
    tower = {f"vision_tower.blocks.{number}.weight": torch.ones(2) for number in range(3)}
    save_file({**whole, **silent, **layer, **tower, "model.scale": torch.ones(1)}, tmp_path / "model.safetensors")
    line = unused_tensors(sources(SPEC), Checkpoint.open(tmp_path, LLAMA), SPEC.num_layers)
    assert line == "not used of the checkpoint: 7 tensors: model.layers.5.* (3), vision_tower.* (3), model.scale"
    save_file({**whole, "model.layers.0.self_attn.k_scale": torch.ones(1)}, tmp_path / "model.safetensors")
    line = unused_tensors(sources(SPEC), Checkpoint.open(tmp_path, LLAMA), SPEC.num_layers)
    assert line == "not used of the checkpoint: 1 tensor: model.layers.0.self_attn.k_scale"
    many = {f"tower{number}.weight": torch.ones(1) for number in range(20)}
    save_file({**whole, **many}, tmp_path / "model.safetensors")
    assert unused_tensors(sources(SPEC), Checkpoint.open(tmp_path, LLAMA), SPEC.num_layers).endswith(", and 12 more groups")
    save_file({**whole, "lm_head.weight": whole["model.embed_tokens.weight"].clone()}, tmp_path / "model.safetensors")
    assert not unused_tensors(sources(SPEC), Checkpoint.open(tmp_path, LLAMA), SPEC.num_layers)
    assert not unused_tensors(sources(TIED), Checkpoint.open(tmp_path, LLAMA), SPEC.num_layers), (
        "the head of a tied model is no other"
    )
    save_file(whole, tmp_path / "model.safetensors")
    with pytest.raises(
        UserError, match=r"lm_head\.weight with other numbers than the embedding, .* tie_word_embeddings to false"
    ):
        unused_tensors(sources(TIED), Checkpoint.open(tmp_path, LLAMA), SPEC.num_layers)


def test_damaged_and_foreign_files(directory: Path) -> None:
    path = directory / "model.safetensors"
    data = path.read_bytes()
    for end in (0, 5, 100, len(data) - 1):
        path.write_bytes(data[:end])
        with pytest.raises(UserError, match=r"model\.safetensors is damaged or truncated"):
            read(directory, decoder())
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n")
    with pytest.raises(UserError, match=r"model\.safetensors is a Git LFS pointer.* run `git lfs pull`"):
        read(directory, decoder())
    path.unlink()
    with pytest.raises(UserError, match=r"no safetensors files and no pytorch_model\.bin in"):
        Checkpoint.open(directory, LLAMA)
    (directory / "model.gguf").touch()
    with pytest.raises(UserError, match=r"model\.gguf is not read, convert it"):
        Checkpoint.open(directory, LLAMA)


def test_files_of_torch(whole: dict[str, torch.Tensor], tmp_path: Path) -> None:
    names = sorted(whole)
    parts = {"pytorch_model-1.bin": names[::2], "pytorch_model-2.bin": names[1::2]}
    for file, held in parts.items():
        torch.save({name: torch.nn.Parameter(whole[name]) for name in held}, tmp_path / file)
    for indexed in (False, True):
        if indexed:
            index = {"weight_map": {name: file for file, held in parts.items() for name in held}}
            (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
        model = poison(decoder(2, 3))
        loaded = read(tmp_path, model)
        assert loaded.requested_bytes == sum(parameter.tensor.nbytes for parameter in model.parameters())
        for parameter in model.parameters():
            for source, place in parameter.parts():
                where = (slice(None),) * source.dim + (slice(source.taken.start, source.taken.stop),)
                assert torch.equal(place, whole[source.name][where]), source
    save_file({name: tensor + 1 for name, tensor in whole.items()}, tmp_path / "model.safetensors")
    model = decoder()
    read(tmp_path, model)
    assert torch.equal(tensors(model.parameters())["lm_head.weight"], whole["lm_head.weight"] + 1), "safetensors go first"


def test_a_file_stays_open_while_its_tensors_are_read(whole: dict[str, torch.Tensor], tmp_path: Path) -> None:
    names = sorted(whole)
    for file, held in {"pytorch_model-1.bin": names[::2], "pytorch_model-2.bin": names[1::2]}.items():
        torch.save({name: whole[name] for name in held}, tmp_path / file)
    checkpoint = Checkpoint.open(tmp_path, LLAMA)
    load(decoder().parameters(), checkpoint)
    assert checkpoint.file.cache_info().misses == 2


class Evil:
    """What a pickle could do."""

    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return print, ("unpickled",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"lm_head.weight": Evil()}, "damaged or truncated"),
        ([torch.zeros(1)], "holds something else than tensors by their names"),
        ({"lm_head.weight": {"q": 1}}, "holds something else than tensors by their names"),
    ],
)
def test_what_is_no_file_of_tensors(tmp_path: Path, content: object, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=message):
        Checkpoint.open(tmp_path, LLAMA)
    assert "unpickled" not in capsys.readouterr().out
    data = (tmp_path / "pytorch_model.bin").read_bytes()
    for end in (0, 100, len(data) - 1):
        (tmp_path / "pytorch_model.bin").write_bytes(data[:end])
        with pytest.raises(UserError, match=r"pytorch_model\.bin is damaged or truncated"):
            Checkpoint.open(tmp_path, LLAMA)
