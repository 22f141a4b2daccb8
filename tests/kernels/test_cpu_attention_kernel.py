"""The library's attention on each instruction set that this machine has: right by float64, equal bits however it is asked.

Legend as in tpserve_kernels/cpu/attention.py.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch

from tpserve_kernels.cpu import attention
from tpserve_kernels.cpu import library as loading
from tpserve_kernels.cpu.attention import AttentionInputs, paged_attention, paged_attention_reference
from tpserve_kernels.cpu.kv_int8 import dequantize_heads_reference, quantize_heads_reference
from tpserve_kernels.cpu.library import Isa, Library

DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(autouse=True, params=list(Isa), ids=lambda isa: isa.name.lower())
def _isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    usual, threads = loading.library(), torch.get_num_threads()
    if usual is None or request.param > usual.isa:
        pytest.skip("no library, or not on this processor")
    library = Library(usual.file, request.param)
    monkeypatch.setattr(attention, "library", lambda: library)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
    Library(usual.file, usual.isa)


@dataclass
class Paged:
    """Requests whose keys and values lie in shuffled blocks; whatever is nobody's is NaN, also what the tables name past them."""

    contexts: list[int]
    heads: int = 4
    kv_heads: int = 2
    k_dim: int = 16
    v_dim: int = 16
    v_in_k: bool = False
    block_size: int = 16
    window: int | None = None
    cap: float | None = None
    sinks: torch.Tensor | None = None
    dtype: torch.dtype = torch.bfloat16
    int8: bool = False

    def __post_init__(self) -> None:
        self.keys, self.values, self.queries = (
            [torch.randn(context, heads, dim).to(self.dtype) for context in self.contexts]
            for heads, dim in ((self.kv_heads, self.k_dim), (self.kv_heads, self.v_dim), (self.heads, self.k_dim))
        )
        self.place(self.block_size)

    def place(self, block_size: int) -> None:
        """Lay the same keys and values into blocks of another size."""
        self.block_size = block_size
        widths = [-(-context // block_size) for context in self.contexts]
        ids, total = torch.randperm(sum(widths) + 3), sum(widths) + 3
        self.k = torch.full((total, block_size, self.kv_heads, self.k_dim), torch.nan, dtype=self.dtype)
        self.v = self.k[..., : self.v_dim]
        if not self.v_in_k:
            self.v = torch.full((total, block_size, self.kv_heads, self.v_dim), torch.nan, dtype=self.dtype)
        self.tables = torch.full((len(widths), max(widths) + 2), 2**30, dtype=torch.int32)[:, 1:]  # rows with a stride
        for r, (own, k, v) in enumerate(zip(ids[: sum(widths)].split(widths), self.keys, self.values, strict=True)):
            self.tables[r, : len(own)] = own
            slots = own[torch.arange(len(k)) // block_size] * block_size + torch.arange(len(k)) % block_size
            self.k.flatten(0, 1)[slots] = k
            if not self.v_in_k:
                self.v.flatten(0, 1)[slots] = v

        if self.int8:
            keys = quantize_heads_reference(self.k)
            self.k, self.v = keys, keys[..., : self.v_dim] if self.v_in_k else quantize_heads_reference(self.v)

    def run(self, chunks: list[tuple[int, int, int]], threads: int = 1, exact: bool = False) -> list[torch.Tensor]:
        """The rows of chunks (request, start, count)."""
        torch.set_num_threads(threads)
        rows = torch.cat([self.queries[r][start : start + count] for r, start, count in chunks])
        packed = torch.full((len(rows) + 2, self.heads + 3, self.k_dim), torch.nan, dtype=self.dtype)  # as in a packed qkv
        packed[: len(rows), : self.heads] = rows
        starts = torch.tensor([0, *(count for _, _, count in chunks)]).cumsum(0).int()
        contexts = torch.tensor([start + count for _, start, count in chunks]).int()
        tables = self.tables[[r for r, _, _ in chunks]]
        inputs = AttentionInputs(
            packed[:, : self.heads], self.k, self.v, tables, starts, contexts, self.k_dim**-0.5, self.window, self.cap, self.sinks
        )
        if exact:
            out = paged_attention_reference(inputs, torch.float64)
        else:
            out = paged_attention(inputs)
        assert not out[len(rows) :].any()
        return list(out[: len(rows)].split([count for _, _, count in chunks]))

    def whole(self) -> list[tuple[int, int, int]]:
        return [(r, 0, context) for r, context in enumerate(self.contexts)]


SHAPES = {
    "odd heads": Paged([70, 1, 16], 6, 2, 20, 17),
    "of 21, blocks of 8": Paged([65, 130], 3, 3, 21, 21, block_size=8),
    "of 80": Paged([33, 64], 4, 1, 80, 80, block_size=32),
    "of 96, window": Paged([150, 20], 8, 2, 96, 96, window=70),
    "cap and sinks": Paged([100, 3], 6, 2, 64, 32, cap=2.0, sinks=torch.linspace(-4, 4, 6)),
    "latents, many heads": Paged([80], 80, 1, 576, 512, v_in_k=True),
    "latents, odd": Paged([130, 5], 5, 1, 50, 34, v_in_k=True, block_size=5, window=90, sinks=torch.ones(5)),
    "splits": Paged([1100], 4, 2, 16, 16),
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("int8", [False, True], ids=["", "int8"])
def test_it_is_attention(name: str, dtype: torch.dtype, int8: bool) -> None:
    paged = replace(SHAPES[name], dtype=dtype, int8=int8)
    chunks = [*paged.whole(), (0, 7, 0), (0, paged.contexts[0] - 1, 1)]
    got, expected = paged.run(chunks, threads=2), paged.run(chunks, exact=True)
    tolerance = 4e-6 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(torch.cat(got).double(), torch.cat(expected), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(("dtype", "int8"), [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)])
def test_a_row_is_the_same_in_every_company(dtype: torch.dtype, int8: bool) -> None:
    """Alone and divided among threads, in chunks, in a crowd of 48, in blocks of other sizes."""
    paged = Paged([*range(1, 240, 5), 1300], 8, 2, 40, 24, window=600, dtype=dtype, int8=int8)
    last, alone = len(paged.contexts) - 1, {}
    for position in (0, 63, 64, 511, 512, 600, 1024, 1299):
        alone[position] = paged.run([(last, position, 1)])[0][0]
        for threads in (2, 3):
            assert torch.equal(paged.run([(last, position, 1)], threads)[0][0], alone[position]), (position, threads)
    crowd = [(r, context - 1, 1) for r, context in enumerate(paged.contexts)]
    for block_size in (16, 8, 32, 5):
        paged.place(block_size)
        assert torch.equal(paged.run(crowd, 2)[last][0], alone[1299])
        for chunks in ([*crowd[:-1], (last, 0, 1300)], [(last, 0, 1300)], [(last, 500, 113)], [(last, 599, 2), (0, 0, 1)]):
            for threads in (1, 2):
                for (r, start, count), rows in zip(chunks, paged.run(chunks, threads), strict=True):
                    for position in alone:
                        if r == last and start <= position < start + count:
                            assert torch.equal(rows[position - start], alone[position]), (position, block_size, threads)


def test_heads_do_not_show() -> None:
    """A head alone has the bits that it has among many, however heads are divided among blocks."""
    paged = Paged([700, 90], 96, 2, 320, 300, dtype=torch.float32)
    chunks = [(0, 640, 60), (1, 89, 1)]
    whole = paged.run(chunks, threads=2)
    paged.k, paged.v, paged.heads, paged.kv_heads = paged.k[:, :, 1:], paged.v[:, :, 1:], 48, 1
    paged.queries = [q[:, 48:] for q in paged.queries]
    for one, all_heads in zip(paged.run(chunks), whole, strict=True):
        assert torch.equal(one, all_heads[:, 48:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_no_row_sees_may_be_anything_and_what_one_sees_counts(dtype: torch.dtype) -> None:
    paged = Paged([200], window=50, dtype=dtype)
    before = paged.run([(0, 190, 10)])[0]
    assert before.isfinite().all()
    slots = paged.tables[0, torch.arange(200) // 16] * 16 + torch.arange(200) % 16
    paged.k.flatten(0, 1)[slots[:141].long()] = paged.v.flatten(0, 1)[slots[:141].long()] = torch.inf
    assert torch.equal(paged.run([(0, 190, 10)])[0], before)
    paged.k.flatten(0, 1)[slots[145].long()] = torch.nan
    after = paged.run([(0, 190, 10)])[0]
    assert after[:5].isnan().all(), "rows 190 to 194 see position 145"


def test_large_scores_and_sinks() -> None:
    paged = Paged([100], sinks=torch.tensor([-torch.inf, 80.0, -80.0, 0.0]), dtype=torch.float32)
    paged.queries[0].mul_(100)
    got, expected = paged.run(paged.whole())[0], paged.run(paged.whole(), exact=True)[0]
    torch.testing.assert_close(got.double(), expected, atol=1e-4, rtol=1e-4)


def test_int8() -> None:
    """Within half a step of the largest magnitude; zeros, tiny numbers and what is not finite."""
    x_TKD = torch.randn(50, 3, 21) * torch.logspace(-20, 20, 50)[:, None, None]
    step_TK1 = x_TKD.abs().amax(-1, keepdim=True) / 127
    read_TKD = dequantize_heads_reference(quantize_heads_reference(x_TKD))
    assert (read_TKD - x_TKD).abs().le(0.5001 * step_TK1).all()
    assert torch.equal(read_TKD.abs().amax(-1), 127 * step_TK1[..., 0])
    odd_TKD = torch.zeros(4, 1, 8)
    odd_TKD[1], odd_TKD[2, 0, 3], odd_TKD[3, 0, 3] = 1e-40, torch.nan, -torch.inf
    read_TKD = dequantize_heads_reference(quantize_heads_reference(odd_TKD))
    assert not read_TKD[:2].any() and read_TKD[2:].isnan().all()
