"""Runs plans on this rank's stage: slots, batch, model, sampler. No policy, no sockets.

`launch` starts a plan and returns at once where the device is asynchronous; a `Pending` is what it will have drawn.
Plans are launched in the order in which rank 0 sent them, on every rank.
"""

from dataclasses import dataclass

import torch

from tpserve.attention.batch import StepBatch
from tpserve.attention.paged import KVCache
from tpserve.models.decoder import Decoder
from tpserve.parallel.group import Group
from tpserve.parallel.mesh import Mesh
from tpserve.sampler.draw import draw, gather
from tpserve.sampler.filters import apply
from tpserve.sampler.logprobs import logprobs
from tpserve.types.packed import pack
from tpserve.types.plan import StepPlan, StepResult, TokenLogprobs
from tpserve.worker.batch import Part, SampleBatch, build
from tpserve.worker.slots import Slots


@dataclass(frozen=True)
class Drawn:
    """What the sampler left for one step, in host memory; complete when the launch's event has passed."""

    tokens_S: torch.Tensor
    logprobs: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None
    """chosen [S], top ids [S, n], top [S, n]"""


class Pending:
    """A launched plan. On the sampling stage it becomes a StepResult; on other stages nothing waits for it."""

    def __init__(
        self, plan: StepPlan, device: torch.device, samples: SampleBatch | None = None, drawn: Drawn | None = None
    ) -> None:
        """Everything of the plan has been queued on `device`."""
        self.plan = plan
        self._samples = samples
        self._drawn = drawn
        self._event: torch.Event | None = None
        if device.type == "cuda":
            self._event = torch.Event("cuda")
            self._event.record()

    def ready(self) -> bool:
        """Whether `wait` would return at once."""
        return self._event is None or self._event.query()

    def wait(self) -> StepResult:
        """Wait for the device and give the step's result."""
        if self._event is not None:
            self._event.synchronize()
        tokens = [-1] * (len(self.plan.slots) // 4)
        if self._samples is None or self._drawn is None:
            return StepResult(self.plan.epoch, self.plan.step, pack(tokens))
        chunks = self._samples.chunks.tolist()
        for chunk, token in zip(chunks, self._drawn.tokens_S.tolist(), strict=True):
            tokens[chunk] = token
        return StepResult(self.plan.epoch, self.plan.step, pack(tokens), _entries(self._samples, self._drawn))


def _entries(samples: SampleBatch, drawn: Drawn) -> tuple[tuple[int, TokenLogprobs], ...]:
    """(chunk, logprobs) for the chunks that asked, each cut to the number it asked for."""
    if drawn.logprobs is None:
        return ()
    chosen_S, ids_Sn, top_Sn = (x.tolist() for x in drawn.logprobs)
    return tuple(
        (chunk, TokenLogprobs(chosen_S[i], tuple(ids_Sn[i][:n]), tuple(top_Sn[i][:n])))
        for i, (chunk, n) in enumerate(zip(samples.chunks.tolist(), samples.num_logprobs, strict=True))
        if n is not None
    )


class Executor:
    """One rank's part of every plan: its layers, and on the last stage the draw."""

    def __init__(self, mesh: Mesh, decoder: Decoder, slots: Slots, caches: list[KVCache]) -> None:
        self._mesh = mesh
        self._decoder = decoder
        self._slots = slots
        self._caches = caches

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> Pending:
        """Start `plan`: receive the previous stage's activations, compute, hand on or draw."""
        self._slots.update(plan)
        step, samples = build(plan, self._slots)
        hidden_TH = self._stage(step)
        if not self._mesh.pipeline.last:
            self._mesh.pipeline.send(hidden_TH)
        drawn = None
        if self._mesh.pipeline.last and samples is not None:
            drawn = self._draw(hidden_TH[step.sample_rows_S], samples)
        return Pending(plan, self._mesh.device, samples, drawn)

    def _stage(self, step: StepBatch) -> torch.Tensor:
        pipeline, hidden_TH = self._mesh.pipeline, None
        if not pipeline.first:
            rows, width = len(step.positions_T), self._decoder.spec.hidden_size
            hidden_TH = pipeline.receive(rows, width, self._decoder.dtype, self._mesh.device)
        return self._decoder.forward(step, hidden_TH, self._caches)

    def _draw(self, hidden_SH: torch.Tensor, samples: SampleBatch) -> Drawn:
        logits_SV = self._decoder.logits(hidden_SH)
        shards, tp = self._decoder.vocab_shards, self._mesh.tp
        if samples.parts:
            tokens_S = torch.empty_like(samples.positions)
            for part in samples.parts:
                tokens_S[part.rows] = self._draw_part(logits_SV, samples, part)
        else:
            asked = (samples.temperature, samples.seed, samples.positions, samples.choice)
            tokens_S = draw(logits_SV, shards, *asked, tp, all_greedy=samples.all_greedy)
        self._slots.tokens[samples.slots, samples.positions] = tokens_S.int()
        entries: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
        if samples.num_logprobs:
            most = max(n for n in samples.num_logprobs if n is not None)
            chosen_S, ids_Sn, top_Sn = logprobs(logits_SV, shards, tokens_S, most, tp)
            entries = _to_host(chosen_S), _to_host(ids_Sn), _to_host(top_Sn)
        return Drawn(_to_host(tokens_S), entries)

    def _draw_part(self, logits_SV: torch.Tensor, samples: SampleBatch, part: Part) -> torch.Tensor:
        """The tokens of some of the rows; those with filters are gathered whole, and every rank draws the same from them."""
        shards, tp, filters = self._decoder.vocab_shards, self._mesh.tp, part.filters
        logits_RV = logits_SV[part.rows]
        columns = (samples.temperature, samples.seed, samples.positions, samples.choice)
        temperature_R, seed_R, position_R, choice_R = (column[part.rows] for column in columns)
        if filters is not None:
            logits_RV = gather(logits_RV, shards, tp)
            tokens_RL = self._slots.tokens[samples.slots[part.rows], : filters.history]
            logits_RV = apply(logits_RV, filters, temperature_R, position_R, tokens_RL)
            shards, tp = (range(logits_RV.shape[1]),), Group()
        return draw(logits_RV, shards, temperature_R, seed_R, position_R, choice_R, tp, all_greedy=part.all_greedy)


def _to_host(x: torch.Tensor) -> torch.Tensor:
    """Queue the copy right behind the draw: read later, it would wait for every plan launched since."""
    if not x.is_cuda:
        return x
    return torch.empty_like(x, device="cpu", pin_memory=True).copy_(x, non_blocking=True)
