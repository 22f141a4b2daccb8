"""Shards are exactly the ranges of the whole tensors, read by slices, of whatever type."""

import re
from pathlib import Path

import pytest
import torch
from msgspec.structs import replace
from safetensors.torch import save_file

from tests.specs import EXPERTS, small
from tests.unit.weights_case import SPEC, Seat, decoder, poison, range_of, read, tensors, whole_checkpoint
from tpserve.errors import UserError
from tpserve.models.decoder import Decoder
from tpserve.types.layout import ParallelLayout
from tpserve.weights.checkpoint import Checkpoint
from tpserve.weights.dummy import dummy
from tpserve.weights.load import load
from tpserve.weights.names import LLAMA
from tpserve.weights.parameter import Parameter
from tpserve.weights.source import Source

MIXTURE = small(family="mixtral", experts=replace(EXPERTS, shared_size=0, shared_gate=False), hidden_size=24, head_dim=4)
TORCHS = "pytorch_model.bin"


@pytest.fixture
def whole() -> dict[str, torch.Tensor]:
    return whole_checkpoint()


@pytest.fixture
def directory(whole: dict[str, torch.Tensor], tmp_path: Path) -> Path:
    save_file(whole, tmp_path / "model.safetensors")
    return tmp_path


def mixture(rank: int = 0, tp: int = 1, expert_parallel: bool = False) -> Decoder:
    layout = ParallelLayout(tp, 1, (MIXTURE.num_layers,), expert_parallel)
    return Decoder(MIXTURE, layout, 0, Seat(rank, tp), torch.float32, torch.device("cpu"), 16)


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
    """Each rank reads its own experts, or its own channels of all, and nothing else; all formats hold the same."""
    model = mixture()
    dummy(model.parameters(), seed=3)
    whole = tensors(model.parameters())
    read_bytes = 0
    for number, checkpoint in enumerate((whole, stacked(whole), stacked(whole))):
        directory = tmp_path / str(number)
        directory.mkdir()
        save_file(checkpoint, directory / "model.safetensors") if number < 2 else torch.save(checkpoint, directory / TORCHS)
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
    assert 3 * experts_bytes < read_bytes < 3 * (experts_bytes + tp * 4 * 60_000), "no expert is read twice"


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
    loaded = load(model.parameters(), Checkpoint.open(directory, LLAMA), progress)
    assert calls == sorted(calls) and calls[-1] == (loaded.requested_bytes, loaded.requested_bytes)
    by_name = {source.name: source for parameter in model.parameters() for source in parameter.sources}
    cut = [s for s in by_name.values() if s.dim == 1]
    assert {s.name.split(".")[-2] for s in cut} == {"o_proj", "down_proj"}
    extra = sum(4 * (s.shape[0] - 1) * (s.shape[1] - len(s.taken)) for s in cut)
    assert loaded.physical_bytes == loaded.requested_bytes + extra, "narrow cuts through rows bring in what is between them"


@pytest.mark.parametrize("there", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("here", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype_is_converted(there: torch.dtype, here: torch.dtype, whole: dict[str, torch.Tensor], tmp_path: Path) -> None:
    save_file({name: tensor.to(there) for name, tensor in whole.items()}, tmp_path / "model.safetensors")
    model = decoder(dtype=here)
    loaded = read(tmp_path, model)
    assert loaded.requested_bytes == sum(there.itemsize * tensor.numel() for tensor in whole.values())
    assert all(torch.equal(got, whole[name].to(there).to(here)) for name, got in tensors(model.parameters()).items())


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
    norm = whole["model.layers.4.input_layernorm.weight"]
    assert float(norm.mean()) == pytest.approx(1, abs=0.1) and float(norm.std()) > 0.01


def test_dummy_stripes_of_stacked_experts() -> None:
    """Every other column of one expert's matrix is what the whole matrix has there; experts differ."""

    def made(expert: int, taken: range) -> torch.Tensor:
        source = Source("gate_up_proj", (24, 40), 1, taken, transposed=True, expert=expert, num_experts=2)
        parameter = Parameter.empty((source,), torch.float32, torch.device("cpu"))
        dummy([parameter], seed=3)
        return parameter.tensor

    whole = made(1, range(40))
    assert torch.equal(made(1, range(5, 32, 2)), whole[5:32:2]) and not torch.equal(made(0, range(40)), whole)
