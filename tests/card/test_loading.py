"""Loading onto a card: threads fill a few pinned buffers, and none is filled again before its copy has been waited for."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.card.engine import CARD
from tests.card.simulated import SimulatedCard
from tests.card.tensors import DeviceTensor, PinnedTensor
from tests.quantized import fp8, mxfp4
from tpserve.errors import UserError
from tpserve.weights import staging
from tpserve.weights.checkpoint import Checkpoint
from tpserve.weights.load import load
from tpserve.weights.names import LLAMA
from tpserve.weights.parameter import Parameter
from tpserve.weights.source import Source
from tpserve.weights.staging import StagingBuffer

LAYER = "model.layers.0."
STACK = f"{LAYER}mlp.experts.gate_up_proj"


def rows(name: str, *shape: int, dim: int = 0, part: range | None = None, transposed: bool = False) -> Source:
    return Source(f"{LAYER}{name}.weight", shape, dim, range(shape[dim]) if part is None else part, transposed)


PARAMETERS = [
    (rows("q_proj", 70, 24), rows("k_proj", 30, 24, part=range(7, 29))),
    (rows("norm", 24),),
    (rows("o_proj", 40, 50, dim=1, part=range(9, 33)),),
    (rows("c_attn", 24, 60, dim=1, part=range(20, 51), transposed=True),),
    (rows("up_proj", 150, 130, part=range(100, 150)),),
    *((Source(STACK, (64, 80), 1, range(0, 80, 2), transposed=True, expert=e, num_experts=2),) for e in range(2)),
]
DTYPES = {"q_proj": torch.bfloat16, "norm": torch.float64, "o_proj": torch.float16}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    """Plain tensors of several dtypes in one file; block FP8 and MXFP4 in another."""
    random = torch.Generator().manual_seed(1)
    plain, quantized = {}, {}
    for source in {source.name: source for sources in PARAMETERS for source in sources}.values():
        kind = source.name.removeprefix(LAYER).removesuffix(".weight")
        numbers = torch.randn(source.stored, generator=random)
        if kind == "up_proj":
            quantized[source.name], quantized[f"{source.name}_scale_inv"] = fp8(numbers)
        elif source.num_experts:
            quantized[f"{STACK}_blocks"], quantized[f"{STACK}_scales"] = mxfp4(numbers)
        else:
            plain[source.name] = numbers.to(DTYPES.get(kind, torch.float32))
    save_file(plain, tmp_path / "a.safetensors")
    save_file({name: tensor.contiguous() for name, tensor in quantized.items()}, tmp_path / "b.safetensors")
    return Checkpoint.open(tmp_path, LLAMA)


@pytest.fixture(autouse=True)
def small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that each tensor takes several turns of the ring."""
    monkeypatch.setattr(staging, "BUFFER_BYTES", 256)


@pytest.fixture
def pinned(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The bytes of each pinned allocation."""
    sizes: list[int] = []
    made = PinnedTensor.__init__

    def count(self: PinnedTensor, host: torch.Tensor, *rest: Any) -> None:
        if host.untyped_storage().data_ptr() not in seen:
            seen.add(host.untyped_storage().data_ptr())
            sizes.append(host.untyped_storage().nbytes())
        made(self, host, *rest)

    seen: set[int] = set()
    monkeypatch.setattr(PinnedTensor, "__init__", count)
    yield sizes


def loaded(checkpoint: Checkpoint, device: torch.device, told: list[int] | None = None) -> list[torch.Tensor]:
    """The parameters, filled; host memory either way."""
    parameters = [Parameter.empty(sources, torch.bfloat16, device) for sources in PARAMETERS]
    taken = load(parameters, checkpoint, lambda done, total: (told or []).append(done))
    assert not told or told[-1] == taken.requested_bytes
    return [getattr(parameter.tensor, "host", parameter.tensor) for parameter in parameters]


def test_a_card_holds_what_a_host_holds(checkpoint: Checkpoint, pinned: list[int]) -> None:
    expected, told = loaded(checkpoint, torch.device("cpu")), [0]
    with SimulatedCard() as card:
        found = loaded(checkpoint, CARD, told)
        card.finish()
    assert all(map(torch.equal, found, expected)) and all(tensor.isfinite().all() for tensor in found)
    assert set(card.record.to_device) <= {"pinned", "pageable"} and card.record.to_device.count("pinned") > 100
    assert len(told) > 100 and told == sorted(told)
    assert len(pinned) <= staging.NUM_BUFFERS + 2 and max(pinned) <= 256, "a bounded pool; two rows are wider than a buffer"


def test_a_buffer_that_is_filled_too_early_is_found(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of this file's first test, that it can fail."""
    reserve = StagingBuffer.reserve

    def without_waiting(self: StagingBuffer, num_bytes: int) -> None:
        self._copied = None
        reserve(self, num_bytes)

    monkeypatch.setattr(StagingBuffer, "reserve", without_waiting)
    with SimulatedCard() as card, pytest.raises(AssertionError, match="changed while the card was reading"):
        loaded(checkpoint, CARD)
        card.finish()


def test_reading_is_ahead_of_the_card(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    ahead, filled, sent = [], [0], [0]
    fill, send = StagingBuffer.fill, StagingBuffer.send

    def count_fill(self: StagingBuffer, x: torch.Tensor) -> torch.Tensor:
        filled[0] += 1
        return fill(self, x)

    def count_send(self: StagingBuffer, x: torch.Tensor, device: torch.device) -> torch.Tensor:
        ahead.append(filled[0] - sent[0])
        sent[0] += 1
        there = send(self, x, device)
        assert isinstance(there, DeviceTensor)
        return there

    monkeypatch.setattr(StagingBuffer, "fill", count_fill)
    monkeypatch.setattr(StagingBuffer, "send", count_send)
    with SimulatedCard() as card:
        loaded(checkpoint, CARD)
        card.finish()
    assert sent == filled and max(ahead) > 1 and max(ahead) <= staging.NUM_BUFFERS


def test_errors_of_threads_reach_the_caller(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: StagingBuffer, x: torch.Tensor) -> torch.Tensor:
        raise UserError("a.safetensors cannot be read")

    monkeypatch.setattr(StagingBuffer, "fill", fail)
    with SimulatedCard(), pytest.raises(UserError, match=r"a\.safetensors cannot be read"):
        loaded(checkpoint, CARD)
