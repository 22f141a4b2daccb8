"""Runs plans on this rank's stage: request pool, input batch, decoder layers, and on the last stage the sampler.

`launch` starts a plan and returns at once on an asynchronous device; the `PendingStep` it returns gives the result later. Every
rank launches plans in the order in which rank 0 sent them. No policy, no sockets.
"""

import torch

from tpserve.attention.paged import KVCache
from tpserve.models.decoder import Decoder
from tpserve.parallel.mesh import Mesh
from tpserve.types.plan import StepPlan, StepResult
from tpserve.worker import device_input
from tpserve.worker.decode_graphs import Capture, DecodeGraphs
from tpserve.worker.input_batch import ChunkArrays
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

    def __init__(
        self,
        mesh: Mesh,
        decoder: Decoder,
        request_pool: RequestPool,
        caches: list[KVCache],
        capture: Capture | None = None,
        graphs: DecodeGraphs | None = None,
    ) -> None:
        """`capture`: makes the graphs of decode steps, on a card; None: every step is eager.

        `graphs`: those of an earlier epoch, which have the same decoder, request pool and caches, and no collective.
        """
        self._mesh = mesh
        self._decoder = decoder
        self._request_pool = request_pool
        self._caches = caches
        self._sampler_stage = SamplerStage(decoder, request_pool, mesh.tp) if mesh.pipeline.last else None
        self.graphs = graphs
        if capture is not None and graphs is None:
            first = mesh.pipeline.first
            self.graphs = DecodeGraphs(decoder, request_pool, caches, self._sampler_stage, capture, first_stage=first)

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> PendingStep:
        """Start `plan`: receive the previous stage's activations, run the layers, then send to the next stage or sample."""
        self._request_pool.update(plan)
        chunks = ChunkArrays.of(plan)
        graphed = self.graphs is not None and self.graphs.serves(plan, chunks)
        output = self._replay(plan, chunks) if graphed else self._run(plan, chunks)
        if self._decoder.expert_load is not None and plan.slots:
            self._decoder.expert_load.publish()
        return PendingStep(plan, self._mesh.device, output)

    def _run(self, plan: StepPlan, chunks: ChunkArrays) -> ModelOutput:
        """Queue a plan launch by launch."""
        if plan.slots:
            step = device_input.build(chunks, self._request_pool)
            hidden_TH = self._decoder.forward(step, self._receive(len(step.positions_T)), self._caches)
        else:  # it only has orders for grammars
            hidden_TH = torch.empty(0, self._decoder.spec.hidden_size)
        if self._sampler_stage is not None:
            return self._sampler_stage.run(hidden_TH, plan, chunks)
        if plan.slots:
            self._mesh.pipeline.send(hidden_TH)
        return ModelOutput()

    def _replay(self, plan: StepPlan, chunks: ChunkArrays) -> ModelOutput:
        """Queue a plan as a graph."""
        assert self.graphs is not None
        rows = len(chunks.slots)
        graph = self.graphs.run(chunks, self._receive(rows))
        if graph.logits_BV is not None and graph.drawn_B is not None and self._sampler_stage is not None:
            return self._sampler_stage.finish(graph.logits_BV, graph.drawn_B, plan, chunks)
        self._mesh.pipeline.send(graph.hidden_BH[:rows].clone())  # the next replay overwrites it
        return ModelOutput()

    def _receive(self, rows: int) -> torch.Tensor | None:
        """The previous stage's output, [rows, hidden_size] in the model's dtype; None on the first."""
        pipeline = self._mesh.pipeline
        if pipeline.first:
            return None
        return pipeline.receive(rows, self._decoder.spec.hidden_size, self._decoder.dtype, self._mesh.device)
