"""The shared page over real processes: the ordered sum bit for bit, long random runs, and deaths that are noticed."""

import gc
import os
import random
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.cluster.forked import run
from tpserve.errors import EngineFailure
from tpserve.parallel import shm
from tpserve.parallel.group import Group
from tpserve.parallel.shm import SLOT_BYTES, RankLocation, ShmAllReduce, create_shm_group, exchange_locations
from tpserve_kernels.cpu.library import library, load

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64)


FORMS = ("native", "torch", "mixed")
"""Which ranks use the library of CPU kernels: all, none, every other."""


def choose(form: str, rank: int) -> None:
    """In a rank's process."""
    if form == "native":
        assert library() is not None
    elif form == "torch" or rank % 2:
        os.environ["TPSERVE_ISA"] = "off"
        load.cache_clear()
        assert library() is None


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest) -> str:
    if request.param != "torch" and library() is None:
        pytest.skip("the library was not built")
    return str(request.param)


def page_of(where: Path, rank: int, size: int, cores: int = 2) -> ShmAllReduce:
    store = dist.FileStore(str(where / "store"), size)
    shm = create_shm_group(store, exchange_locations(store, rank, size, 20.0), range(size), rank, cores, 20.0)
    assert isinstance(shm, ShmAllReduce), shm
    return shm


def part(rank: int, shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """What a rank brings: every rank can make every rank's. Magnitudes differ, so that the order of a sum shows."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(100 * seed + rank)) * 30.0**rank
    return x.to(dtype)


def ordered_sum(parts: list[torch.Tensor]) -> torch.Tensor:
    total = parts[0]
    for x in parts[1:]:
        total = total + x
    return total


@pytest.mark.parametrize(
    ("size", "form"), [(2, "torch"), (2, "native"), (3, "mixed"), (4, "torch"), (4, "native")], indirect=["form"]
)
def test_the_ordered_sum_bit_for_bit(size: int, form: str, tmp_path: Path) -> None:
    over = SLOT_BYTES // 8 + 3
    shapes = [(1,), (7,), (3, 64), (0, 64), (33, 5), (2, 3, 4), (over,), (3, over)]

    def rank_main(rank: int) -> None:
        choose(form, rank)
        shm = page_of(tmp_path, rank, size)
        for dtype in DTYPES:
            for seed, shape in enumerate(shapes):
                parts = [part(i, shape, dtype, seed) for i in range(size)]
                gathered = shm.all_gather(parts[rank])
                assert torch.equal(gathered, torch.stack(parts))
                total = shm.all_reduce(parts[rank].clone())
                assert total.dtype == dtype
                assert torch.equal(total, ordered_sum(parts)), (dtype, shape)

    assert run(size, rank_main) == [0] * size


def test_parts_that_are_not_contiguous_and_inference_mode(tmp_path: Path) -> None:
    views: list[Callable[[torch.Tensor], torch.Tensor]] = [
        lambda x: x.t(), lambda x: x[:, 1:4], lambda x: x[::2], lambda x: x[:1].expand(4, -1), lambda x: x[2:]
    ]  # fmt: skip

    def rank_main(rank: int) -> None:
        shm = page_of(tmp_path, rank, 2)
        for mode in (True, False, True):
            with torch.inference_mode(mode):
                for view in views:
                    parts = [view(part(i, (6, 5), torch.bfloat16)) for i in range(2)]
                    assert torch.equal(shm.all_gather(parts[rank]), torch.stack(parts))
                    assert torch.equal(shm.all_reduce(view(part(rank, (6, 5), torch.bfloat16))), parts[0] + parts[1])

    assert run(2, rank_main) == [0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_bits_of_gloo(dtype: torch.dtype, tmp_path: Path) -> None:
    """A layout gives the same tokens whichever carries its sums."""

    def rank_main(rank: int) -> None:
        store = dist.FileStore(str(tmp_path / "gloo"), 3)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=3, timeout=timedelta(seconds=20))
        two, three = dist.new_group([0, 1]), dist.group.WORLD
        pages = {3: page_of(tmp_path, rank, 3)}
        handles = {3: three}
        if rank < 2:
            (tmp_path / "two").mkdir(exist_ok=True)
            pages[2], handles[2] = page_of(tmp_path / "two", rank, 2), two
        for size, page in pages.items():
            x = part(rank, (50, 33), dtype, size)
            plain, shared = Group(handles[size]), Group(handles[size], page)
            assert torch.equal(plain.all_reduce(x.clone()), shared.all_reduce(x.clone()))
            assert torch.equal(plain.all_gather(x), shared.all_gather(x))
        dist.barrier()

    assert run(3, rank_main) == [0, 0, 0]


@pytest.mark.parametrize(("size", "rounds"), [(2, 4_000), (3, 1_000)])
def test_many_rounds_of_random_sizes(size: int, rounds: int, form: str, tmp_path: Path) -> None:
    def rank_main(rank: int) -> None:
        choose(form, rank)
        shm = page_of(tmp_path, rank, size)
        common, own = random.Random(size), random.Random(100 + rank)
        for number in range(rounds):
            count = common.choice((1, 17, 1024, 4096, SLOT_BYTES // 4 if number % 50 == 0 else 2))
            dtype = common.choice((torch.float32, torch.bfloat16))
            if own.random() < 0.01:
                time.sleep(own.random() * 0.003)
            x = torch.full((count,), float(number % 50 + rank)).to(dtype)
            if common.random() < 0.7:
                assert (shm.all_reduce(x) == number % 50 * size + sum(range(size))).all()
            else:
                assert shm.all_gather(x)[:, -1].tolist() == [number % 50 + i for i in range(size)]

    assert run(size, rank_main) == [0] * size


@pytest.mark.parametrize("size", [2, 3])
def test_a_killed_peer_is_named_soon(size: int, form: str, tmp_path: Path) -> None:
    def rank_main(rank: int) -> None:
        choose(form, rank)
        shm = page_of(tmp_path, rank, size)
        for _ in range(100):
            shm.all_reduce(torch.ones(8))
        if rank == 1:
            time.sleep(0.2)
            (tmp_path / "died").write_text(str(time.monotonic()))
            os.kill(os.getpid(), signal.SIGKILL)
        with pytest.raises(EngineFailure, match="rank 1 has ended"):
            shm.all_reduce(torch.ones(8))
        assert time.monotonic() - float((tmp_path / "died").read_text()) < 0.5  # a busy machine; some milliseconds on an idle one

    expected = [0] * size
    expected[1] = -signal.SIGKILL
    assert run(size, rank_main) == expected


def test_the_last_round_of_a_rank_that_leaves_counts(form: str, tmp_path: Path) -> None:
    def rank_main(rank: int) -> None:
        choose(form, rank)
        shm = page_of(tmp_path, rank, 2)
        if rank == 0:
            time.sleep(0.2)  # rank 1 cannot have ended yet: it waits for this one
        assert shm.all_reduce(torch.ones(1)).item() == 2
        if rank == 0:
            time.sleep(0.1)
            with pytest.raises(EngineFailure, match="rank 1 has ended during a collective of rank 0"):
                shm.all_reduce(torch.ones(1))

    assert run(2, rank_main) == [0, 0]


def test_nothing_is_left_behind(tmp_path: Path) -> None:
    before = set(Path("/dev/shm").iterdir())

    def rank_main(rank: int) -> None:
        gc.collect()  # what earlier tests left for the collector must not be counted
        descriptors = len(list(Path("/proc/self/fd").iterdir()))
        shm = page_of(tmp_path, rank, 2)
        shm.all_reduce(torch.ones(1))
        assert "memfd:tpserve" in Path("/proc/self/maps").read_text()
        shm.all_reduce(torch.ones(1))  # nobody leaves before everybody has looked
        shm.close()
        shm.close()
        del shm
        gc.collect()
        assert "memfd:tpserve" not in Path("/proc/self/maps").read_text()
        assert len(list(Path("/proc/self/fd").iterdir())) == descriptors

    assert run(2, rank_main) == [0, 0]
    assert set(Path("/dev/shm").iterdir()) <= before


def test_all_get_the_same_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another host, a page that another process holds, and no memory: every rank hears why, and none waits."""
    (tmp_path / "reasons").mkdir()

    def refuse(*_: object) -> None:
        raise OSError("no room")

    def rank_main(rank: int) -> None:
        store = dist.FileStore(str(tmp_path / "store"), 3)
        places = exchange_locations(store, rank, 3, 20.0)
        gc.collect()  # as above
        descriptors = len(list(Path("/proc/self/fd").iterdir()))
        elsewhere = [*places[:2], RankLocation("another", 1)]
        reasons = [create_shm_group(dist.PrefixStore("a", store), elsewhere, range(3), rank, 2, 20.0)]
        wrong = [places[1], *places[1:]]  # rank 1 is taken for rank 0
        reasons.append(create_shm_group(dist.PrefixStore("b", store), wrong, range(3), rank, 2, 20.0))
        monkeypatch.setattr(shm, "_create", refuse)
        reasons.append(create_shm_group(dist.PrefixStore("c", store), places, range(3), rank, 2, 20.0))
        gc.collect()
        assert len(list(Path("/proc/self/fd").iterdir())) == descriptors
        (tmp_path / "reasons" / str(rank)).write_text("\n".join(map(str, reasons)))

    assert run(3, rank_main) == [0, 0, 0]
    first, *others = [path.read_text() for path in sorted((tmp_path / "reasons").iterdir())]
    assert others == [first, first]
    host, descriptor, memory = first.splitlines()
    assert host == "the ranks do not share a host"
    assert descriptor.startswith("rank 1: ")
    assert memory == "rank 0: no room"
