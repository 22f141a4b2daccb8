"""Attention on the CPU, in torch and by the library: right by float64, and a row's bits are those of the row alone."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch

from tpserve.attention import cpu_plan
from tpserve.attention import paged as attention
from tpserve.attention.metadata import AttentionMetadata
from tpserve.attention.paged import AttentionParams, KVLayout, attend, build_metadata, write_kv
from tpserve_kernels.cpu.attention import AttentionInputs, paged_attention_reference
from tpserve_kernels.cpu.library import library

DTYPES = (torch.float32, torch.bfloat16)
Chunk = tuple[int, int, int]
"""(sequence, start, count)"""


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention as it is without the library."""
    monkeypatch.setattr(attention, "is_native", lambda x: False)


@pytest.fixture(params=["torch", "library"])
def form(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    if name == "torch":
        request.getfixturevalue("in_torch")
    elif library() is None:
        pytest.skip("no library of CPU kernels")
    return name


@dataclass(frozen=True)
class Case:
    """What a layer's attention looks like."""

    heads: int
    layout: KVLayout
    block_size: int = 16
    window: int | None = None
    cap: float | None = None
    sinks: bool = False

    def scoring(self) -> AttentionParams:
        sinks = torch.linspace(-2, 6, self.heads) if self.sinks else None
        return AttentionParams(self.layout.k_dim**-0.5, self.cap, sinks)


class Paged:
    """Random sequences in a shuffled cache; whatever nobody owns is NaN."""

    def __init__(self, contexts: list[int], case: Case, dtype: torch.dtype) -> None:
        self.case, self.contexts = case, contexts
        widths = [-(-context // case.block_size) for context in contexts]
        ids = torch.randperm(sum(widths) + 3)
        self.tables = [t.int() for t in ids[: sum(widths)].split(widths)]
        self.cache = case.layout.empty(len(ids), case.block_size, dtype, torch.device("cpu"))
        for side in (self.cache.k, self.cache.v):
            side.fill_(torch.nan)
        self.q = [torch.randn(context, case.heads, case.layout.k_dim).to(dtype) for context in contexts]
        batch = self.batch([(i, 0, context) for i, context in enumerate(contexts)])
        k_TKD, v_TKE = (
            torch.randn(sum(contexts), case.layout.num_heads, d).to(dtype) for d in (case.layout.k_dim, case.layout.v_dim)
        )
        write_kv(2 * k_TKD, None if case.layout.v_in_k else v_TKE, self.cache, batch)

    def batch(self, chunks: list[Chunk]) -> AttentionMetadata:
        """These chunks, in this order."""
        ends = [start + count for _, start, count in chunks]
        padded = torch.nn.utils.rnn.pad_sequence([self.tables[i] for i, _, _ in chunks], batch_first=True)
        starts = torch.tensor([0, *(count for _, _, count in chunks)]).cumsum(0)
        slots = torch.cat([self._slots(i, torch.arange(start, start + count)) for i, start, count in chunks])
        lens = tuple(count for _, _, count in chunks)
        return AttentionMetadata(
            starts.int(), torch.tensor(ends).int(), padded, slots, lens, tuple(ends), window=self.case.window
        )

    def _slots(self, sequence: int, positions: torch.Tensor) -> torch.Tensor:
        size = self.case.block_size
        return self.tables[sequence][positions // size].long() * size + positions % size

    def forget(self, sequence: int, before: int) -> None:
        """The sequence's entries before a position go to somebody whose values are not numbers."""
        lost = self._slots(sequence, torch.arange(before))
        for side in (self.cache.k, self.cache.v):
            side.flatten(0, 1)[lost] = torch.nan
        self.tables[sequence][: before // self.case.block_size] = 2**30

    def run(self, chunks: list[Chunk]) -> list[torch.Tensor]:
        rows = torch.cat([self.q[i][start : start + count] for i, start, count in chunks])
        batch = build_metadata(self.batch(chunks), self.case.heads, self.cache)
        out = attend(rows, self.cache, batch, self.case.scoring())
        return list(out.split([count for _, _, count in chunks]))

    def whole(self) -> list[Chunk]:
        return [(i, 0, context) for i, context in enumerate(self.contexts)]

    def expected(self, dtype: torch.dtype) -> torch.Tensor:
        """Computed in `dtype`."""
        batch, scoring = self.batch(self.whole()), self.case.scoring()
        inputs = AttentionInputs(
            torch.cat(self.q), self.cache.k, self.cache.v, batch.tables, batch.query_starts, batch.context_lens,
            scoring.scale, self.case.window, scoring.cap, scoring.sinks,
        )  # fmt: skip
        return paged_attention_reference(inputs, dtype)


CASES = {
    "groups": Case(8, KVLayout(4, 8, 8)),
    "one each": Case(8, KVLayout(8, 16, 16), block_size=32),
    "one for all": Case(6, KVLayout(1, 64, 64)),
    "odd": Case(3, KVLayout(3, 80, 80), block_size=256),
    "wide keys": Case(4, KVLayout(2, 48, 16)),
    "wide values": Case(4, KVLayout(2, 16, 48)),
    "latents": Case(16, KVLayout(1, 72, 64, v_in_k=True)),
    "window of one": Case(4, KVLayout(2, 16, 16), window=1),
    "window in a tile": Case(4, KVLayout(2, 16, 16), window=37),
    "window of a tile": Case(4, KVLayout(2, 16, 16), window=128),
    "window of tiles": Case(5, KVLayout(1, 16, 16), block_size=32, window=200),
    "window beyond": Case(4, KVLayout(2, 16, 16), window=1000),
    "cap": Case(4, KVLayout(2, 16, 16), cap=2.0),
    "sinks": Case(6, KVLayout(2, 16, 16), sinks=True),
    "all of it": Case(6, KVLayout(2, 24, 16), window=100, cap=3.0, sinks=True),
    "all of it, latents": Case(5, KVLayout(1, 24, 16, v_in_k=True), window=130, cap=3.0, sinks=True),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


@every_case
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("form")
def test_rows_stand_alone(case: Case, dtype: torch.dtype) -> None:
    contexts = [1, 5, 16, 17, 128, 129, 40, 257]
    paged = Paged(contexts, case, dtype)
    torch.set_num_threads(1)
    probes = [(i, p) for i, context in enumerate(contexts) for p in range(context) if p % 128 in (0, 1, 127) or p % 23 == 0]
    alone = {(i, p): paged.run([(i, p, 1)])[0][0] for i, p in probes}
    got, exact = torch.cat(paged.run(paged.whole())), paged.expected(torch.float64)
    usual = (paged.expected(torch.float32) - exact).abs().max().item()
    assert usual < 1e-5
    torch.testing.assert_close(got.double(), exact, atol=1.5 * usual if dtype == torch.float32 else 2e-2, rtol=1e-5)
    last = [(i, context - 1, 1) for i, context in enumerate(contexts)]
    cuts = [(i, context // 3, context - context // 3) for i, context in enumerate(contexts)]
    whole = paged.whole()
    steps = [whole, last, last[::-1], cuts, last[:4] + whole[4:], [(7, 0, 130)], [(7, 130, 3)], [(7, 133, 124)]]
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for chunks in steps[: None if threads == 1 else 2]:
            for (i, start, count), got in zip(chunks, paged.run(chunks), strict=True):
                for p in range(start, start + count):
                    assert (i, p) not in alone or torch.equal(got[p - start], alone[i, p]), (i, p, threads)


@every_case
@pytest.mark.usefixtures("in_torch")
def test_neither_gathers_nor_groups_show(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    paged = Paged([100, 150, 3, 290], case, torch.float32)
    chunks = [*((i, context - 1, 1) for i, context in enumerate(paged.contexts)), (3, 110, 40)]
    together = torch.cat(paged.run(chunks))
    for bound in ("GATHER_BYTES", "PART_BYTES"):
        monkeypatch.setattr(cpu_plan, bound, 1)
        assert torch.equal(torch.cat(paged.run(chunks)), together)
    monkeypatch.setattr(cpu_plan, "FEW_QUERIES", 3)
    assert torch.equal(torch.cat(paged.run(chunks)), together)


@pytest.mark.usefixtures("in_torch")
def test_a_bound_of_one_byte_takes_a_pair_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    paged = Paged([200, 100, 150, 3], CASES["groups"], torch.float32)
    for bound in ("GATHER_BYTES", "PART_BYTES"):
        monkeypatch.setattr(cpu_plan, bound, 1)
    batch = build_metadata(paged.batch([(i, context - 1, 1) for i, context in enumerate(paged.contexts)]), 8, paged.cache)
    assert [len(group.chunks) for group in batch.tiles] == [2, 2, 1, 1]


@pytest.mark.parametrize("name", ["window of one", "window in a tile", "window of tiles", "all of it", "all of it, latents"])
@pytest.mark.usefixtures("form")
def test_what_lies_before_a_window_may_be_anything(name: str) -> None:
    """Blocks that fell out of the window are others' by now, and the table no longer names them."""
    case = CASES[name]
    assert case.window is not None
    paged = Paged([300, 530, 20, 77], case, torch.bfloat16)
    chunks = [(0, 299, 1), (1, 470, 60), (2, 19, 1), (3, 76, 1)]
    before = paged.run(chunks)
    for i, start, _ in chunks:
        paged.forget(i, max(0, start + 1 - case.window))
    for one, other in zip(before, paged.run(chunks), strict=True):
        assert torch.equal(one, other)


@pytest.mark.usefixtures("in_torch")
def test_a_window_reads_its_tiles_only() -> None:
    case = replace(CASES["groups"], window=100)
    paged = Paged([4990, 129, 20], case, torch.float32)
    decode, prefill = build_metadata(paged.batch([(0, 4989, 1), (1, 128, 1), (2, 19, 1), (0, 3000, 64)]), 8, paged.cache).tiles
    assert decode.seqs_per_tile == (3, 1), "positions 4890 to 4989 are in one tile, 29 to 128 in two, 0 to 19 in one"
    assert decode.rows.tolist() == [1, 0, 2] and prefill.seqs_per_tile == (1, 1), "positions 2901 to 3063"
