"""Packed weights that outlive their process: the next one maps what the first has packed, bit for bit, or loads as usual."""

import gc
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import torch
from msgspec.structs import replace

from tests.specs import EXPERTS, LATENTS, small
from tests.unit.weights_case import decoder
from tpserve.config.flags import Quantization
from tpserve.models.decoder import Decoder
from tpserve.models.held_bytes import held_tensors
from tpserve.process.weights_keeper import KeptWeights
from tpserve.quant.weight_memory import PRIVATE, WeightMemory
from tpserve.types.model_spec import ModelSpec
from tpserve.weights import dummy
from tpserve.weights.parameter import Parameter
from tpserve.weights.shared_memory import Index, MappedMemory, WrittenMemory
from tpserve.worker.kept_weights import KeptByAgent
from tpserve_kernels.cpu.library import load

CPU, FACTS = torch.device("cpu"), {"model config": "1"}
SPECS = {
    "tied": small(qkv_bias=True, tie_embeddings=True),
    "untied": small(qk_norm="head"),
    "positions": small(rope=None, norm="layer", out_bias=True),
    "experts": small(experts=replace(EXPERTS, layers=(0, 2))),
    "latents": small(**LATENTS),
}


@pytest.fixture
def agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[KeptWeights]:
    if load()[0] is None:
        pytest.skip("no library of CPU kernels")
    monkeypatch.setattr("tpserve.weights.shared_memory.HUGE_PAGES", tmp_path)  # a system without huge pages
    kept, threads = KeptWeights(), torch.get_num_threads()
    torch.set_num_threads(1)
    yield kept
    torch.set_num_threads(threads)
    kept.close()


class Rank:
    """A process of rank 0, as far as its weights go."""

    def __init__(
        self,
        agent: KeptWeights,
        spec: ModelSpec = SPECS["tied"],
        quantization: Quantization | None = None,
        dtype: torch.dtype = torch.bfloat16,
        facts: dict[str, str] = FACTS,
    ) -> None:
        self.filled = 0
        with agent.offer() as offered:
            kept = KeptByAgent(0, os.dup(offered.fileno()), facts)
        self.model: Decoder = decoder(spec=spec, dtype=dtype)
        self.memory: WeightMemory = kept.memory(self.model.parameters(), CPU, dtype)
        self.num_bytes = self.model.prepack(quantization, self._fill, self.memory)
        kept.leave()

    def _fill(self, parameter: Parameter) -> None:
        self.filled += 1
        dummy.fill(parameter, seed=5)

    def logits(self) -> torch.Tensor:
        return self.model.logits(torch.linspace(-1, 1, 3 * 64).view(3, 64).to(self.model.dtype))


@pytest.mark.parametrize("quantization", [None, "int8-head"])
@pytest.mark.parametrize("name", SPECS)
def test_the_next_process_maps_the_same_bits(name: str, quantization: Quantization | None, agent: KeptWeights) -> None:
    dtype = torch.float32 if name == "untied" else torch.bfloat16
    alone = decoder(spec=SPECS[name], dtype=dtype)
    dummy.dummy(alone.parameters(), seed=5)
    num_bytes = alone.prepack(quantization)
    first = Rank(agent, SPECS[name], quantization, dtype)
    expected, logits = [x.clone() for x in held_tensors(first.model.held())], first.logits()
    assert first.filled and isinstance(first.memory, WrittenMemory) and first.num_bytes == num_bytes
    assert all(map(torch.equal, held_tensors(alone.held()), expected))
    for _ in range(2):  # and so does the one after it
        successor = Rank(agent, SPECS[name], quantization, dtype)
        assert successor.filled == 0 and successor.num_bytes == num_bytes
        ours = list(held_tensors(successor.model.held()))
        assert len(ours) == len(expected) > 10 and all(map(torch.equal, ours, expected))
        assert torch.equal(successor.logits(), logits)


def test_other_facts_load_again_and_replace_what_was_kept(agent: KeptWeights) -> None:
    Rank(agent)
    other = Rank(agent, facts={"model config": "2"})
    assert other.filled and not other.memory.packed
    assert Rank(agent, facts={"model config": "2"}).filled == 0
    assert Rank(agent).filled


def test_a_process_that_dies_while_loading_leaves_nothing(agent: KeptWeights) -> None:
    with agent.offer() as offered:
        kept = KeptByAgent(0, os.dup(offered.fileno()), FACTS)
    model = decoder(spec=SPECS["tied"])
    assert isinstance(kept.memory(model.parameters(), CPU, torch.float32), WrittenMemory)
    del kept
    assert Rank(agent).filled
    assert Rank(agent).filled == 0


def test_changed_bytes_load_again(agent: KeptWeights) -> None:
    with agent.offer() as offered:
        kept = KeptByAgent(0, os.dup(offered.fileno()), FACTS)
    model = decoder(spec=SPECS["tied"], dtype=torch.bfloat16)
    memory = kept.memory(model.parameters(), CPU, torch.bfloat16)
    assert isinstance(memory, WrittenMemory)
    model.prepack(None, dummy.fill, memory)
    index = memory.finish("a")
    assert index is not None
    MappedMemory(memory.descriptor, index)
    for changed in (replace(index, samples=index.samples ^ 1), replace(index, num_bytes=index.num_bytes - 1)):
        with pytest.raises(OSError, match="differs"):
            MappedMemory(memory.descriptor, changed)
    with pytest.raises(PermissionError):
        os.pwrite(memory.descriptor, b"x", 0)
    memory.close()


def test_without_memfd_weights_are_loaded(agent: KeptWeights, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str, flags: int) -> int:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(os, "memfd_create", refuse)
    for _ in range(2):
        rank = Rank(agent)
        assert rank.memory is PRIVATE and rank.filled


def test_a_memfd_may_not_cost_huge_pages(agent: KeptWeights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tpserve.weights.shared_memory.HUGE_PAGES", tmp_path)
    shmem, private = tmp_path / "shmem_enabled", tmp_path / "enabled"
    for chosen, for_shmem, shared in [
        ("[always] madvise never", "always within_size advise [never] deny force", False),
        ("[always] madvise never", "always within_size [advise] never deny force", True),
        ("always [madvise] never", "always within_size advise [never] deny force", True),
    ]:
        private.write_text(chosen)
        shmem.write_text(for_shmem)
        assert isinstance(Rank(agent, facts={"case": chosen + for_shmem}).memory, WrittenMemory) == shared


def test_what_does_not_fit_is_packed_all_the_same(agent: KeptWeights, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = sum(parameter.tensor.nbytes for parameter in decoder(spec=SPECS["untied"], dtype=torch.bfloat16).parameters())
    monkeypatch.setattr("tpserve.weights.shared_memory._SLACK", plain // 2 - 4 * plain)
    first = Rank(agent, SPECS["untied"])
    second = Rank(agent, SPECS["untied"])
    assert first.filled and second.filled and torch.equal(first.logits(), second.logits())


def test_the_agent_holds_one_descriptor_a_rank_and_drops_it(agent: KeptWeights) -> None:
    def memfds() -> int:
        links = list(Path("/proc/self/fd").iterdir())
        return sum("tpserve-weights" in str(link.readlink()) for link in links if link.is_symlink()) - before

    gc.collect()
    before = 0
    before = memfds()
    for number in range(3):
        Rank(agent, facts={"number": str(number)})
        agent.take()
        gc.collect()
        assert memfds() == 1
    agent.drop()
    assert memfds() == 0
    assert Rank(agent).filled


def test_what_the_agent_gives_is_no_weights(agent: KeptWeights) -> None:
    for description in (b"?", msgspec.msgpack.encode(Index("?", 1, 2))):
        with agent.offer() as offered, Path(os.devnull).open("rb") as file:
            socket.send_fds(offered, [description], [file.fileno()])
        assert Rank(agent).filled
