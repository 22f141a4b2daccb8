"""The engine on a card, against the CPU path: one rank, two ranks over gloo sharing the card, and NCCL by itself.

Real torchrun ranks and real HTTP, so pyzmq, msgspec, aiohttp, uvloop and tokenizers must be installed beside torch and triton.
float32, so that the same tokens are expected.
"""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

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
    [([], 1), (["-tp", "2"], 2), (["-pp", "2"], 2)],
    ids=["1 rank", "2 tensor-parallel ranks over gloo", "2 stages over gloo"],
)
def test_the_card_says_what_the_cpu_says(flags: list[str], ranks: int, on_cpu: list[list[list[int]]], tmp_path: Path) -> None:
    assert answers(["--device", "cuda", *flags], ranks, tmp_path / "log") == on_cpu


def test_nccl_with_one_rank() -> None:
    """NCCL itself: a group of one rank forms and sums on the card."""
    from tpserve.parallel import mesh
    from tpserve.parallel.group import Group

    store, _ = mesh.host_store()
    torch.distributed.init_process_group("nccl", store=store, rank=0, world_size=1)
    try:
        x = torch.arange(8.0, device="cuda")
        assert Group(torch.distributed.group.WORLD).all_gather(x).shape == (1, 8)
        torch.distributed.all_reduce(x)
        assert x.tolist() == list(map(float, range(8)))
    finally:
        torch.distributed.destroy_process_group()
