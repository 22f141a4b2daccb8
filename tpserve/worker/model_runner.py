"""Runs plans on this rank's stage: request pool, input batch, decoder layers, and on the last stage the sampler.

`launch` starts a plan and returns at once on an asynchronous device; the `PendingStep` it returns gives the result later. Every
rank launches plans in the order in which rank 0 sent them. No policy, no sockets.
"""

import torch

from tpserve.attention.metadata import ModelInput
from tpserve.attention.paged import KVCache
from tpserve.models.decoder import Decoder
from tpserve.parallel.mesh import Mesh
from tpserve.types.plan import StepPlan, StepResult
from tpserve.worker.input_batch import ChunkArrays, build_model_input
from tpserve.worker.request_pool import RequestPool
from tpserve.worker.sampler_stage import ModelOutput, SamplerStage


class PendingStep:
    """A launched plan. The last stage turns it into a StepResult; on other stages nothing waits for it."""

    def __init__(self, plan: StepPlan, device: torch.device, output: ModelOutput) -> None:
        """The caller has queued all work of the plan on `device`."""
        self.plan = plan
        self._output = output
        self._event: torch.Event | None = None
        if device.type == "cuda":
            self._event = torch.Event("cuda")
            self._event.record()

    def ready(self) -> bool:
        """Whether `wait` would return at once."""
        return self._event is None or self._event.query()

    def wait(self) -> StepResult:
        """Wait for the device and return the step's result."""
        if self._event is not None:
            self._event.synchronize()
        return self._output.result(self.plan)


class ModelRunner:
    """One rank's part of every plan: its stage's layers, and on the last stage the LM head and the sampler."""

    def __init__(self, mesh: Mesh, decoder: Decoder, request_pool: RequestPool, caches: list[KVCache]) -> None:
        self._mesh = mesh
        self._decoder = decoder
        self._request_pool = request_pool
        self._caches = caches
        self._sampler_stage = SamplerStage(decoder, request_pool, mesh.tp) if mesh.pipeline.last else None

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> PendingStep:
        """Start `plan`: receive the previous stage's activations, run the layers, then send to the next stage or sample."""
        self._request_pool.update(plan)
        chunks = ChunkArrays.of(plan)
        if plan.slots:
            hidden_TH = self._stage(build_model_input(chunks, self._request_pool))
        else:  # it only has orders for grammars
            hidden_TH = torch.empty(0, self._decoder.spec.hidden_size)
        if self._sampler_stage is None:
            if plan.slots:
                self._mesh.pipeline.send(hidden_TH)
            return PendingStep(plan, self._mesh.device, ModelOutput())
        return PendingStep(plan, self._mesh.device, self._sampler_stage.run(hidden_TH, plan, chunks))

    def _stage(self, step: ModelInput) -> torch.Tensor:
        """This stage's output, [T, hidden_size] in the model's dtype."""
        pipeline, hidden_TH = self._mesh.pipeline, None
        if not pipeline.first:
            rows, width = len(step.positions_T), self._decoder.spec.hidden_size
            hidden_TH = pipeline.receive(rows, width, self._decoder.dtype, self._mesh.device)
        hidden_TH = self._decoder.forward(step, hidden_TH, self._caches)
        if self._decoder.expert_load is not None:
            self._decoder.expert_load.publish()
        return hidden_TH
