"""An engine of one rank on the simulated card: a scheduler and a model runner, step by step."""

import random
from collections import deque

import torch
import torch.distributed as dist

from tests.card.simulated import SimulatedCard
from tests.specs import small
from tpserve.models.decoder import Decoder
from tpserve.parallel.group import Group
from tpserve.parallel.mesh import Mesh
from tpserve.parallel.pipeline import Pipeline
from tpserve.scheduling.scheduler import Scheduler
from tpserve.scheduling.scheduler_config import SchedulerConfig
from tpserve.types.layout import ParallelLayout
from tpserve.types.messages import EngineOutput
from tpserve.types.model_spec import CacheGroup, ModelSpec
from tpserve.types.packed import pack
from tpserve.types.plan import StepPlan, StepResult
from tpserve.types.request import Request
from tpserve.types.sampling import EngineSamplingParams
from tpserve.weights.dummy import dummy
from tpserve.worker.decode_graphs import Capture
from tpserve.worker.memory import allocate
from tpserve.worker.model_runner import ModelRunner, PendingStep
from tpserve.worker.request_pool import RequestPool

CARD = torch.device("cuda", 0)
TINY = small(
    vocab_size=300, hidden_size=32, intermediate_size=32, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=16,
    cache=(CacheGroup((0,), window=20), CacheGroup((1,))),
)  # fmt: skip


class CardEngine:
    """Runs requests on the card. With little memory, so that sequences are preempted."""

    def __init__(
        self,
        spec: ModelSpec = TINY,
        capture: Capture | None = None,
        max_num_seqs: int = 4,
        num_blocks: int = 16,
        dtype: torch.dtype = torch.float32,
        mesh: Mesh | None = None,
        max_len: int = 64,
        max_num_batched_tokens: int = 24,
    ) -> None:
        layout = ParallelLayout(1, 1, (spec.num_layers,)) if mesh is None else mesh.layout
        mesh = mesh or Mesh(0, layout, Group(), Group(), Pipeline(), CARD)
        self._mesh = mesh
        decoder = Decoder(spec, layout, layout.stage_of(mesh.rank), mesh.tp, dtype, CARD, max_len)
        if SimulatedCard.current is not None and SimulatedCard.current.computes:
            dummy(decoder.parameters())
        limits = SchedulerConfig(
            max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens, max_model_len=max_len,
            num_blocks=num_blocks, block_size=16, depth=2, sync_sampling=layout.pp > 1, eos_ids=(), windows=spec.windows,
        )  # fmt: skip
        request_pool = RequestPool(max_num_seqs, max_len, 16, spec.windows, CARD, eos_ids=(), vocab_size=spec.vocab_size)
        caches = allocate(decoder, mesh, num_blocks, 16)
        self.runner = ModelRunner(mesh, decoder, request_pool, caches, capture)
        self.scheduler = Scheduler(limits)
        self.outputs: list[EngineOutput] = []
        self._launched: deque[PendingStep] = deque()

    def fill(self) -> list[StepPlan]:
        """Launch plans until none is left or enough are in flight."""
        plans = []
        while (plan := self.scheduler.schedule(0.0)) is not None:
            plans.append(plan)
            self._launched.append(self.runner.launch(plan))
        return plans

    def step(self) -> list[StepPlan]:
        """Launch what can be launched, and wait for the oldest."""
        plans = self.fill()
        if self._launched:
            self.scheduler.apply(self._result(self._launched.popleft()), 0.0)
        self.outputs.extend(self.scheduler.take_outputs())
        return plans

    def _result(self, step: PendingStep) -> StepResult:
        """With a pipeline every rank has a scheduler, and the last stage tells the result to all."""
        layout = self._mesh.layout
        if layout.pp == 1:
            return step.wait()
        results = [step.wait() if self._mesh.pipeline.last else None]
        dist.broadcast_object_list(results, src=layout.world_size - 1)
        assert results[0] is not None
        return results[0]


def random_request(number: int, rng: random.Random) -> Request:
    """With sampling parameters of any kind."""
    params = EngineSamplingParams(
        max_tokens=rng.randint(1, 10),
        temperature=rng.choice((0.0, 0.7, 1.5)),
        top_k=rng.choice((0, 0, 5)),
        top_p=rng.choice((1.0, 1.0, 0.8)),
        frequency_penalty=rng.choice((0.0, 0.0, 0.0, 0.5)),
        logprobs=rng.choice((None, None, None, 2)),
    )
    tokens = [rng.randrange(300) for _ in range(rng.randint(1, 18))]
    return Request(number, pack(tokens), params, seed=rng.getrandbits(64))


def history(engine: CardEngine, seed: int, num_requests: int) -> list[EngineOutput]:
    """What comes out when requests arrive, and some are aborted, at random times."""
    rng, number = random.Random(seed), 0
    for _ in range(10_000):
        while number < num_requests and rng.random() < 0.25:
            engine.scheduler.add(random_request(number, rng), 0.0)
            number += 1
        if number and rng.random() < 0.03:
            engine.scheduler.abort(rng.randrange(number), 0.0)
        engine.step()
        if number == num_requests and engine.scheduler.idle:
            return engine.outputs
    raise AssertionError("the requests do not end")
