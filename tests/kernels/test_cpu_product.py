"""Products with packed matrices: odd shapes between poison, exact sums, and the same bits in any company.

Numbers are small integers where sums are compared: then every order of sums is exact, and each bit of the result is known.
"""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.kernels.cpu_isa import isa, skip_without_library
from tpserve_kernels.cpu.library import DTYPES, Isa, Operation, library
from tpserve_kernels.cpu.packed_size import ALIGNMENT
from tpserve_kernels.cpu.product import (
    ProductArgs,
    grouped_product,
    lookup,
    pack,
    packed_bytes,
    product,
    product_of_heads,
    product_reference,
)

__all__ = ["isa"]
pytestmark = [skip_without_library, pytest.mark.usefixtures("isa")]
POISON = 0xFF
"""Bytes 0xffff...: not a number in float32 and in bfloat16, which no sum survives, not even times zero."""
FENCE = 192
INNER = st.sampled_from([1, 17, 31, 96, 2050]) | st.integers(1, 130)
DTYPE, THREADS = st.sampled_from([*DTYPES]), st.sampled_from([1, 2])
quickly = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def fenced(rows: int, columns: int, stride: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """A buffer of poison, as bytes, and a matrix [rows, columns] inside it, its rows `stride` apart."""
    size = ((rows - 1) * stride + columns) * dtype.itemsize if rows else 0
    buffer = torch.full((size + 2 * FENCE + ALIGNMENT,), POISON, dtype=torch.uint8)
    first = FENCE + -(buffer.data_ptr() + FENCE) % ALIGNMENT
    return buffer, torch.as_strided(buffer[first : first + size].view(dtype), (rows, columns), (stride, 1))


def is_poison_but_for(buffer: torch.Tensor, inside: torch.Tensor) -> bool:
    """Whether nothing was written beside the matrix. Poisons the matrix."""
    inside.copy_(torch.full((inside.element_size(),), POISON, dtype=torch.uint8).view(inside.dtype).expand_as(inside))
    return bool((buffer == POISON).all())


def integers(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randint(-8, 9, shape, generator=generator).float()


@quickly
@given(
    inner=INNER,
    outputs=st.integers(1, 70),
    rows=st.integers(0, 40),
    gaps=st.tuples(st.integers(0, 5), st.integers(0, 5)),
    dtypes=st.sampled_from([(a, b) for a in DTYPES for b in DTYPES]),
    bias=st.booleans(),
    threads=THREADS,
    seed=st.integers(0, 1000),
)
def test_odd_shapes_between_poison(
    inner: int,
    outputs: int,
    rows: int,
    gaps: tuple[int, int],
    dtypes: tuple[torch.dtype, torch.dtype],
    bias: bool,
    threads: int,
    seed: int,
) -> None:
    lib, generator, (dtype, out_dtype) = library(), torch.Generator().manual_seed(seed), dtypes
    assert lib is not None
    torch.set_num_threads(threads)
    weight_NK, bias_N = integers(generator, outputs, inner).to(dtype), integers(generator, outputs) if bias else None
    around_blob, blob = fenced(1, packed_bytes(dtype, outputs, inner), 0, torch.uint8)
    pack(weight_NK, blob[0])
    _, x_TK = fenced(rows, inner, inner + gaps[0], dtype)
    x_TK.copy_(integers(generator, rows, inner))
    around_out, out_TN = fenced(rows, outputs, outputs + gaps[1], out_dtype)
    bias_pointer = None if bias_N is None else bias_N.data_ptr()
    strides = x_TK.stride(0), out_TN.stride(0)
    call = ProductArgs(blob.data_ptr(), x_TK.data_ptr(), bias_pointer, out_TN.data_ptr(), rows, *strides, DTYPES[out_dtype])
    lib.run(Operation.PRODUCT, call)
    assert torch.equal(out_TN, product_reference(x_TK, weight_NK, bias_N, out_dtype))
    assert is_poison_but_for(around_out, out_TN) and is_poison_but_for(around_blob, blob)


@quickly
@given(inner=INNER, outputs=st.integers(1, 70), gap=st.integers(0, 5), dtype=DTYPE, threads=THREADS)
def test_rows_come_out_as_they_were_packed(inner: int, outputs: int, gap: int, dtype: torch.dtype, threads: int) -> None:
    """All bits, also of what is no number."""
    torch.set_num_threads(threads)
    integer = torch.int32 if dtype == torch.float32 else torch.int16
    bounds = torch.iinfo(integer)
    weight_NK = torch.randint(bounds.min, bounds.max, (outputs, inner + gap), dtype=integer).view(dtype)[:, :inner]
    blob = pack(weight_NK)
    ids_T = torch.cat((torch.randperm(outputs), torch.tensor([0, outputs - 1, 0])))
    found_TK = lookup(ids_T, blob, inner, dtype)
    assert torch.equal(found_TK.view(integer), weight_NK[ids_T].view(integer))


@pytest.mark.parametrize("dtype", [*DTYPES], ids=str)
def test_a_row_alone_and_in_any_company(dtype: torch.dtype, isa: Isa) -> None:
    """The same bits in batches of 1 to 600 rows, at any place, on one to four threads, in memory aligned or not."""
    generator = torch.Generator().manual_seed(0)
    many = (*range(1, 68), *range(68, 600, 61), 600)
    for inner, outputs, counts in ((34, 19, many), (2050, 35, (1, 2, 3, 5, 7, 17, 33, 47, 130))):
        blob = pack(torch.randn(outputs, inner, generator=generator).to(dtype))
        x_TK = torch.randn(600 if inner < 100 else 130, inner, generator=generator).to(dtype)
        torch.set_num_threads(1)
        together_TN = product(x_TK, blob, outputs)
        shifted_TK = torch.empty(len(x_TK) * inner + 1, dtype=dtype)[1:].view_as(x_TK).copy_(x_TK)
        assert torch.equal(product(shifted_TK, blob, outputs), together_TN)
        for count in counts:
            torch.set_num_threads(1 + count % 4)
            assert torch.equal(product(x_TK[:count], blob, outputs), together_TN[:count]), (inner, count)
            assert torch.equal(product(x_TK[-count:], blob, outputs), together_TN[-count:]), (inner, count)


@pytest.mark.parametrize("dtype", [*DTYPES], ids=str)
def test_sums_are_in_float32_and_rounded_once(dtype: torch.dtype) -> None:
    """Within the bound for a sum of K products, each rounded (Higham 2002, section 3.1)."""
    generator = torch.Generator().manual_seed(1)
    weight_NK, x_TK = torch.randn(40, 1000, generator=generator).to(dtype), torch.randn(9, 1000, generator=generator).to(dtype)
    exact_TN = x_TK.double() @ weight_NK.double().T
    bound_TN = 2 * 1001 * 2**-24 * (x_TK.double().abs() @ weight_NK.double().abs().T)
    blob = pack(weight_NK)
    sums_TN = product(x_TK, blob, 40, out_dtype=torch.float32)
    assert ((sums_TN - exact_TN).abs() <= bound_TN).all()
    assert torch.equal(product(x_TK, blob, 40, out_dtype=torch.bfloat16), sums_TN.bfloat16())


def sums_over_inner(products_TNK: torch.Tensor, isa: Isa) -> torch.Tensor:
    """Their sums in float32 as the instruction set adds up bfloat16 (docs/numerics.md); K is a multiple of 32."""

    def chain(terms_TNK: torch.Tensor) -> torch.Tensor:
        total_TN = torch.zeros(terms_TNK.shape[:2])
        for term_TN in terms_TNK.unbind(2):
            total_TN = total_TN + term_TN
        return total_TN

    if isa == Isa.AVX512_BF16:
        products_TNK = products_TNK.unflatten(2, (-1, 2)).flip(3).flatten(2)
    if isa < Isa.AMX:
        return chain(products_TNK)
    return chain(torch.stack([chain(tile[..., ::2]) + chain(tile[..., 1::2]) for tile in products_TNK.split(32, 2)], 2))


def test_bfloat16_is_summed_in_the_order_of_the_instruction_set(isa: Isa) -> None:
    """To the last bit, since a product of two bfloat16 is exact in float32."""
    generator = torch.Generator().manual_seed(2)
    weight_NK, x_TK = (torch.randn(count, 160, generator=generator).bfloat16() for count in (19, 33))
    sums_TN = product(x_TK, pack(weight_NK), 19, out_dtype=torch.float32)
    assert torch.equal(sums_TN, sums_over_inner(x_TK.float()[:, None] * weight_NK.float(), isa))


def test_the_instructions_of_bfloat16_take_denormals_as_zeros(isa: Isa) -> None:
    """And give none; the other sets keep them."""
    x_TK = torch.tensor([[2.0**-70], [2.0**-130], [1.0], [2.0**-60]]).bfloat16()
    weight_NK = torch.tensor([[2.0**-70], [1.0], [2.0**-130]]).bfloat16()
    exact_TN = x_TK.float() * weight_NK.float().T
    assert exact_TN.count_nonzero() == 8
    normal_TN = exact_TN * (exact_TN.abs() >= torch.finfo(torch.float32).tiny)
    sums_TN = product(x_TK, pack(weight_NK), 3, out_dtype=torch.float32)
    assert torch.equal(sums_TN, normal_TN if isa >= Isa.AVX512_BF16 else exact_TN)


@quickly
@given(
    counts=st.lists(st.sampled_from([0, 1, 2, 5, 13, 40]), min_size=1, max_size=6),
    inner=st.sampled_from([1, 31, 96]),
    outputs=st.integers(1, 50),
    dtype=DTYPE,
    threads=THREADS,
)
def test_a_group_of_products_is_each_of_them(
    counts: list[int], inner: int, outputs: int, dtype: torch.dtype, threads: int
) -> None:
    """Experts with some rows each, or none; heads with all rows each."""
    torch.set_num_threads(threads)
    blob_EB = torch.stack([pack(torch.randn(outputs, inner).to(dtype)) for _ in counts])
    x_RK = torch.randn(sum(counts), inner).to(dtype)
    ends_E = torch.tensor(counts).cumsum(0).int()
    out_RN = grouped_product(x_RK, blob_EB, outputs, ends_E)
    for blob, out, x in zip(blob_EB, out_RN.split(counts), x_RK.split(counts), strict=True):
        assert torch.equal(out, product(x, blob, outputs))
    x_TEK = torch.randn(counts[0], len(counts), inner).to(dtype)
    out_TEN = product_of_heads(x_TEK, blob_EB, outputs)
    for blob, out, x in zip(blob_EB, out_TEN.unbind(1), x_TEK.unbind(1), strict=True):
        assert torch.equal(out, product(x, blob, outputs))
