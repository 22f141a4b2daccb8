"""The engine on a card, against the CPU path: one rank, two ranks over gloo sharing the card, NCCL by itself and on two cards.

Real torchrun ranks and real HTTP, so pyzmq, msgspec, aiohttp, uvloop and tokenizers must be installed beside torch and triton.
float32, so that the same tokens are expected.
"""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

SERVER_NEEDS = ("zmq", "aiohttp", "tokenizers", "msgspec", "uvloop")
QUESTIONS: list[dict[str, Any]] = [
    {"prompt": "Once upon a time", "max_tokens": 40, "temperature": 0},
    {"prompt": "The lighthouse " * 60, "max_tokens": 20, "temperature": 0},
    {"prompt": "One day", "max_tokens": 30, "temperature": 0.8, "seed": 5, "n": 2},
]
missing = [name for name in SERVER_NEEDS if importlib.util.find_spec(name) is None]


def answers(flags: list[str], ranks: int, log: Path) -> list[list[list[int]]]:
    """Token ids of every choice of every question from a server of its own."""
    from tests.server import free_port, running, torchrun

    port = free_port()
    with running([torchrun("--dtype", "float32", *flags, ranks=ranks, port=port)], port, log) as server:
        result = []
        for question in QUESTIONS:
            status, body = server.post("/v1/completions", {**question, "return_token_ids": True})
            assert status == 200, body
            result.append([choice["token_ids"] for choice in body["choices"]])
        return result


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory: pytest.TempPathFactory) -> list[list[list[int]]]:
    return answers(["--device", "cpu"], 1, tmp_path_factory.mktemp("cpu") / "log")


@pytest.mark.skipif(bool(missing), reason=f"the server needs {', '.join(missing)}")
@pytest.mark.parametrize(
    ("flags", "ranks"),
    [([], 1), (["-tp", "2", "--all-reduce", "gloo"], 2), (["-pp", "2", "--all-reduce", "gloo"], 2)],
    ids=["1 rank", "2 tensor-parallel ranks over gloo", "2 stages over gloo"],
)
def test_the_card_says_what_the_cpu_says(flags: list[str], ranks: int, on_cpu: list[list[list[int]]], tmp_path: Path) -> None:
    assert answers(["--device", "cuda", *flags], ranks, tmp_path / "log") == on_cpu


@pytest.mark.skipif(bool(missing), reason=f"the server needs {', '.join(missing)}")
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL joins ranks on different cards only")
@pytest.mark.parametrize("flags", [["-tp", "2"], ["-pp", "2"]], ids=" ".join)
def test_two_cards_over_nccl(flags: list[str], on_cpu: list[list[list[int]]], tmp_path: Path) -> None:
    assert answers(["--device", "cuda", "--all-reduce", "nccl", *flags], 2, tmp_path / "log") == on_cpu


def test_nccl_with_one_rank() -> None:
    """NCCL itself, by the calls that `Group` makes. (A `Group` of one rank makes none.)"""
    from tpserve.parallel.store import host_store

    store, _ = host_store()
    dist.init_process_group("nccl", store=store, rank=0, world_size=1)
    try:
        assert dist.get_backend() == "nccl"
        x = torch.arange(8.0, device="cuda")
        gathered = torch.zeros(1, 8, device="cuda")
        dist.all_gather(list(gathered.unbind(0)), x)
        dist.all_reduce(x)
        smallest = torch.tensor([7], device="cuda")
        dist.all_reduce(smallest, op=dist.ReduceOp.MIN)
        assert x.tolist() == gathered[0].tolist() == list(map(float, range(8))) and int(smallest) == 7
    finally:
        dist.destroy_process_group()


def test_a_launch_does_not_wait_for_the_card() -> None:
    """The next plan can be launched while this one runs: on the card a launch returns long before its result is there."""
    from tests.specs import small
    from tpserve.models.decoder import Decoder
    from tpserve.parallel.group import Group
    from tpserve.parallel.mesh import Mesh
    from tpserve.parallel.pipeline import Pipeline
    from tpserve.scheduling.scheduler import Scheduler
    from tpserve.scheduling.scheduler_config import SchedulerConfig
    from tpserve.types.layout import ParallelLayout
    from tpserve.types.packed import pack
    from tpserve.types.request import Request
    from tpserve.types.sampling import EngineSamplingParams
    from tpserve.weights.dummy import dummy
    from tpserve.worker.memory import allocate
    from tpserve.worker.model_runner import ModelRunner
    from tpserve.worker.request_pool import RequestPool

    spec = small(
        vocab_size=32000, hidden_size=2048, intermediate_size=8192, num_layers=8, num_heads=16, num_kv_heads=4, head_dim=128,
        max_position=8192, tie_embeddings=True, dtype="bfloat16",
    )  # fmt: skip
    limits = SchedulerConfig(
        max_num_seqs=4, max_num_batched_tokens=8192, max_model_len=8192, num_blocks=1024, block_size=16, depth=2,
        sync_sampling=False,
        eos_ids=(),
    )  # fmt: skip
    device, layout = torch.device("cuda", 0), ParallelLayout(1, 1, (8,))
    mesh = Mesh(0, layout, Group(), Group(), Pipeline(), device)
    decoder = Decoder(spec, layout, 0, Group(), torch.bfloat16, device, 8192)
    dummy(decoder.parameters())
    request_pool = RequestPool(4, 8192, 16, (None,), device, eos_ids=(), vocab_size=spec.vocab_size)
    model_runner = ModelRunner(mesh, decoder, request_pool, allocate(decoder, mesh, 1024, 16))
    scheduler = Scheduler(limits)
    for warm_up in (True, False):
        scheduler.add(Request(int(warm_up), pack([7] * 8000), EngineSamplingParams(max_tokens=4, temperature=0.5), seed=1), 0.0)
        waited = 0
        while not scheduler.idle:
            plans = [plan for _ in range(2) if (plan := scheduler.schedule(0.0)) is not None]
            launched = [model_runner.launch(plan) for plan in plans]
            waited += not launched[0].ready()
            for pending in launched:
                scheduler.apply(pending.wait(), 0.0)
        assert warm_up or waited, "a prefill of 8,000 tokens was over before its launch returned"


def test_a_full_card_is_one_sentence() -> None:
    from tests.specs import small
    from tpserve.cli.server_flags import parse
    from tpserve.config.resolve import resolve
    from tpserve.errors import UserError
    from tpserve.parallel.group import Group
    from tpserve.parallel.mesh import Mesh
    from tpserve.parallel.pipeline import Pipeline
    from tpserve.types.layout import ParallelLayout
    from tpserve.types.machine import Machine
    from tpserve.types.model_files import ModelFiles
    from tpserve.worker.memory import room_for

    spec, device = small(), torch.device("cuda", 0)
    config = resolve(parse(["m", "--device", "cuda"]), ModelFiles("m", "m"), spec, Machine(1, 1, 1, 1, 2, "serve"))
    mesh = Mesh(0, ParallelLayout(1, 1, (4,)), Group(), Group(), Pipeline(), device)
    room = room_for("trying", mesh, spec, config, 1)
    with pytest.raises(UserError, match="GPU 0 ran out of memory while trying: .* GiB in all"), room:
        torch.empty(1 << 50, dtype=torch.uint8, device=device)
