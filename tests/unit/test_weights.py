"""Shards are exactly the ranges of the whole tensors, read by slices; what does not fit is refused by name."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from msgspec.structs import replace
from safetensors.torch import save_file

from tests.specs import EXPERTS, small
from tpserve.errors import UserError
from tpserve.models import names_of
from tpserve.models.decoder import Decoder
from tpserve.parallel.group import Group
from tpserve.types.layout import ParallelLayout, even_layers
from tpserve.types.model_spec import ModelSpec
from tpserve.weights.checkpoint import Checkpoint
from tpserve.weights.dummy import dummy
from tpserve.weights.load import Loaded, load
from tpserve.weights.names import LLAMA
from tpserve.weights.parameter import Parameter, Source

QWEN3 = {"family": "qwen3", "qkv_bias": True, "out_bias": True, "mlp_bias": True, "qk_norm": "head", "norm_eps": 1e-6}
SPEC = small(**QWEN3, num_layers=5, hidden_size=24, head_dim=4, max_position=64)
MIXTURE = small(family="mixtral", experts=replace(EXPERTS, shared_size=0), hidden_size=24, head_dim=4)
TIED = replace(SPEC, tie_embeddings=True)


class Seat(Group):
    """A place in a group nobody talks in."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__()
        self.rank, self.size = rank, size


def decoder(rank: int = 0, tp: int = 1, stage: int = 0, pp: int = 1, spec: ModelSpec = SPEC) -> Decoder:
    layout = ParallelLayout(tp, pp, even_layers(spec.num_layers, pp))
    return Decoder(spec, layout, stage, Seat(rank, tp), torch.float32, torch.device("cpu"), 16)


def mixture(rank: int = 0, tp: int = 1, expert_parallel: bool = False) -> Decoder:
    layout = ParallelLayout(tp, 1, (MIXTURE.num_layers,), expert_parallel)
    return Decoder(MIXTURE, layout, 0, Seat(rank, tp), torch.float32, torch.device("cpu"), 16)


def tensors(parameters: list[Parameter]) -> dict[str, torch.Tensor]:
    """By checkpoint name; of a whole model these are the checkpoint."""
    return {source.name: place.clone() for parameter in parameters for source, place in parameter.parts()}


@pytest.fixture
def whole() -> dict[str, torch.Tensor]:
    model = decoder()
    dummy(model.parameters(), seed=3)
    return tensors(model.parameters())


@pytest.fixture
def directory(whole: dict[str, torch.Tensor], tmp_path: Path) -> Path:
    save_file(whole, tmp_path / "model.safetensors")
    return tmp_path


def read(directory: Path, model: Decoder) -> Loaded:
    return load(model.parameters(), Checkpoint.open(directory, names_of(model.spec)), model.spec.num_layers)


def poison(model: Decoder) -> Decoder:
    """So that a place nobody fills shows."""
    for parameter in model.parameters():
        parameter.tensor.fill_(torch.nan)
    return model


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (3, 1), (4, 2), (1, 5)])
def test_each_rank_holds_its_ranges(whole: dict[str, torch.Tensor], directory: Path, tp: int, pp: int) -> None:
    seen: dict[str, torch.Tensor] = {name: torch.zeros_like(tensor) for name, tensor in whole.items()}
    for stage in range(pp):
        for rank in range(tp):
            model = poison(decoder(rank, tp, stage, pp))
            loaded = read(directory, model)
            requested = 0
            for parameter in model.parameters():
                for source, place in parameter.parts():
                    where = (slice(None),) * source.dim + (slice(source.taken.start, source.taken.stop),)
                    assert torch.equal(place, whole[source.name][where]), source
                    seen[source.name][where] += 1
                    requested += place.numel() * 4
            assert loaded.requested_bytes == requested <= loaded.physical_bytes
    assert all(bool((count > 0).all()) for count in seen.values()), "every element is on some rank"
    split_names = ("q_proj.weight", "o_proj.weight", "gate_proj.weight", "down_proj.weight", "lm_head.weight")
    for name, count in seen.items():
        if name.endswith(split_names):
            assert bool((count == 1).all()), f"{name} is held twice"


def stacked(one_by_one: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same checkpoint as transformers keeps it in memory."""
    result = {name: tensor for name, tensor in one_by_one.items() if "block_sparse_moe" not in name}
    for layer in EXPERTS.layers:
        prefix = f"model.layers.{layer}."
        one = lambda e, w: one_by_one[f"{prefix}block_sparse_moe.experts.{e}.{w}.weight"]  # noqa: B023, E731
        every = range(EXPERTS.count)
        result[f"{prefix}mlp.gate.weight"] = one_by_one[f"{prefix}block_sparse_moe.gate.weight"]
        result[f"{prefix}mlp.experts.gate_up_proj"] = torch.stack([torch.cat([one(e, "w1"), one(e, "w3")]) for e in every])
        result[f"{prefix}mlp.experts.down_proj"] = torch.stack([one(e, "w2") for e in every])
    return result


@pytest.mark.parametrize("expert_parallel", [False, True])
@pytest.mark.parametrize("tp", [1, 2, 3])
def test_experts_one_by_one_or_stacked(tp: int, expert_parallel: bool, tmp_path: Path) -> None:
    """Each rank reads its own experts, or its own channels of all, and nothing else; both formats hold the same."""
    model = mixture()
    dummy(model.parameters(), seed=3)
    whole = tensors(model.parameters())
    read_bytes = 0
    for number, checkpoint in enumerate((whole, stacked(whole))):
        directory = tmp_path / str(number)
        directory.mkdir()
        save_file(checkpoint, directory / "model.safetensors")
        for rank in range(tp):
            model = poison(mixture(rank, tp, expert_parallel))
            read_bytes += read(directory, model).requested_bytes
            for parameter in model.parameters():
                for source, place in parameter.parts():
                    assert torch.equal(place, whole[source.name][source.index]), source
            held = {
                name for parameter in model.parameters() for name in (s.name for s in parameter.sources) if ".experts." in name
            }
            counts = [5, 3, 2, 2, 2, 1][tp * (tp - 1) // 2 + rank] if expert_parallel else EXPERTS.count
            assert len(held) == counts * 3 * len(EXPERTS.layers)
    experts_bytes = 4 * 3 * EXPERTS.size * 24 * EXPERTS.count * len(EXPERTS.layers)
    assert 2 * experts_bytes < read_bytes < 2 * (experts_bytes + tp * 4 * 60_000), "no expert is read twice"


def test_experts_that_do_not_fit_are_named(tmp_path: Path) -> None:
    model = mixture()
    dummy(model.parameters())
    whole = tensors(model.parameters())
    name = "model.layers.2.block_sparse_moe.experts.4.w2.weight"
    for checkpoint, message in (
        ({n: t for n, t in whole.items() if n != name}, rf"tensor {re.escape(name)} with shape \[24, 44\] is missing"),
        ({**whole, "model.layers.2.block_sparse_moe.gate.bias": torch.zeros(5)}, r"holds tensor .*gate\.bias"),
        ({n: t[:4].clone() if "stack" in n or "mlp.experts" in n else t for n, t in stacked(whole).items()}, r"has shape \[4, "),
    ):
        save_file(checkpoint, tmp_path / "model.safetensors")
        with pytest.raises(UserError, match=message):
            read(tmp_path, mixture(1, 2, True) if "missing" not in message else mixture())


def test_too_many_ranks_are_refused() -> None:
    with pytest.raises(UserError, match="8 attention heads cannot be split 9 ways: a share would be empty; at most 8"):
        decoder(0, 9)


def test_a_stage_reads_only_its_layers(directory: Path) -> None:
    first = {source.name for parameter in decoder(stage=0, pp=2).parameters() for source in parameter.sources}
    last = {source.name for parameter in decoder(stage=1, pp=2).parameters() for source in parameter.sources}
    assert not first & last
    assert "model.embed_tokens.weight" in first and "lm_head.weight" in last and "model.norm.weight" in last
    assert {name.split(".")[2] for name in first if ".layers." in name} == {"0", "1", "2"}


def test_bytes_and_progress(directory: Path) -> None:
    calls: list[tuple[int, int]] = []
    model = decoder(1, 3)
    progress = lambda done, total: calls.append((done, total))  # noqa: E731
    loaded = load(model.parameters(), Checkpoint.open(directory, LLAMA), SPEC.num_layers, progress)
    assert calls == sorted(calls) and calls[-1] == (loaded.requested_bytes, loaded.requested_bytes)
    by_name = {source.name: source for parameter in model.parameters() for source in parameter.sources}
    cut = [s for s in by_name.values() if s.dim == 1]
    assert {s.name.split(".")[-2] for s in cut} == {"o_proj", "down_proj"}
    extra = sum(4 * s.shape[0] * (s.shape[1] - len(s.taken)) for s in cut)
    assert loaded.physical_bytes == loaded.requested_bytes + extra, "narrow cuts through rows bring in the rows"


def test_dtype_is_converted(whole: dict[str, torch.Tensor], tmp_path: Path) -> None:
    save_file({name: tensor.bfloat16() for name, tensor in whole.items()}, tmp_path / "model.safetensors")
    model = decoder()
    loaded = read(tmp_path, model)
    assert loaded.requested_bytes == sum(2 * tensor.numel() for tensor in whole.values())
    assert all(torch.equal(got, whole[name].bfloat16().float()) for name, got in tensors(model.parameters()).items())


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
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(UserError, match=r"b\.safetensors is missing"):
        read(tmp_path, model)
    index.write_text("[]")
    with pytest.raises(UserError, match="not an index of weight files"):
        read(tmp_path, model)


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


def test_names_without_prefix(whole: dict[str, torch.Tensor], tmp_path: Path) -> None:
    save_file({name.removeprefix("model."): tensor for name, tensor in whole.items()}, tmp_path / "model.safetensors")
    model = poison(decoder())
    read(tmp_path, model)
    assert all(torch.equal(got, whole[name]) for name, got in tensors(model.parameters()).items())


NORM = "model.layers.4.input_layernorm.weight"


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
    ],
)
def test_what_does_not_fit_is_named(
    whole: dict[str, torch.Tensor], tmp_path: Path, change: dict[str, torch.Tensor | None], message: str
) -> None:
    changed = {name: tensor for name, tensor in {**whole, **change}.items() if tensor is not None}
    save_file(changed, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=message):
        read(tmp_path, decoder())
    read(tmp_path, decoder(pp=2))  # the first stage does not hold layer 4


@pytest.mark.parametrize("stage", [0, 1])
def test_a_checkpoint_of_more_layers_is_refused(whole: dict[str, torch.Tensor], tmp_path: Path, stage: int) -> None:
    save_file({**whole, "model.layers.5.mlp.up_proj.weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"holds tensor model\.layers\.5\.mlp\.up_proj\.weight, which a model with this config"):
        read(tmp_path, decoder(stage=stage, pp=2))


def test_old_rope_buffers_are_no_weights(whole: dict[str, torch.Tensor], tmp_path: Path) -> None:
    save_file({**whole, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}, tmp_path / "model.safetensors")
    read(tmp_path, decoder())


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


@pytest.mark.parametrize("family", ["phi3", "gpt2", "opt"])
def test_fused_and_transposed_projections(family: str, tmp_path: Path) -> None:
    """A fused parameter's sources are ranges of one stored tensor; every rank fills its own from it."""
    plain = {"norm": "layer", "rope": None, "gated": False, "activation": "relu"} if family != "phi3" else {}
    spec = replace(SPEC, **{"qk_norm": None, "family": family, **plain})
    one = decoder(spec=spec)
    dummy(one.parameters(), seed=3)
    whole: dict[str, torch.Tensor] = {}
    for parameter in one.parameters():
        for source, place in parameter.parts():
            range_of(whole.setdefault(source.name, torch.zeros(source.shape)), source).copy_(place)
    save_file(whole, tmp_path / "model.safetensors")
    for rank in range(3):
        share = poison(decoder(rank, 3, spec=spec))
        read(tmp_path, share)
        for parameter in share.parameters():
            assert all(torch.equal(place, range_of(whole[source.name], source)) for source, place in parameter.parts())


def range_of(tensor: torch.Tensor, source: Source) -> torch.Tensor:
    return tensor.narrow(source.dim, source.taken.start, len(source.taken))


def test_dummy_weights_do_not_depend_on_the_layout(whole: dict[str, torch.Tensor]) -> None:
    for rank in range(3):
        model = poison(decoder(rank, 3, 1, 2))
        dummy(model.parameters(), seed=3)
        for parameter in model.parameters():
            for source, place in parameter.parts():
                where = (slice(None),) * source.dim + (slice(source.taken.start, source.taken.stop),)
                assert torch.equal(place, whole[source.name][where]), source
    other = decoder()
    dummy(other.parameters(), seed=4)
    assert not torch.equal(tensors(other.parameters())["lm_head.weight"], whole["lm_head.weight"])


def test_dummy_weights_look_random(whole: dict[str, torch.Tensor]) -> None:
    head, up = whole["lm_head.weight"], whole["model.layers.0.mlp.up_proj.weight"]
    assert abs(float(head.mean())) < 0.01 and float(head.std()) == pytest.approx(24**-0.5, rel=0.02)
    assert len(head.unique()) > 0.99 * head.numel()
    assert abs(float(torch.corrcoef(torch.stack([head[:172].flatten(), up.flatten()]))[0, 1])) < 0.05
    assert float(whole[NORM].mean()) == pytest.approx(1, abs=0.1) and float(whole[NORM].std()) > 0.01
