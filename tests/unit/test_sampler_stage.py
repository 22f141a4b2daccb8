"""The rows at the LM head stay within their bytes: in steps of the largest size, however large the vocabulary, on every rank."""

from collections.abc import Callable

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from tpserve.cli.server_flags import parse
from tpserve.config.resolve import resolve
from tpserve.host.resources import Memory
from tpserve.models.decoder import Decoder
from tpserve.parallel.group import Group
from tpserve.parallel.mesh import Mesh
from tpserve.parallel.pipeline import Pipeline
from tpserve.types.layout import ParallelLayout
from tpserve.types.machine import Machine
from tpserve.types.model_files import ModelFiles
from tpserve.types.model_spec import CacheGroup, ModelSpec, RopeSpec
from tpserve.weights.dummy import dummy
from tpserve.worker import logits_chunking
from tpserve.worker.logits_chunking import LogitsChunking
from tpserve.worker.memory import _ProfileRun, measure
from tpserve.worker.request_pool import RequestPool
from tpserve.worker.sizing import report

VOCAB = 20_000
SPEC = ModelSpec(
    family="llama", vocab_size=VOCAB, hidden_size=16, intermediate_size=16, num_layers=1, num_heads=1, num_kv_heads=1,
    head_dim=16, norm_eps=1e-5, rope=RopeSpec(), max_position=4096, tie_embeddings=True, qkv_bias=False, out_bias=False,
    mlp_bias=False, qk_norm=None, activation="silu", dtype="bfloat16", bos_id=1, eos_ids=(2,), cache=(CacheGroup((0,)),),
)  # fmt: skip
DEVICE = torch.device("cpu")
CONFIG = resolve(
    parse(["m", "--device", "cpu", "--max-model-len", "1000", "--max-num-seqs", "30", "--max-num-batched-tokens", "70"]),
    ModelFiles("m", "m"),
    SPEC,
    Machine(1, 1, 1, 1, 2, "serve"),
)


def make() -> tuple[Decoder, Mesh, RequestPool]:
    layout = ParallelLayout(1, 1, (1,))
    decoder = Decoder(SPEC, layout, 0, Group(), torch.bfloat16, DEVICE, 1000)
    dummy(decoder.parameters())
    request_pool = RequestPool(30, 1000, 16, (None,), DEVICE, eos_ids=(2,), vocab_size=VOCAB)
    return decoder, Mesh(0, layout, Group(), Group(), Pipeline(), DEVICE), request_pool


def peak(work: Callable[[], None]) -> int:
    """Most bytes that torch's allocator gave out at any time of `work`."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


@pytest.mark.parametrize("rows_at_once", [5, 1000], ids=["in slices", "at once"])
def test_the_bound_is_what_the_largest_steps_take(rows_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logits_chunking, "HEAD_BYTES", rows_at_once * VOCAB * logits_chunking.FILTERED_BYTES)
    profile_run = _ProfileRun(*make(), CONFIG, rows=70)
    most = peak(profile_run.head)
    assert 0.7 * profile_run.max_head_bytes() < most <= profile_run.max_head_bytes()


def test_shares_of_the_vocabulary_are_counted_by_the_widest() -> None:
    """All ranks of a stage cut the rows alike."""
    alone, shared = LogitsChunking.of((range(VOCAB),), 1000), LogitsChunking.of((range(12_800), range(12_800, VOCAB)), 1000)
    assert shared.plain == logits_chunking.HEAD_BYTES // (12_800 * logits_chunking.PLAIN_BYTES) > alone.plain
    assert shared.filtered == alone.filtered, "rows with filters are gathered whole"
    assert LogitsChunking.of((range(1 << 40),), 1000).plain == 1


def test_the_ledger_has_an_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, mesh, request_pool = make()
    monkeypatch.setattr("tpserve.worker.memory.available_memory", lambda: Memory(1 << 30, 1 << 31, "the machine"))
    found, ledgers = measure(decoder, mesh, lambda _: request_pool, CONFIG, 2, weights=0)
    ledger = ledgers[0]
    assert ledger.head == 30 * (VOCAB * logits_chunking.FILTERED_BYTES + 1001 * logits_chunking.HISTORY_BYTES), (
        "70 plain rows take less"
    )
    block = 2 * 16 * 16 * 2
    assert ledger.num_blocks == (int(((1 << 29) - ledger.head) * 0.4) - ledger.slots) // block
    assert any("LM head rows 37.1 MiB, slots" in line for line in report(ledgers, found, SPEC, CONFIG))
    earlier = Mesh(0, ParallelLayout(1, 2, (1, 1)), Group(), Group(), Pipeline(None, 1), DEVICE)
    assert measure(decoder, earlier, lambda _: request_pool, CONFIG, 2, weights=0)[1][0].head == 0, "an earlier stage has no head"
