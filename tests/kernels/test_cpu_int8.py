"""Products in int8 on each instruction set of the processor: the bits of an exact integer reference, so equal ones everywhere;
a row alone and in company, one thread and two, any sizes, nothing written beside a result."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tpserve_kernels.cpu import int8, qkv_heads, rows
from tpserve_kernels.cpu.kv_int8 import SCALE_BYTES
from tpserve_kernels.cpu.library import ALIGNMENT, Isa, Operation, load
from tpserve_kernels.cpu.qkv_heads import HeadNorms, Rotation
from tpserve_kernels.cpu.rows import ActivationKind, NormKind

DTYPES = (torch.float32, torch.bfloat16)
INNER = (1, 17, 31, 96, 2050)
BESIDE = 7


@pytest.fixture(params=[isa.name.lower() for isa in Isa], autouse=True, scope="module")
def _isa(request: pytest.FixtureRequest) -> Iterator[None]:
    threads = torch.get_num_threads()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TPSERVE_ISA", request.param)
            load.cache_clear()
            lib, reason = load()
            if lib is None or lib.isa.name.lower() != request.param:
                pytest.skip(reason or "not on this processor")
            yield
    finally:
        load.cache_clear()
        load()
        torch.set_num_threads(threads)


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def fenced(x: torch.Tensor, column: int = 3) -> torch.Tensor:
    """The same numbers in rows that lie apart and begin anywhere."""
    wide = torch.full((len(x), x.shape[1] + 5), BESIDE, dtype=x.dtype)
    wide[:, column : column + x.shape[1]] = x
    return wide[:, column : column + x.shape[1]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("inner", INNER)
def test_the_integer_reference(inner: int, dtype: torch.dtype) -> None:
    for count, outputs in ((0, 16), (1, 1), (1, 130), (2, 33), (3, 16), (5, 47), (13, 100), (33, 35), (70, 16)):
        x, weight, bias = random(count, inner, dtype=dtype), random(outputs, inner, dtype=dtype, seed=1), random(outputs, seed=2)
        x[1:2] = 0
        weight[:1] = 0
        blob = int8.pack(weight)
        assert torch.equal(int8.product(x, blob, outputs), int8.product_reference(x, weight))
        assert torch.equal(int8.product(fenced(x), blob, outputs, bias), int8.product_reference(x, weight, bias))
        as_float = int8.product(x, blob, outputs, bias, torch.float32)
        assert torch.equal(as_float, int8.product_reference(x, weight, bias, torch.float32))


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(0, 20), inner=st.integers(1, 300), outputs=st.integers(1, 70), seed=st.integers(0, 99))
def test_any_sizes(rows: int, inner: int, outputs: int, seed: int) -> None:
    x, weight = random(rows, inner, seed=seed), random(outputs, inner, seed=seed + 1)
    assert torch.equal(int8.product(x, int8.pack(weight), outputs), int8.product_reference(x, weight))


def test_the_largest_sums_are_exact() -> None:
    """Every number at the limit: neither pairs of products nor the sum over the most channels overflow."""
    inner = int8.MAX_INNER
    x, weight = torch.ones(3, inner), torch.ones(17, inner)
    x[1] = -1
    x[2, ::2] = -1
    blob = int8.pack(weight)
    quantized, scale = int8.quantize(x)
    sums = int8.integer_sums(quantized, blob, 17)
    assert sums[:, 0].tolist() == [127 * 127 * inner, -127 * 127 * inner, 0 if inner % 2 == 0 else -127 * 127]
    assert torch.equal(sums, sums[:, :1].expand(-1, 17)) and scale.tolist() == [1 / torch.tensor(127.0)] * 3
    with pytest.raises(AssertionError):
        int8.pack(torch.ones(1, inner + 1))


def test_a_row_alone_in_company_and_on_any_thread() -> None:
    x, weight = random(600, 352, dtype=torch.bfloat16), random(131, 352, dtype=torch.bfloat16, seed=1)
    blob = int8.pack(weight)
    torch.set_num_threads(1)
    together = int8.product(x, blob, 131)
    assert torch.equal(together, int8.product_reference(x, weight))
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for begin, end in ((0, 600), (0, 1), (1, 3), (5, 9), (17, 24), (100, 137), (599, 600)):
            assert torch.equal(int8.product(fenced(x[begin:end]), blob, 131), together[begin:end]), (begin, end, threads)


def test_rows_become_int8() -> None:
    """Ties go to even numbers, the largest magnitude becomes 127, tiny rows and zeros become zeros; the rest of K is zero."""
    x = torch.tensor([[127.0, 0.5, 1.5, -2.5], [0.0, -0.0, 0.0, 0.0], [1e-31, -1e-31, 0.0, 0.0], [-1.0, 1.0, 0.0, 0.004]])
    quantized, scale = int8.quantize(x)
    expected = [[127, 0, 2, -2], [0, 0, 0, 0], [0, 0, 0, 0], [-127, 127, 0, 1]]
    assert quantized[:, :4].tolist() == expected and not quantized[:, 4:].any() and quantized.shape == (4, 64)
    assert scale.tolist() == [1, 0, 0, 1 / torch.tensor(127.0)]
    for inner in INNER:
        x = random(7, inner, dtype=torch.bfloat16)
        given, own = random(7).abs() + 1, int8.quantize(fenced(x))
        for (numbers, scales), (wanted, wanted_scales) in (
            (own, int8.quantize_reference(x)),
            (int8.quantize(x, given), int8.quantize_reference(x, given)),
        ):
            assert torch.equal(numbers[:, :inner], wanted) and not numbers[:, inner:].any()
            assert torch.equal(scales, wanted_scales)
        assert torch.equal(int8.row_scales(fenced(x)), int8.row_scales_reference(x))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_no_number_stays_in_its_row(bad: float) -> None:
    x, weight = random(5, 70), random(20, 70, seed=1)
    expected = int8.product_reference(x, weight)
    x[2, 65] = bad
    actual = int8.product(x, int8.pack(weight), 20)
    others = torch.tensor([0, 1, 3, 4])
    assert torch.equal(actual[others], expected[others]) and not actual[2].isfinite().any()


def test_sums_of_parts_of_the_channels_are_the_whole_product() -> None:
    """What ranks do: equal scales, integers added up, then the floats."""
    x, weight = random(9, 200, dtype=torch.bfloat16), random(33, 200, dtype=torch.bfloat16, seed=1)
    cuts = (slice(0, 70), slice(70, 71), slice(71, 200))
    row_scale, scale = (torch.stack([int8.row_scales(each[:, cut]) for cut in cuts]).amax(0) for each in (x, weight))
    blobs = [int8.pack(weight[:, cut], scale) for cut in cuts]
    sums = [int8.integer_sums(int8.quantize(x[:, cut], row_scale)[0], blob, 33) for cut, blob in zip(cuts, blobs, strict=True)]
    total = sum(sums[1:], sums[0])
    for blob in blobs:
        assert torch.equal(int8.rescale(total, row_scale, blob, torch.bfloat16), int8.product_reference(x, weight))


@pytest.mark.parametrize("threads", [1, 2])
def test_groups_are_products_of_their_own(threads: int) -> None:
    torch.set_num_threads(threads)
    x, weight, bias = random(40, 70, dtype=torch.bfloat16), random(5, 37, 70, dtype=torch.bfloat16, seed=1), random(5, 37, seed=2)
    blobs, ends = torch.stack([int8.pack(each) for each in weight]), torch.tensor([3, 3, 20, 21, 39], dtype=torch.int32)
    for biases in (bias, None):
        actual = int8.grouped_product(fenced(x), blobs, 37, ends, biases)
        for e, (begin, end) in enumerate(((0, 3), (3, 3), (3, 20), (20, 21), (21, 39))):
            own = None if biases is None else biases[e]
            assert torch.equal(actual[begin:end], int8.product_reference(x[begin:end], weight[e], own))


def test_rows_are_read_back() -> None:
    weight = random(35, 50)
    ids, (quantized, scale) = torch.tensor([34, 0, 16, 0]), int8.quantize_reference(weight)
    assert torch.equal(int8.lookup(ids, int8.pack(weight), 50), (quantized.float() * scale.unsqueeze(1))[ids])


def test_nothing_is_written_beside_results() -> None:
    x, weight = random(6, 90), random(21, 90, seed=1)
    size = int8.packed_bytes(21, 90)
    around = torch.full((size + 2 * ALIGNMENT,), BESIDE, dtype=torch.uint8)
    start = -around.data_ptr() % ALIGNMENT
    int8.pack(weight, blob=around[start : start + size])
    assert (around[:start] == BESIDE).all() and (around[start + size :] == BESIDE).all()
    lib, out = load()[0], torch.full((8, 30), float(BESIDE))
    quantized, scale = int8.quantize(x)
    assert lib is not None
    lib.run(Operation.PRODUCT_INT8, int8.product_int8_args(quantized, scale, around[start : start + size], None, out[1:7, 4:25]))
    assert torch.equal(out[1:7, 4:25], int8.product_reference(x, weight))
    out[1:7, 4:25] = BESIDE
    assert (out == BESIDE).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scales_only", [False, True])
def test_a_norm_and_an_activation_that_quantize_have_the_bits_of_two_operations(scales_only: bool, dtype: torch.dtype) -> None:
    """Few rows, which threads share, and many; with strides, and a last vector that is not full."""
    lib = load()[0]
    assert lib is not None
    for count, width in ((1, 1300), (1, 17), (2, 70), (9, 70)):
        x, gates = fenced(random(count, width, dtype=dtype)), fenced(random(count, 2 * width, dtype=dtype, seed=1))
        weight = x[0].clone()
        normed, active = rows.rms_norm(x, weight, 1e-5), rows.activation(gates, ActivationKind.SILU_MUL)
        for threads in (1, 2):
            torch.set_num_threads(threads)
            out, scale = torch.empty(count, width, dtype=dtype), torch.full((count + 1,), float(BESIDE))
            numbers = int8.empty_rows(count + 1, width).fill_(BESIDE)
            quantize = int8.quantize_args(out, scale, None if scales_only else numbers, given=False)
            norm = rows.norm_args(x, out, weight, None, 1e-5, 0.0, NormKind.RMS_NORM, quantize=quantize)
            activation = rows.activation_args(gates, out, ActivationKind.SILU_MUL, quantize=quantize)
            for operation, arguments, expected in ((Operation.NORM, norm, normed), (Operation.ACTIVATION, activation, active)):
                lib.run(operation, arguments)
                wanted, wanted_scale = int8.quantize(expected)
                assert torch.equal(out, expected) and torch.equal(scale[:count], wanted_scale) and scale[count] == BESIDE
                assert scales_only or torch.equal(numbers[:count], wanted)
                assert (numbers[0 if scales_only else count :] == BESIDE).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [8, 21, 64])
def test_keys_and_values_become_int8_in_the_cache(dim: int, dtype: torch.dtype) -> None:
    """The bits of the specification: normed, rotated and rounded as for any cache, then quantized. Odd heads stay in theirs."""
    q, k, v = (random(9, heads * dim, dtype=dtype, seed=heads).view(9, heads, dim) for heads in (6, 3, 2))
    k, v = torch.cat((k, k[:, :1]), 1)[:, :2], v.clone()
    v[0], v[1, 0], v[2, 1, 3], v[3, 0, 5], v[4, 1, 0] = 0, 1e-31, torch.nan, -torch.inf, 3e38
    slots, angles = torch.tensor([5, 40, -1, 0, 47, 3, 2]), random(20, dim // 2, seed=9)
    norms = HeadNorms(random(dim, dtype=dtype, seed=3), random(dim, dtype=dtype, seed=4), 1e-6, 1.0)
    turn = Rotation(torch.tensor([3, 0, 19, 7, 7, 1, 12, 5, 4]), angles.cos(), angles.sin())
    for norm, rotation in ((None, None), (None, turn), (norms, turn)):
        caches, wanted = ([torch.full((48, 2, dim + SCALE_BYTES), BESIDE, dtype=torch.int8) for _ in "kv"] for _ in range(2))
        plain = [torch.zeros(48, 2, dim, dtype=dtype) for _ in "kv"]
        expected = qkv_heads.place_heads(q.clone(), k, v, plain[0], plain[1], slots, norm, rotation)
        for threads in (2, 1):
            torch.set_num_threads(threads)
            assert torch.equal(qkv_heads.place_heads(q.clone(), k, v, caches[0], caches[1], slots, norm, rotation), expected)
            written = slots[slots >= 0]
            qkv_heads.write_kv_reference(plain[0][written], plain[1][written], wanted[0], wanted[1], written)
            assert all(map(torch.equal, caches, wanted)), (norm, rotation)
    qkv_heads.write_kv(k, None, caches[0], None, slots)
    qkv_heads.write_kv_reference(k[: len(slots)], None, wanted[0], None, slots)
    assert all(map(torch.equal, caches, wanted))
