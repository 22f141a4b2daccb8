"""What invariance costs on the CPU: whole steps of a small Llama in our form and in two free ones, in turn.

    OMP_NUM_THREADS=2 GOMP_SPINCOUNT=1000 python -m tests.parity.bench_numerics [--transformers]

The free form pads no rows and takes torch's own SiLU; the coarse one besides multiplies attention in bfloat16, which also
rounds scores and probabilities. `--transformers` measures that library in the same run on the same shape: the first decode
steps after a prefill, greedy, its default (sdpa) attention.
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from statistics import median
from types import SimpleNamespace
from unittest.mock import patch

import torch
import torch.nn.functional as F

from tpserve.attention import cpu_attention, cpu_plan, paged
from tpserve.attention.cpu_plan import TILE, KVChunk, TileGroup
from tpserve.layers import activation
from tpserve.models import decoder as decoders
from tpserve.models.decoder import Decoder
from tpserve.parallel.group import Group as Ranks
from tpserve.parallel.mesh import Mesh
from tpserve.parallel.pipeline import Pipeline
from tpserve.quant import matmul as products
from tpserve.scheduling.scheduler import Scheduler
from tpserve.scheduling.scheduler_config import SchedulerConfig
from tpserve.types.layout import ParallelLayout
from tpserve.types.model_spec import CacheGroup, ModelSpec, RopeSpec
from tpserve.types.packed import pack
from tpserve.types.request import Request
from tpserve.types.sampling import EngineSamplingParams
from tpserve.weights.dummy import dummy
from tpserve.worker.memory import allocate
from tpserve.worker.model_runner import ModelRunner
from tpserve.worker.request_pool import RequestPool

CONTEXT = 512
LAYERS = 12
SPEC = ModelSpec(
    family="llama",
    vocab_size=32000,
    hidden_size=768,
    intermediate_size=2048,
    num_layers=LAYERS,
    num_heads=12,
    num_kv_heads=4,
    head_dim=64,
    norm_eps=1e-5,
    rope=RopeSpec(),
    max_position=2048,
    tie_embeddings=True,
    qkv_bias=False,
    out_bias=False,
    mlp_bias=False,
    qk_norm=None,
    activation="silu",
    dtype="bfloat16",
    bos_id=None,
    eos_ids=(),
    cache=(CacheGroup(tuple(range(LAYERS))),),
)
SILU = SimpleNamespace(mul=activation.silu_mul)
"""What the decoder's layers call; theirs is chosen when they are built."""
LIMITS = SchedulerConfig(64, 2048, 2048, 4000, 16, 2, False, ())


def free_silu_mul(gate_up_TI2: torch.Tensor) -> torch.Tensor:
    gate_TI, up_TI = gate_up_TI2.chunk(2, dim=-1)
    return F.silu(gate_TI) * up_TI


def coarse_gather(cache_BSKD: torch.Tensor, chunk: KVChunk) -> torch.Tensor:
    picked_PXKD = cache_BSKD.flatten(0, 1).index_select(0, chunk.entries).view(-1, TILE, *cache_BSKD.shape[2:])
    return picked_PXKD.transpose(1, 2).contiguous().flatten(0, 1)


def coarse_tiles(
    q_nKMD: torch.Tensor, k_cache_BSKD: torch.Tensor, v_cache_BSKE: torch.Tensor, group: TileGroup, cap: float | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`cpu_attention._tiles` with products in the cache's dtype."""
    assert cap is None
    n, *heads, _ = q_nKMD.shape
    q_nKMD = q_nKMD.to(k_cache_BSKD.dtype)
    peak_PKM1, weight_PKM1 = (torch.empty((len(group.owners), *heads, 1)) for _ in range(2))
    out_PKME = torch.empty((len(group.owners), *heads, v_cache_BSKE.shape[3]))
    for chunk in group.chunks:
        q_pKMD = q_nKMD.expand(len(chunk.owners), -1, -1, -1) if n == 1 else q_nKMD[chunk.owners]
        product = torch.bmm(q_pKMD.flatten(0, 1), coarse_gather(k_cache_BSKD, chunk).transpose(1, 2))
        scores_pKMX = product.float().view(-1, *heads, TILE)
        if chunk.mask is not None:
            scores_pKMX += chunk.mask
        peak_PKM1[chunk.pairs] = scores_pKMX.amax(3, keepdim=True).clamp_min_(cpu_attention.LOWEST)
        scores_pKMX.sub_(peak_PKM1[chunk.pairs]).exp_()
        weight_PKM1[chunk.pairs] = scores_pKMX.sum(3, keepdim=True)
        product = torch.bmm(scores_pKMX.to(v_cache_BSKE.dtype).flatten(0, 1), coarse_gather(v_cache_BSKE, chunk))
        out_PKME[chunk.pairs] = product.view(-1, *heads, out_PKME.shape[3]).float()
    return peak_PKM1, weight_PKM1, out_PKME


@contextmanager
def free() -> Iterator[None]:
    """The model's fastest form of the same precision that promises nothing of rows."""
    with (
        patch.object(products, "pad_rows", lambda x: x),
        patch.object(decoders, "pad_rows", lambda x: x),
        patch.object(SILU, "mul", free_silu_mul),
        patch.object(cpu_attention, "ROW_UNIT", 1),
        patch.object(cpu_plan, "ROW_UNIT", 1),
    ):
        yield


@contextmanager
def coarse() -> Iterator[None]:
    """The same with less precision."""
    with free(), patch.object(paged, "is_native", lambda x: False), patch.object(cpu_attention, "_tiles", coarse_tiles):
        yield


@contextmanager
def ours() -> Iterator[None]:
    yield


FORMS = {"invariant": ours, "free": free, "coarse": coarse}


class Engine:
    """Scheduler and model runner in one process."""

    def __init__(self, num_seqs: int) -> None:
        self._scheduler = Scheduler(LIMITS)
        mesh = Mesh(0, LAYOUT, Ranks(), Ranks(), Pipeline(), torch.device("cpu"))
        request_pool = RequestPool(64, 2048, 16, (None,), mesh.device, eos_ids=(), vocab_size=SPEC.vocab_size)
        self._model_runner = ModelRunner(mesh, DECODER, request_pool, allocate(DECODER, mesh, LIMITS.num_blocks, 16))
        for i in range(num_seqs):
            prompt = pack([5 + (i + 7 * k) % 30000 for k in range(CONTEXT)])
            self._scheduler.add(Request(i, prompt, EngineSamplingParams(temperature=0.0, max_tokens=1000), seed=i), 0.0)

    def step(self) -> int:
        """Run one plan, give its tokens."""
        plan = self._scheduler.schedule(0.0)
        assert plan is not None
        self._scheduler.apply(self._model_runner.launch(plan).wait(), 0.0)
        self._scheduler.take_outputs()
        return plan.num_tokens()

    def prefill(self, num_seqs: int) -> None:
        done = 0
        while done < num_seqs * CONTEXT:
            done += self.step()


LAYOUT = ParallelLayout(1, 1, (LAYERS,))
with patch.dict(activation.GATED_ACTIVATIONS, silu=lambda gate_up_TI2: SILU.mul(gate_up_TI2)):
    DECODER = Decoder(SPEC, LAYOUT, 0, Ranks(), torch.bfloat16, torch.device("cpu"), 2048)


def timed(work: Callable[[], object]) -> float:
    """Seconds; of one thread its own processor time, which a neighbour on the core does not lengthen."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    begin = clock()
    work()
    return clock() - begin


def measure_ours() -> None:
    spent: dict[str, list[float]] = {form: [] for form in FORMS}
    for _ in range(8):
        for form, entered in FORMS.items():
            with entered():
                spent[form].append(timed(lambda: Engine(1).prefill(1)))
    say("prefill of 512, tok/s", {form: CONTEXT / median(times[1:]) for form, times in spent.items()})
    for num_seqs in (1, 16, 32):
        engine = Engine(num_seqs)
        engine.prefill(num_seqs)
        spent = {form: [] for form in FORMS}
        for _ in range(25):
            for form, entered in FORMS.items():
                with entered():
                    spent[form].append(timed(engine.step))
        say(f"decode of {num_seqs} at 512, ms", {form: 1e3 * median(times[3:]) for form, times in spent.items()})


def measure_transformers() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=SPEC.vocab_size,
        hidden_size=SPEC.hidden_size,
        intermediate_size=SPEC.intermediate_size,
        num_hidden_layers=LAYERS,
        num_attention_heads=SPEC.num_heads,
        num_key_value_heads=SPEC.num_kv_heads,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    for num_seqs in (1, 16, 32):
        ids = torch.randint(5, 30000, (num_seqs, CONTEXT))
        if num_seqs == 1:
            times = [timed(partial(model, ids, use_cache=True, logits_to_keep=1)) for _ in range(6)]
            say("prefill of 512, tok/s", {"transformers": CONTEXT / median(times[1:])})
        cache = model(ids, use_cache=True, logits_to_keep=1).past_key_values
        times = [timed(partial(model, ids[:, :1], past_key_values=cache, use_cache=True)) for _ in range(14)]
        say(f"decode of {num_seqs} at 512, ms", {"transformers": 1e3 * median(times[3:])})


def say(what: str, figures: dict[str, float]) -> None:
    print(f"{what:24s}", "   ".join(f"{name} {figure:8.2f}" for name, figure in figures.items()), flush=True)


if __name__ == "__main__":
    dummy(DECODER.parameters())
    DECODER.prepack()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    with torch.inference_mode():
        measure_ours()
        if "--transformers" in sys.argv:
            measure_transformers()
