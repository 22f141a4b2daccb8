"""The compilations that a server of a model needs: all of them before it is ready, and for three generations of cards."""

import pytest
import torch

from tests.card.compilation import SHARED_BYTES, compiled, hold
from tests.card.engine import CARD, CardEngine, history
from tests.card.models import MODELS
from tests.card.simulated import SimulatedCard
from tests.card.variants import Variant
from tpserve.cli.server_flags import parse
from tpserve.config.resolve import resolve
from tpserve.models.decoder import Decoder
from tpserve.parallel.group import Group
from tpserve.parallel.mesh import Mesh
from tpserve.parallel.pipeline import Pipeline
from tpserve.types.layout import ParallelLayout
from tpserve.types.machine import Machine
from tpserve.types.model_files import ModelFiles
from tpserve.types.model_spec import ModelSpec
from tpserve.worker.memory import _ProfileRun
from tpserve.worker.request_pool import RequestPool

MAX_LEN, MAX_SEQS, MAX_TOKENS = 4096, 4, 512


def at_start(spec: ModelSpec) -> set[Variant]:
    """What the profile run and the graphs need, both before the server is ready."""
    flags = ["m", "--max-model-len", str(MAX_LEN), "--max-num-seqs", str(MAX_SEQS), "--max-num-batched-tokens", str(MAX_TOKENS)]
    config = resolve(parse(flags), ModelFiles("m", "m"), spec, Machine(1, 1, 1, 1, 2, "serve"))
    layout = ParallelLayout(1, 1, (spec.num_layers,))
    with SimulatedCard(computes=False) as card:
        decoder = Decoder(spec, layout, 0, Group(), torch.bfloat16, CARD, MAX_LEN)
        request_pool = RequestPool(MAX_SEQS, MAX_LEN, 16, spec.windows, CARD, eos_ids=(), vocab_size=spec.vocab_size)
        mesh = Mesh(0, layout, Group(), Group(), Pipeline(), CARD)
        profile_run = _ProfileRun(decoder, mesh, request_pool, config, MAX_TOKENS)
        profile_run.layers()
        profile_run.head()
        profile_run.graphs(card.capture).warm_up()
    return card.record.variants


def in_service(spec: ModelSpec) -> set[Variant]:
    """What requests of any kind need."""
    with SimulatedCard(computes=False) as card:
        engine = CardEngine(
            spec,
            card.capture,
            MAX_SEQS,
            num_blocks=2048,
            dtype=torch.bfloat16,
            max_len=MAX_LEN,
            max_num_batched_tokens=MAX_TOKENS,
        )
        history(engine, 3, 8)
    return card.record.variants


@pytest.mark.parametrize("name", ["llama-8b", "gpt-oss-20b", pytest.param("deepseek-v3", marks=pytest.mark.long)])
def test_nothing_is_compiled_in_service(name: str) -> None:
    spec = MODELS[name]
    late = in_service(spec) - at_start(spec)
    assert not late, "\n".join(map(str, sorted(late)))


@pytest.mark.long
@pytest.mark.parametrize("name", list(MODELS))
def test_all_compile_for_three_generations(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    kernels = compiled(*SHARED_BYTES, variants=at_start(MODELS[name]))
    with capsys.disabled():
        print(f"\n{name}")
        for kernel in kernels:
            print(f"  {kernel}")
    hold(kernels)
