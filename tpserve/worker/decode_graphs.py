"""Decode steps as CUDA graphs: a step whose chunks are one row each is one copy to the card and one launch.

A graph has a fixed number of rows, its bucket; a smaller step is padded with rows that no slot has, which write nowhere. It reads
its integers and sampling parameters from one packet on the card, applies the edits of the request pool, runs the layers, and on
the last stage draws every row as if it had no filters. Rows with filters, grammars or logprobs are then drawn again from the
logits, outside the graph.

The ranks of a stage have the same plans, so they capture the same graphs in the same order.
"""

from array import array
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass

import torch

from tpserve.attention.paged import KVCache
from tpserve.models.decoder import Decoder
from tpserve.sampler.draw import DrawParams
from tpserve.types.plan import StepPlan
from tpserve.worker.device_input import model_input, step_integers
from tpserve.worker.input_batch import ChunkArrays
from tpserve.worker.packet import Packet
from tpserve.worker.request_pool import RequestPool
from tpserve.worker.sampler_stage import SamplerStage
from tpserve.worker.sizing import MAX_GRAPH_ROWS

Capture = Callable[[Callable[[], None]], Callable[[], None]]
"""Records the launches of a function that it calls, and returns what replays them."""
PACKET_COPIES = 4
"""Pinned buffers of a packet. With as many plans in flight, a send waits for the copy of an earlier one."""


def buckets_up_to(max_num_seqs: int) -> list[int]:
    """The numbers of rows of the graphs, ascending: the step from one to the next is at most a half from 8 on."""
    sizes = [1, 2, 4, 8]
    while sizes[-1] < MAX_GRAPH_ROWS:
        power = 1 << (sizes[-1].bit_length() - 1)
        sizes.append(power * 3 // 2 if sizes[-1] == power else power * 2)
    most = min(max_num_seqs, MAX_GRAPH_ROWS)
    return [size for size in sizes if size < most] + [most]


@dataclass(frozen=True)
class GraphOutput:
    """What a replay leaves, until the next one."""

    hidden_BH: torch.Tensor
    """The residual stream"""
    logits_BV: torch.Tensor | None
    """What the LM head gave, of this rank's vocabulary, on the last stage"""
    drawn_B: torch.Tensor | None
    """The tokens, on the last stage"""


@dataclass(frozen=True)
class _Graph:
    packet: Packet
    replay: Callable[[], None]
    outputs: list[GraphOutput]
    """The last one is that of the graph."""


class DecodeGraphs:
    """The graphs of one rank's stage over the same caches, request pool and groups."""

    def __init__(
        self,
        decoder: Decoder,
        request_pool: RequestPool,
        caches: list[KVCache],
        sampler_stage: SamplerStage | None,
        capture: Capture,
        *,
        first_stage: bool,
    ) -> None:
        """`sampler_stage`: None before the last stage."""
        self._decoder, self._request_pool, self._caches = decoder, request_pool, caches
        self._sampler_stage = sampler_stage
        self._capture = capture
        self.buckets = buckets_up_to(len(request_pool.params))
        most, hidden, device = self.buckets[-1], decoder.spec.hidden_size, request_pool.tokens.device
        self._hidden_BH = None if first_stage else torch.zeros(most, hidden, dtype=decoder.dtype, device=device)
        vocab = 0 if sampler_stage is None else len(sampler_stage.vocab)
        self._logits_BV = torch.empty(most, vocab, dtype=decoder.dtype, device=device)
        """Shared by the graphs: each would keep its own."""
        self._graphs: dict[int, _Graph] = {}

    def serves(self, plan: StepPlan, chunks: ChunkArrays) -> bool:
        """Whether a graph can run this plan, which `request_pool.update` has applied."""
        rows = len(chunks.slots)
        if not 0 < rows <= self.buckets[-1] or chunks.num_rows != rows or not all(plan.sample):
            return False
        return not plan.score and not plan.redraw and len(self._request_pool.edits) <= self._max_edits(self._bucket(rows))

    def run(self, chunks: ChunkArrays, hidden_RH: torch.Tensor | None) -> GraphOutput:
        """Queue a plan that `serves`. `hidden_RH`: the output of the previous stage."""
        graph = self._graph(self._bucket(len(chunks.slots)))
        if self._hidden_BH is not None and hidden_RH is not None:
            self._hidden_BH[: len(hidden_RH)].copy_(hidden_RH)
        graph.packet.send(self._arrays(chunks))
        graph.replay()
        return graph.outputs[-1]

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Capture all graphs, the largest first, whose memory the others share."""
        for bucket in reversed(self.buckets):
            self._graph(bucket)

    def _bucket(self, rows: int) -> int:
        return self.buckets[bisect_left(self.buckets, rows)]

    def _max_edits(self, bucket: int) -> int:
        """A new block in each group, and an input id, for each row."""
        return bucket * (len(self._request_pool.windows) + 1)

    def _arrays(self, chunks: ChunkArrays) -> "list[array[int] | array[float]]":
        """The packet of a plan."""
        pool, slots = self._request_pool, chunks.slots
        arrays: list[array[int] | array[float]] = []
        arrays.extend(step_integers(chunks, pool))
        arrays.append(array("q", [pool.seed[slot] for slot in slots]))
        arrays.append(array("q", chunks.ends))
        arrays.append(array("q", [pool.choice[slot] for slot in slots]))
        arrays.append(array("f", [pool.params[slot].temperature for slot in slots]))
        return arrays

    def _packet(self, bucket: int) -> Packet:
        """Where the arrays of `_arrays` go, with what padding has."""
        none, zeros = array("i", [-1]), array("i", [0])
        edits, query_starts = self._max_edits(bucket), array("i", range(bucket + 1))
        padding: list[array[int] | array[float]] = []
        padding.extend([none * bucket, zeros * bucket, query_starts, zeros * bucket, zeros * bucket])
        padding.extend([none * edits, zeros * edits, zeros * edits])
        padding.extend([array("q", [0]) * bucket] * 3)
        padding.append(array("f", [0]) * bucket)
        return Packet(padding, PACKET_COPIES, self._request_pool.tokens.device)

    def _graph(self, bucket: int) -> _Graph:
        if bucket not in self._graphs:
            packet = self._packet(bucket)
            packet.send([])  # padding alone: the capture may run the step, which then changes nothing
            outputs: list[GraphOutput] = []
            replay = self._capture(lambda: outputs.append(self._step(packet, bucket)))
            del outputs[:-1]  # what a run before the capture left
            self._graphs[bucket] = _Graph(packet, replay, outputs)
        return self._graphs[bucket]

    def _step(self, packet: Packet, bucket: int) -> GraphOutput:
        """What is captured."""
        *integers, seed_B, position_B, choice_B, temperature_B = packet.on_device
        longest = self._request_pool.tokens.shape[1] - 1
        step = model_input(integers, self._request_pool, (1,) * bucket, (longest,) * bucket)
        hidden_BH = None if self._hidden_BH is None else self._hidden_BH[:bucket]
        hidden_BH = self._decoder.forward(step, hidden_BH, self._caches)
        if self._sampler_stage is None:
            return GraphOutput(hidden_BH, None, None)
        params, logits_BV = DrawParams(temperature_B, seed_B, position_B, choice_B), self._logits_BV[:bucket]
        return GraphOutput(hidden_BH, logits_BV, self._sampler_stage.draw_all(hidden_BH, params, integers[0], logits_BV))


class CudaCapture:
    """`Capture` on a card. Its graphs share one pool of memory."""

    def __init__(self) -> None:
        self._graphs: list[torch.cuda.CUDAGraph] = []

    def __call__(self, work: Callable[[], None]) -> Callable[[], None]:
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            work()  # kernels are compiled, and libraries make their buffers, before the capture
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # The errors of other threads, which read device memory beside the capture, are not this one's.
        pool = self._graphs[0].pool() if self._graphs else None
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            work()
        self._graphs.append(graph)
        return graph.replay
