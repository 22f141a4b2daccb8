"""The CPU's row operations on each instruction set of the processor: against plain torch, a row alone and in company, one thread
and two, rows of any width and stride, nothing written beside a row."""

import mmap
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch

from tpserve.parallel.shm import SLOT_BYTES, ShmAllReduce
from tpserve.sampler import draw
from tpserve_kernels.cpu import gumbel, qkv_heads, rows
from tpserve_kernels.cpu.all_reduce import Reduction, all_reduce_args
from tpserve_kernels.cpu.library import Isa, Operation, calls_of, is_native, library, load
from tpserve_kernels.cpu.qkv_heads import HeadNorms, Rotation
from tpserve_kernels.cpu.rows import ActivationKind, NormKind

DTYPES = (torch.float32, torch.bfloat16)
WIDTHS = (1, 17, 31, 96, 2050)
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 8e-3}
BESIDE = 7.0
"""What memory beside a result holds."""
Op = Callable[[torch.Tensor], tuple[torch.Tensor, ...]]


@pytest.fixture(params=[isa.name.lower() for isa in Isa], autouse=True)
def _isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    threads = torch.get_num_threads()
    monkeypatch.setenv("TPSERVE_ISA", request.param)
    load.cache_clear()
    lib, reason = load()
    if lib is None or lib.isa.name.lower() != request.param:
        pytest.skip(reason or "not on this processor")
    yield
    monkeypatch.undo()
    load.cache_clear()
    load()
    torch.set_num_threads(threads)


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def strided(x: torch.Tensor) -> torch.Tensor:
    """The same numbers in rows that lie apart and begin anywhere."""
    wide = torch.full((len(x), x.shape[1] + 5), BESIDE, dtype=x.dtype)
    wide[:, 3:-2] = x
    return wide[:, 3:-2]


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, rtol=TOLERANCE[actual.dtype], atol=TOLERANCE[actual.dtype])


def assert_rows_stand_alone(op: Op, x: torch.Tensor) -> None:
    torch.set_num_threads(1)
    together = op(x)
    for threads, parts in ((1, ((0, 1), (1, 2), (len(x) - 1, len(x)), (1, 4), (2, 2))), (2, ((0, len(x)), (1, 4)))):
        torch.set_num_threads(threads)
        for begin, end in parts:
            for actual, expected in zip(op(strided(x[begin:end])), together, strict=True):
                assert torch.equal(actual, expected[begin:end]), (begin, end, threads)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_norms(width: int, dtype: torch.dtype) -> None:
    x = random(9, width, dtype=dtype) * 3
    weight, bias = random(width, dtype=dtype, seed=1), random(width, dtype=dtype, seed=2)
    for offset in (0.0, 1.0):
        assert_close(rows.rms_norm(x, weight, 1e-5, offset), rows.rms_norm_reference(x, weight, 1e-5, offset))
    for scale, shift in ((weight, bias), (weight, None), (None, None)):
        assert_close(rows.layer_norm(x, scale, shift, 1e-5), rows.layer_norm_reference(x, scale, shift, 1e-5))
    residual = random(9, width, dtype=dtype, seed=3)
    for add, alone in (
        (lambda x, y: rows.add_rms_norm(x, y, weight, 1e-5, 1.0), lambda x: rows.rms_norm(x, weight, 1e-5, 1.0)),
        (lambda x, y: rows.add_layer_norm(x, y, weight, bias, 1e-5), lambda x: rows.layer_norm(x, weight, bias, 1e-5)),
    ):
        out, total = add(x, strided(residual))
        assert torch.equal(total, x + residual)
        assert torch.equal(out, alone(total))
    assert_rows_stand_alone(lambda x: (rows.rms_norm(x, weight, 1e-5), rows.layer_norm(x, weight, bias, 1e-5)), x)


def test_norms_in_place() -> None:
    x, residual, weight = random(3, 33), random(3, 33, seed=1), random(33, seed=2)
    expected = rows.add_rms_norm(x, residual, weight, 1e-5)
    lib, wide, stream = library(), strided(x), strided(residual)
    assert lib is not None and wide._base is not None
    arguments = rows.norm_args(wide, wide, weight, None, 1e-5, 0.0, NormKind.RMS_NORM, stream, stream)
    arguments.rows = 2
    lib.run(Operation.NORM, arguments)
    assert torch.equal(wide[:2], expected[0][:2]) and torch.equal(stream[:2], expected[1][:2])
    assert torch.equal(wide[2], x[2]) and torch.equal(stream[2], residual[2]), "the third row was not asked for"
    assert (wide._base[:, :3] == BESIDE).all() and (wide._base[:, -2:] == BESIDE).all()


def test_extremes() -> None:
    x = torch.tensor([[0.0] * 5, [1e30] * 5, [3e-39] * 5, [float("nan"), 1, 2, 3, 4], [float("inf"), 1, 2, 3, 4]])
    ones = torch.ones(5)
    torch.testing.assert_close(rows.rms_norm(x, ones, 1e-5), rows.rms_norm_reference(x, ones, 1e-5), equal_nan=True)
    edges = torch.tensor([[0.0, -0.0, 1e-30, -200.0, 200.0, 3e38, -3e38, float("inf"), float("nan"), -1e-3, 88.0, -89.0]])
    for kind in ActivationKind:
        got, expected = (form(edges, kind, 1.7, 7.0) for form in (rows.activation, rows.activation_reference))
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6, equal_nan=True)


def heads(num: int, width: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return random(7, num * width, dtype=dtype, seed=seed).view(7, num, width)


def rotation(frequencies: int, interleaved: bool = False) -> Rotation:
    angles = random(20, frequencies, seed=9) * 3
    return Rotation(torch.tensor([3, 0, 19, 7, 7, 1, 12]), angles.cos(), angles.sin(), interleaved)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("dim", "frequencies", "interleaved"), [(16, 8, False), (80, 40, False), (62, 31, True), (48, 9, False)])
def test_rotation_has_the_bits_of_the_reference(dim: int, frequencies: int, interleaved: bool, dtype: torch.dtype) -> None:
    turn = rotation(frequencies, interleaved)
    packed = heads(5, dim, dtype)
    for q, k in ((packed[:, :3], packed[:, 3:4]), (packed[:, 3:, : 2 * frequencies], packed[:, :1, : 2 * frequencies])):
        for actual, expected in zip(qkv_heads.rotate(q, k, turn), qkv_heads.rotate_reference(q, k, turn), strict=True):
            assert torch.equal(actual, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("q_heads", "kv_heads", "dim", "v_dim"), [(4, 2, 16, 16), (3, 1, 40, 24), (1, 1, 129, 1)])
def test_heads_are_normed_rotated_and_written(q_heads: int, kv_heads: int, dim: int, v_dim: int, dtype: torch.dtype) -> None:
    norms = HeadNorms(random(dim, dtype=dtype, seed=3), random(dim, dtype=dtype, seed=4), 1e-6, 1.0)
    width = (q_heads + kv_heads) * dim + kv_heads * v_dim
    packed = random(7, width, dtype=dtype)
    turn = rotation(dim // 2)
    slots = torch.tensor([5, 40, -1, 0, 47])  # two rows are padding

    def run(form: Callable[..., torch.Tensor], taken: slice, **options: object) -> tuple[torch.Tensor, ...]:
        wide = strided(packed[taken])
        q, k, v = wide.split((q_heads * dim, kv_heads * dim, kv_heads * v_dim), dim=1)
        caches = [torch.full((48, kv_heads, each), BESIDE, dtype=dtype) for each in (dim, v_dim)]
        parts = (x.view(len(wide), -1, each) for x, each in ((q, dim), (k, dim), (v, v_dim)))
        q_out = form(*parts, *caches, slots[taken], **options)
        assert torch.equal(k, packed[taken, q_heads * dim : -kv_heads * v_dim]), "only queries change in place"
        return q_out, *caches

    for options in ({}, {"norms": norms}, {"rotation": turn}, {"norms": norms, "rotation": turn}):
        part = slice(0, 7)
        actual, expected = run(qkv_heads.place_heads, part, **options), run(qkv_heads.place_heads_reference, part, **options)
        for got, wanted in zip(actual, expected, strict=True):
            if "norms" in options:
                assert_close(got, wanted)
            else:
                assert torch.equal(got, wanted)
        torch.set_num_threads(2)
        assert all(map(torch.equal, run(qkv_heads.place_heads, part, **options), actual))
        torch.set_num_threads(1)
    for row, slot in ((1, 40), (4, 47), (3, 0)):
        here = turn._replace(positions_T=turn.positions_T[row : row + 1])
        q, k_cache, v_cache = run(qkv_heads.place_heads, slice(row, row + 1), norms=norms, rotation=here)
        assert torch.equal(q[0], actual[0][row]) and torch.equal(k_cache[slot], actual[1][slot])
        assert torch.equal(v_cache[slot], actual[2][slot])
    # The fused form is the same as one step after the other.
    normed = [rows.rms_norm(x.reshape(-1, dim), w, 1e-6, 1.0) for x, w in ((packed[:, : q_heads * dim], norms.q_D),)]
    turned, _ = qkv_heads.rotate(normed[0].view(7, q_heads, dim), normed[0].view(7, q_heads, dim), turn)
    assert torch.equal(turned, actual[0])


def test_latents_have_keys_only() -> None:
    keys, slots = random(4, 1, 48, dtype=torch.bfloat16), torch.tensor([3, 0, 1])
    cache = torch.full((5, 1, 48), BESIDE, dtype=torch.bfloat16)
    qkv_heads.write_kv(keys, None, cache, None, slots)
    assert torch.equal(cache[slots], keys[:3]) and (cache[[2, 4]] == BESIDE).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ActivationKind)
def test_activations(kind: ActivationKind, dtype: torch.dtype) -> None:
    gated = 2 if kind <= ActivationKind.CLAMPED_SWIGLU else 1
    activation = partial(rows.activation, kind=kind, alpha=1.702, limit=2.5)
    for width in WIDTHS:
        x = random(5, gated * width, dtype=dtype, seed=width) * 3
        assert_close(activation(strided(x)), rows.activation_reference(x, kind, 1.702, 2.5))
        assert torch.equal(activation(x[3:4]), activation(x)[3:4])
    assert_rows_stand_alone(lambda x: (activation(x),), x)


def test_gelu_is_near_the_exact_one() -> None:
    x = torch.linspace(-8, 8, 40_001)[None]
    exact = torch.nn.functional.gelu(x.double())
    assert (rows.activation(x, ActivationKind.GELU).double() - exact).abs().div_(x.abs().clamp(min=1)).max() < 3e-7


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("size", "width"), [(2, 31), (3, 2050), (2, SLOT_BYTES // 8 + 1)])
def test_a_sum_over_ranks_inside_a_list_of_calls(size: int, width: int, dtype: torch.dtype) -> None:
    """Threads of this process are the ranks. The list goes on where it stopped for a late peer, and no call of it runs twice."""
    lib, num_rows = library(), 5
    assert lib is not None
    parts = [random(num_rows, width, dtype=dtype, seed=rank) * 30.0**rank for rank in range(size)]
    residual, weight = random(num_rows, width, dtype=dtype, seed=8), random(width, dtype=dtype, seed=9)
    total = parts[0]
    for x in parts[1:]:
        total = total + x
    normed, stream = rows.add_rms_norm(total, residual, weight, 1e-5)
    expected = {"sum": total, "stream": stream, "out": rows.activation(normed, ActivationKind.SILU)}
    memory = mmap.mmap(-1, mmap.PAGESIZE + 2 * size * SLOT_BYTES)
    results: dict[int, dict[str, torch.Tensor]] = {}
    stopped = threading.Event()

    def rank_main(rank: int, threads: int) -> None:
        torch.set_num_threads(threads)
        page = ShmAllReduce(memory, range(size), rank, [-1] * size, spins=False)
        assert page.all_gather(torch.ones(1)).shape == (size, 1), "what Python does on the page may come between"
        x, sum_TH, out_TH = parts[rank].clone(), residual.clone(), torch.empty_like(total)
        norm = rows.norm_args(x, out_TH, weight, None, 1e-5, 0.0, NormKind.RMS_NORM, sum_TH, sum_TH)
        reduce = all_reduce_args(page.page, x, norm)
        silu = rows.activation_args(out_TH, out_TH, ActivationKind.SILU)
        calls = calls_of((Operation.ALL_REDUCE, reduce), (Operation.ACTIVATION, silu))

        def wait() -> None:
            stopped.set()
            page.watch()

        if rank == 1:
            assert stopped.wait(20)
        lib.run_calls(calls, wait)
        results[rank] = {"sum": x, "stream": sum_TH, "out": out_TH}
        assert torch.equal(page.all_reduce(parts[rank].clone()), total)

    for threads in (1, 2):
        ranks = [threading.Thread(target=rank_main, args=(rank, threads), daemon=True) for rank in range(size)]
        memory[:] = bytes(len(memory))
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join(20)
        assert len(results) == size
        for result in results.values():
            for name, x in result.items():
                assert torch.equal(x, expected[name]), (name, threads)
        results.clear()
        stopped.clear()


@pytest.mark.parametrize(("size", "count"), [(2, 1), (3, 4099), (2, SLOT_BYTES // 4 + 5)])
def test_integers_over_ranks(size: int, count: int) -> None:
    """Sums, and the maximum of scales by their bits: NaN is above all."""
    lib, generator = library(), torch.Generator().manual_seed(count)
    assert lib is not None
    parts = [torch.randint(-(2**29), 2**29, (1, count), generator=generator, dtype=torch.int32) for _ in range(size)]
    scales = [part.abs().float() for part in parts]
    scales[1][0, count // 2] = torch.nan
    total, most = torch.stack(parts).sum(0), torch.stack(scales).amax(0)
    memory = mmap.mmap(-1, mmap.PAGESIZE + 2 * size * SLOT_BYTES)
    results: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def rank_main(rank: int) -> None:
        torch.set_num_threads(1 + rank % 2)
        page = ShmAllReduce(memory, range(size), rank, [-1] * size, spins=False)
        x, scale = parts[rank].clone(), scales[rank].clone()
        add = all_reduce_args(page.page, x)
        largest = all_reduce_args(page.page, scale.view(torch.int32), reduction=Reduction.MAX)
        lib.run_calls(calls_of((Operation.ALL_REDUCE, add), (Operation.ALL_REDUCE, largest)), page.watch)
        results.append((x, scale, page.all_reduce(parts[rank].clone())))

    ranks = [threading.Thread(target=rank_main, args=(rank,), daemon=True) for rank in range(size)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(20)
    assert len(results) == size
    for x, scale, again in results:
        assert torch.equal(x, total) and torch.equal(again, total)
        torch.testing.assert_close(scale, most, rtol=0, atol=0, equal_nan=True)


def test_a_peer_that_is_late_with_every_part_of_a_tensor() -> None:
    """The peer is the torch form: both sides keep one protocol."""
    size = SLOT_BYTES // 4 * 2 + 99
    parts = [random(size, seed=rank) for rank in range(2)]
    memory = mmap.mmap(-1, mmap.PAGESIZE + 4 * SLOT_BYTES)
    pages = [ShmAllReduce(memory, range(2), rank, [-1, -1], spins=False) for rank in range(2)]
    sums: list[torch.Tensor] = []

    def late() -> None:
        for part_N in pages[1]._parts(parts[1]):
            time.sleep(0.02)
            sums.append(torch.add(*pages[1]._exchange(part_N).parts))

    peer = threading.Thread(target=late, daemon=True)
    peer.start()
    total = pages[0].all_reduce(parts[0].clone())
    peer.join(20)
    assert torch.equal(total, parts[0] + parts[1]) and torch.equal(torch.cat(sums), total) and len(sums) == 3


def test_gumbel_noise_is_that_of_torch() -> None:
    """All but the last bit of it, for each id; the words of Philox must be equal for that."""
    ids = torch.cat((torch.arange(100_000), torch.tensor([2**32 - 1])))
    one, zero = torch.ones(len(ids)), torch.zeros(len(ids), 1)
    for seed, position, choice, level in ((0, 0, 0, 0), (-1, 1, 1, 1), (2**63 - 1, 99_999, 2, 0), (-(2**63) + 12345, 7, 3, 1)):
        params = draw.DrawParams(one, torch.full_like(ids, seed), torch.full_like(ids, position), torch.full_like(ids, choice))
        got, _ = gumbel.gumbel_max(zero, None, one, params.counters, 0, ids, level)
        expected = draw.gumbel(ids[:, None], *params.counters, level)[:, 0]
        assert ((got - expected).abs() <= 4e-15 * expected.abs().clamp(min=1)).all()


@pytest.mark.parametrize("count", [1, 3, 128, 391])
def test_the_best_with_gumbel_noise_is_that_of_torch(count: int) -> None:
    """Index and, but for the last bits, value; the same bits on two threads and for a row alone."""
    rows = 33
    x, sums = torch.randn(rows, count + 2)[:, 1:-1], torch.rand(rows, count, dtype=torch.float64) + 1e-9
    x[3], sums[:, -1] = -torch.inf, 0
    temperature = torch.tensor([0.0, 0.3, 1.0, 1e-30])[torch.arange(rows) % 4]
    params = draw.DrawParams(temperature, torch.arange(rows) << 31, torch.arange(rows), torch.arange(rows) % 3)
    for of_sums, first_S in ((sums, None), (None, torch.arange(rows) * 128)):
        value, index = gumbel.gumbel_max(x, of_sums, temperature, params.counters, 256, first_S, 1)
        reference = draw.gumbel_max_reference(x, of_sums, params, 256, first_S, 1)
        torch.testing.assert_close(value, reference[0], rtol=1e-14, atol=1e-14)
        assert torch.equal(index, reference[1])
        torch.set_num_threads(2)
        again = gumbel.gumbel_max(x, of_sums, temperature, params.counters, 256, first_S, 1)
        torch.set_num_threads(1)
        assert torch.equal(again[0], value) and torch.equal(again[1], index)
        of_row, (row_sums, row_first) = slice(7, 8), (None if each is None else each[7:8] for each in (of_sums, first_S))
        counters = params.seed_S[of_row], params.position_S[of_row], params.choice_S[of_row]
        got = gumbel.gumbel_max(x[of_row], row_sums, temperature[of_row], counters, 256, row_first, 1)
        assert torch.equal(got[0], value[7:8]) and torch.equal(got[1], index[7:8])


def test_what_is_outside_the_contract_is_refused() -> None:
    x, table = random(4, 8), random(9, 4)
    head = x.view(4, 1, 8)
    far = Rotation(torch.zeros(4, dtype=torch.int32), table, table)
    refused: list[Callable[[], object]] = [
        lambda: rows.rms_norm(x, x[0, :7].clone(), 1e-5),
        lambda: rows.rms_norm(x, x[0].bfloat16(), 1e-5),
        lambda: rows.add_rms_norm(x, x[:3], x[0], 1e-5),
        lambda: rows.activation(x[:, :7], ActivationKind.SILU_MUL),
        lambda: qkv_heads.rotate(head, head, far),
        lambda: qkv_heads.rotate(head, head, Rotation(torch.zeros(3, dtype=torch.int64), table, table)),
        lambda: qkv_heads.rotate(head[..., :6], head, Rotation(torch.zeros(4, dtype=torch.int64), table, table)),
        lambda: qkv_heads.write_kv(head, head, head.bfloat16(), head, torch.zeros(4, dtype=torch.int64)),
        lambda: qkv_heads.write_kv(head, head, head, head, torch.zeros(4, dtype=torch.int32)),
        lambda: qkv_heads.write_kv(head, head, head.char(), head.char(), torch.zeros(4, dtype=torch.int64)),
    ]
    for call in refused:
        with pytest.raises(AssertionError):
            call()
    assert not is_native(x.half()) and is_native(x) and not is_native(x.to("meta"))
