"""The KV cache gets what is left of a card, after everything that is on it; a card is played here by four numbers."""

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from tests.specs import small
from tpserve.attention.paged import KVLayout
from tpserve.cli.server_flags import parse
from tpserve.config.engine_config import EngineConfig
from tpserve.config.resolve import resolve
from tpserve.errors import UserError
from tpserve.host.resources import Memory
from tpserve.parallel.group import Group
from tpserve.parallel.mesh import Mesh
from tpserve.parallel.pipeline import Pipeline
from tpserve.types.layout import ParallelLayout
from tpserve.types.machine import Machine
from tpserve.types.messages import MemoryLedger
from tpserve.types.model_files import ModelFiles
from tpserve.worker import device as devices
from tpserve.worker import memory

SPEC = small(max_position=4096, dtype="bfloat16", bos_id=1, eos_ids=(2,))
BLOCK_BYTES = 4 * 2 * 16 * 2 * 8 * 2
TOTAL, OTHERS, HELD, CACHED, ACTIVATIONS, HEAD = 100_000_000, 5_000_000, 30_000_000, 2_000_000, 7_000_000, 3_000_000
GRAPHS = 1_000_000
"""`CACHED`: what torch's allocator keeps without using it; a rank that shares the card holds as much."""
SLOTS = 256 * 4097 * 4


def resolved(line: str) -> EngineConfig:
    return resolve(parse(line.split()), ModelFiles("m", "m"), SPEC, Machine(1, 1, 1, 1, 2, "serve"))


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Callable[..., MemoryLedger]:
    def measure(line: str, sharers: int = 1, nccl: int = 0) -> MemoryLedger:
        monkeypatch.setattr(memory, "_peaks", lambda _: (ACTIVATIONS, HEAD))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (TOTAL - OTHERS - nccl - sharers * (HELD + CACHED), TOTAL))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: HELD + CACHED)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: HELD)
        monkeypatch.setattr(devices, "describe_memory", lambda _: "")
        layout, device = ParallelLayout(1, 1, (4,)), torch.device("cuda", 0)
        mesh = SimpleNamespace(device=device, rank=0, layout=layout, world=Group(), tp=Group())
        decoder = SimpleNamespace(spec=SPEC, dtype=torch.bfloat16, kv_layout=KVLayout(2, 8, 8))
        monkeypatch.setattr(memory, "_ProfileRun", lambda *_: None)
        monkeypatch.setattr(memory, "_graph_bytes", lambda _: GRAPHS)
        no_slots = cast(Any, lambda _: None)
        inputs = cast(Any, decoder), cast(Any, mesh), no_slots, resolved(line), sharers
        found = memory.measure(*inputs, weights=20_000_000, nccl=nccl)
        return found[1][0]

    return measure


def test_the_cache_and_all_else_fill_the_share_of_the_card(measured: Callable[..., MemoryLedger]) -> None:
    ledger = measured("m --gpu-memory-utilization 0.8")
    assert ledger.kv_cache == ledger.num_blocks * BLOCK_BYTES and ledger.slots == SLOTS
    used = OTHERS + HELD + ACTIVATIONS + HEAD + GRAPHS + SLOTS + ledger.kv_cache
    assert 0.8 * TOTAL - BLOCK_BYTES < used <= 0.8 * TOTAL, "held is more than weights: tables of positions"
    work = ledger.activations + ledger.head + ledger.graphs + ledger.communication + ledger.slots
    assert ledger.others + ledger.weights + work + ledger.kv_cache == used, "the ledger accounts for all of it"
    assert ledger.graphs == GRAPHS and ledger.communication == 0
    assert measured("m --gpu-memory-utilization 0.8 --enforce-eager").graphs == 0
    joined = measured("m --gpu-memory-utilization 0.8", nccl=4_000_000)
    assert (joined.communication, joined.others) == (4_000_000, OTHERS), "NCCL is an entry of its own"
    assert 0 <= ledger.kv_cache - joined.kv_cache - 4_000_000 + BLOCK_BYTES <= 2 * BLOCK_BYTES


def test_ranks_that_share_a_card_share_what_is_left(measured: Callable[..., MemoryLedger]) -> None:
    ledger = measured("m --gpu-memory-utilization 0.98", sharers=2)
    used = OTHERS + 2 * (HELD + ACTIVATIONS + HEAD + GRAPHS + SLOTS + ledger.kv_cache)
    assert 0.98 * TOTAL - 2 * BLOCK_BYTES - 1 < used <= 0.98 * TOTAL


def test_a_card_too_small_for_one_sequence(measured: Callable[..., MemoryLedger]) -> None:
    with pytest.raises(UserError, match=r"one sequence of 4,096 tokens .* pass --max-model-len \d+, or --kv-cache-memory 0\.01"):
        measured("m --gpu-memory-utilization 0.4855")


def test_nccl_is_measured_once_its_links_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each link takes a piece of a device."""
    free, calls = [10_000_000], list[str]()

    def take(what: str) -> None:
        calls.append(what)
        free[0] -= 1_000_000

    tp = SimpleNamespace(all_reduce=lambda x: (take(f"sum {len(x)}"), x)[1], all_gather=lambda x: take(f"gather {len(x)}"))
    pipeline = SimpleNamespace(connect=lambda device: take("pipeline"))
    world = SimpleNamespace(uses_nccl=True)
    mesh = cast(Any, SimpleNamespace(tp=tp, pipeline=pipeline, world=world, device=torch.device("cpu")))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(devices, "free_memory", lambda _: free[0])
    config = resolved("m --device cpu --max-num-batched-tokens 512")
    assert memory.nccl_bytes(mesh, SPEC, config, 10_500_000) == 5_500_000
    assert calls == ["sum 1", "gather 1", "sum 512", "gather 512", "pipeline"]
    world.uses_nccl = False
    assert memory.nccl_bytes(mesh, SPEC, config, 10_500_000) == 0 and len(calls) == 5


SMI = "#!/bin/sh\ncat <<'END'\n{rows}\nEND\n"


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """A stand-in that lists these processes."""

    def lists(rows: str) -> None:
        (tmp_path / "nvidia-smi").write_text(SMI.format(rows=rows))
        (tmp_path / "nvidia-smi").chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=":")

    return lists


def test_other_processes_on_the_card_are_named(nvidia_smi: Callable[[str], None]) -> None:
    rows = (
        f"GPU-1, 77, 6144, /usr/bin/python, of a kind\nGPU-2, 78, 1, other\nGPU-1, {os.getpid()}, 9, python\nGPU-1, 79, [N/A], x"
    )
    nvidia_smi(rows)
    assert devices.other_processes("GPU-1") == "also on it: pid 77 (/usr/bin/python, of a kind) 6144 MiB, pid 79 (x) [N/A] MiB"
    assert devices.other_processes("GPU-3").startswith("nvidia-smi shows no other process")


def test_without_nvidia_smi_it_says_where_to_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert "run it on the host" in devices.other_processes("GPU-1")


def test_weights_that_do_not_fit_are_refused_before_they_are_allocated(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The kernel would kill the rank instead."""
    monkeypatch.setattr(devices, "available_memory", lambda: Memory(300_000, 1 << 20, "the control group (/x)"))
    mesh = Mesh(0, ParallelLayout(1, 1, (4,)), Group(), Group(), Pipeline(), torch.device("cpu"))
    config = resolved("m --device cpu --max-num-seqs 1 --max-model-len 64")
    memory.check_weights(mesh, SPEC, config, 1, free=10_000_000)
    with pytest.raises(
        UserError, match=r"the weights of rank 0 take \d+\.\d KiB .* 293.0 KiB are free .* -tp 1 -pp 2 \(2 ranks on 2 nodes"
    ):
        memory.check_weights(mesh, SPEC, config, 1, free=300_000)
    assert "293.0 KiB are free of the 1.0 MiB of the control group (/x)" in caplog.text


def test_a_card_that_fills_up_is_explained(
    nvidia_smi: Callable[[str], None], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    nvidia_smi("GPU-1, 77, 6144, python")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (1_000_000, 20_000_000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 4_000_000)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="1"))
    mesh = Mesh(0, ParallelLayout(1, 1, (4,)), Group(), Group(), Pipeline(), torch.device("cuda", 0))
    config = resolved("m --max-num-seqs 1 --max-model-len 64")
    says = (
        r"GPU 0 ran out of memory while measuring: 19\.1 MiB in all, 3\.8 MiB taken by rank 0 \(weights .*\), 14\.3 MiB by "
        r"others and the driver: pass .* smaller --max-num-batched-tokens than 8192"
    )
    with pytest.raises(UserError, match=says), memory.room_for("measuring", mesh, SPEC, config, 1):
        raise torch.OutOfMemoryError("CUDA out of memory")
    assert "GPU 0: also on it: pid 77 (python) 6144 MiB" in caplog.text


def test_a_machine_that_gives_no_more_is_explained() -> None:
    mesh = Mesh(0, ParallelLayout(1, 1, (4,)), Group(), Group(), Pipeline(), torch.device("cpu"))
    config = resolved("m --device cpu")
    room = memory.room_for("making room", mesh, SPEC, config, 1)
    with (
        pytest.raises(UserError, match=r"rank 0 ran out of memory while making room: [\d.]+ GiB are free of the [\d.]+ GiB of"),
        room,
    ):
        torch.empty(1 << 56, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="another"), memory.room_for("making room", mesh, SPEC, config, 1):
        raise RuntimeError("another")
