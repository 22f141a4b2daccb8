"""The KV cache gets what is left of a card, after everything that is on it; a card is played here by four numbers."""

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from tests.specs import small
from tpserve.config.cli import parse
from tpserve.config.machine import Machine
from tpserve.config.resolve import resolve
from tpserve.errors import UserError
from tpserve.types.layout import ParallelLayout
from tpserve.types.messages import MemoryLedger
from tpserve.types.model_files import ModelFiles
from tpserve.worker import memory

SPEC = small(max_position=4096, dtype="bfloat16", bos_id=1, eos_ids=(2,))
BLOCK_BYTES = 4 * 2 * 16 * 2 * 8 * 2
TOTAL, OTHERS, HELD, CACHED, ACTIVATIONS, HEAD = 100_000_000, 5_000_000, 30_000_000, 2_000_000, 7_000_000, 3_000_000
"""`CACHED`: what torch's allocator keeps without using it."""


def measured(line: str, monkeypatch: pytest.MonkeyPatch) -> MemoryLedger:
    monkeypatch.setattr(memory, "_profile_cuda", lambda *_: (TOTAL, ACTIVATIONS, HEAD))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (TOTAL - OTHERS - HELD - CACHED, TOTAL))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: HELD + CACHED)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: HELD)
    mesh = SimpleNamespace(
        device=torch.device("cuda"), rank=0, layout=ParallelLayout(1, 1, (4,)), world=SimpleNamespace(min=lambda value: value)
    )
    decoder = SimpleNamespace(dtype=torch.bfloat16, cache_shape=lambda blocks, size: (blocks, size, 2, 8))
    config = resolve(parse(line.split()), ModelFiles("m", "m"), SPEC, Machine(1, 1, 1, 1, 2, "serve"))
    return memory.measure(cast(Any, decoder), cast(Any, mesh), cast(Any, None), config, 1, weights=20_000_000)


def test_the_cache_and_all_else_fill_the_share_of_the_card(monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = measured("m --gpu-memory-utilization 0.8", monkeypatch)
    assert ledger.kv_cache == ledger.num_blocks * BLOCK_BYTES
    used = OTHERS + HELD + ACTIVATIONS + HEAD + ledger.kv_cache
    assert 0.8 * TOTAL - BLOCK_BYTES < used <= 0.8 * TOTAL, "held is more than weights: tables of positions, slots"


def test_a_card_too_small_for_one_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"one sequence of 4,096 tokens .* pass --max-model-len 192$"):
        measured("m --gpu-memory-utilization 0.4505", monkeypatch)
