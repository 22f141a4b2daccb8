"""Drives a Decoder, or a ModelRunner that scores prompts, over whole sequences: the caller says which chunks make a step.

`serve` is an engine without messages: a scheduler and a model runner in one process.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch

from tpserve.attention.metadata import AttentionMetadata, ModelInput
from tpserve.attention.paged import KVCache
from tpserve.config import model_config
from tpserve.config.flags import Quantization
from tpserve.models import model_spec, names_of
from tpserve.models.decoder import Decoder
from tpserve.models.whole_model import sources
from tpserve.parallel.group import Group
from tpserve.parallel.mesh import Mesh
from tpserve.parallel.pipeline import Pipeline
from tpserve.scheduling.scheduler import Scheduler
from tpserve.scheduling.scheduler_config import SchedulerConfig
from tpserve.types import plan
from tpserve.types.layout import ParallelLayout, even_layers
from tpserve.types.messages import EngineOutput
from tpserve.types.packed import pack
from tpserve.types.request import Request
from tpserve.types.sampling import EngineSamplingParams
from tpserve.types.window import first_block
from tpserve.weights.checkpoint import Checkpoint
from tpserve.weights.load import load
from tpserve.weights.unused_weights import unused_tensors
from tpserve.worker.grammars import CompiledGrammars
from tpserve.worker.memory import allocate
from tpserve.worker.model_runner import ModelRunner, PendingStep
from tpserve.worker.request_pool import RequestPool

BLOCK_SIZE = 16
Chunk = tuple[int, int, int]
"""(sequence, start, count)"""
Scores = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class Table(NamedTuple):
    """A cache group's block tables, [sequences, widest], and its window; `gone`: a block of NaN for what the window has left."""

    ids: torch.Tensor
    window: int | None
    gone: int

    def of(self, chunks: Sequence[Chunk]) -> torch.Tensor:
        """The rows of the chunks, as wide as their longest context."""
        rows = self.ids[[i for i, _, _ in chunks], : max(-(-(start + count) // BLOCK_SIZE) for _, start, count in chunks)].clone()
        for row, (_, start, _) in zip(rows, chunks, strict=True):
            row[: first_block(start, self.window, BLOCK_SIZE)] = self.gone
        return rows


class Runner:
    """One rank's stage with caches of its own. Every rank of a layout makes the same calls."""

    def __init__(self, decoder: Decoder, tp: Group, pipeline: Pipeline, num_layers: int) -> None:
        self._decoder = decoder
        self._tp = tp
        self._pipeline = pipeline
        self._num_layers = num_layers

    @staticmethod
    def load(
        directory: Path,
        tp_size: int,
        pp: int,
        rank: int,
        tp: Group,
        pipeline: Pipeline,
        dtype: torch.dtype,
        expert_parallel: bool = False,
        quantization: Quantization | None = None,
    ) -> "Runner":
        decoder, layout = load_decoder(directory, tp_size, pp, rank, tp, dtype, expert_parallel, quantization)
        return Runner(decoder, tp, pipeline, layout.layers[layout.stage_of(rank)])

    @torch.inference_mode()
    def run(self, sequences: Sequence[Sequence[int]], steps: Sequence[Sequence[Chunk]]) -> list[torch.Tensor]:
        """Logits of every position of every sequence, each [length, vocabulary]; empty tensors before the last stage."""
        decoder, widths = self._decoder, [-(-len(tokens) // BLOCK_SIZE) for tokens in sequences]
        windows, num_blocks = decoder.spec.windows, sum(widths)
        ids = torch.randperm(len(windows) * num_blocks + 1, generator=torch.Generator().manual_seed(1)).int()
        groups = [
            Table(torch.nn.utils.rnn.pad_sequence(list(own.split(widths)), batch_first=True), window, int(ids[-1]))
            for own, window in zip(ids[:-1].view(-1, num_blocks), windows, strict=True)
        ]
        caches = [decoder.kv_layout.empty(len(ids), BLOCK_SIZE, decoder.dtype, decoder.device) for _ in range(self._num_layers)]
        for side in chain.from_iterable((cache.k, cache.v) for cache in caches):
            side.fill_(-1 if side.dtype == torch.int8 else torch.nan)  # a scale of such bytes is NaN
        rows: list[list[torch.Tensor]] = [[] for _ in sequences]
        for chunks in steps:
            logits = self._step(sequences, chunks, groups, caches)
            if logits is not None:
                for (i, _, _), part in zip(chunks, logits.split([count for _, _, count in chunks]), strict=True):
                    rows[i].append(part)
        return [torch.cat(parts) if parts else torch.empty(0) for parts in rows]

    def _step(
        self, sequences: Sequence[Sequence[int]], chunks: Sequence[Chunk], groups: Sequence[Table], caches: list[KVCache]
    ) -> torch.Tensor | None:
        batch = step_batch(sequences, chunks, groups, self._decoder.device)
        hidden_TH = None
        if not self._pipeline.first:
            width = self._decoder.spec.hidden_size
            hidden_TH = self._pipeline.receive(len(batch.positions_T), width, self._decoder.dtype, self._decoder.device)
        hidden_TH = self._decoder.forward(batch, hidden_TH, caches)
        if not self._pipeline.last:
            self._pipeline.send(hidden_TH)
            return None
        logits_TV = self._decoder.logits(hidden_TH)
        widest = max(len(shard) for shard in self._decoder.vocab_shards)
        padded = torch.nn.functional.pad(logits_TV, (0, widest - logits_TV.shape[1]))
        shards = zip(self._tp.all_gather(padded), self._decoder.vocab_shards, strict=True)
        return torch.cat([part[:, : len(shard)] for part, shard in shards], dim=1)


def load_decoder(
    directory: Path,
    tp_size: int,
    pp: int,
    rank: int,
    tp: Group,
    dtype: torch.dtype,
    expert_parallel: bool = False,
    quantization: Quantization | None = None,
) -> tuple[Decoder, ParallelLayout]:
    """A rank's stage of the checkpoint."""
    spec = model_spec(model_config.read(directory), str(directory / "config.json"))
    layout = ParallelLayout(tp_size, pp, even_layers(spec.num_layers, pp), expert_parallel)
    decoder = Decoder(spec, layout, layout.stage_of(rank), tp, dtype, torch.device("cpu"), 400)
    checkpoint = Checkpoint.open(directory, names_of(spec))
    unused_tensors(sources(spec), checkpoint, spec.num_layers)  # raises where a layer has more than we use
    load(decoder.parameters(), checkpoint)
    decoder.prepack(quantization)
    return decoder, layout


class Scorer:
    """One rank's model runner, to score the sequences as prompts. Every rank of a layout makes the same calls."""

    def __init__(self, decoder: Decoder, mesh: Mesh, num_slots: int, max_len: int) -> None:
        self._widest = -(-max_len // BLOCK_SIZE)
        windows = decoder.spec.windows
        request_pool = RequestPool(
            num_slots, max_len, BLOCK_SIZE, windows, mesh.device, eos_ids=(), vocab_size=decoder.spec.vocab_size
        )
        self._num_groups = len(windows)
        caches = allocate(decoder, mesh, num_slots * self._num_groups * self._widest, BLOCK_SIZE)
        self._last, self._model_runner = mesh.pipeline.last, ModelRunner(mesh, decoder, request_pool, caches)

    def run(self, sequences: Sequence[Sequence[int]], steps: Sequence[Sequence[Chunk]], num_top: Sequence[int]) -> list[Scores]:
        """(chosen [length - 1], top ids [length - 1, n], top [length - 1, n]) of each sequence; empty before the last stage."""
        parts: list[list[plan.PromptLogprobs]] = [[] for _ in sequences]
        admitted: set[int] = set()
        for number, chunks in enumerate(steps):
            new = [self._admission(i, sequences[i], num_top[i]) for i, _, _ in chunks if i not in admitted]
            admitted.update(i for i, _, _ in chunks)
            scoring = [plan.Chunk(i, start, count, sample=False, score=True) for i, start, count in chunks]
            pending = self._model_runner.launch(plan.StepPlan.of(0, number, scoring, new))
            if self._last:
                for chunk, entries in pending.wait().prompt_logprobs:
                    parts[chunks[chunk][0]].append(entries)
        return [scores(entries, n) for entries, n in zip(parts, num_top, strict=True)]

    def _admission(self, i: int, tokens: Sequence[int], num_top: int) -> plan.NewSequence:
        """Sequence i in slot i, its blocks in each group from the far end of the pool."""
        firsts = [(i * self._num_groups + group) * self._widest for group in range(self._num_groups)]
        blocks = tuple(pack(reversed(range(first, first + self._widest))) for first in firsts)
        return plan.NewSequence(i, pack(tokens), len(tokens), EngineSamplingParams(prompt_logprobs=num_top), 0, 0, blocks)


class Served(NamedTuple):
    """What an engine did until it was idle."""

    outputs: list[EngineOutput]
    plans: list[plan.StepPlan]
    scheduler: Scheduler


def serve(
    decoder: Decoder,
    mesh: Mesh,
    requests: Sequence[Request],
    limits: SchedulerConfig,
    compiled: CompiledGrammars | None = None,
) -> Served:
    """Everything at once through a fresh engine; the order is that of rank 0's loop.

    The ranks of a stage make the same calls, each with a scheduler of its own, which decides alike.
    """
    sizes = (limits.max_num_seqs, limits.max_model_len, limits.block_size, limits.windows)
    vocab_size = decoder.spec.vocab_size
    request_pool = RequestPool(*sizes, mesh.device, eos_ids=limits.eos_ids, vocab_size=vocab_size, compiled=compiled)
    model_runner = ModelRunner(mesh, decoder, request_pool, allocate(decoder, mesh, limits.num_blocks, limits.block_size))
    served = Served([], [], Scheduler(limits))
    scheduler, launched = served.scheduler, deque[PendingStep]()
    for request in requests:
        scheduler.add(request, 0.0)
    while not scheduler.idle:
        while (step := scheduler.schedule(0.0)) is not None:
            served.plans.append(step)
            launched.append(model_runner.launch(step))
        scheduler.apply(launched.popleft().wait(), 0.0)
        served.outputs.extend(scheduler.take_outputs())
    return served


def scores(entries: Sequence[plan.PromptLogprobs], num_top: int) -> Scores:
    """The parts of one prompt as tensors."""

    def numbers(parts: Iterator[bytes], dtype: torch.dtype) -> torch.Tensor:
        data = bytearray(b"".join(parts))
        return torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)

    assert all(part.num_top == num_top for part in entries)
    chosen = numbers((part.chosen for part in entries), torch.float32)
    ids, top = numbers((p.top_ids for p in entries), torch.int32), numbers((p.top for p in entries), torch.float32)
    return chosen, ids.view(len(chosen), num_top), top.view(len(chosen), num_top)


def step_batch(
    sequences: Sequence[Sequence[int]], chunks: Sequence[Chunk], groups: Sequence[Table], device: torch.device
) -> ModelInput:
    """The tensors of a step, built the plain way."""
    tokens = list(chain.from_iterable(sequences[i][start : start + count] for i, start, count in chunks))
    positions = [(i, p) for i, start, count in chunks for p in range(start, start + count)]
    lens, ends = tuple(c for _, _, c in chunks), tuple(s + c for _, s, c in chunks)

    def batch(group: Table) -> AttentionMetadata:
        slots = [int(group.ids[i, p // BLOCK_SIZE]) * BLOCK_SIZE + p % BLOCK_SIZE for i, p in positions]
        rows = torch.arange(len(lens), device=device)
        return AttentionMetadata(
            query_starts=torch.tensor([0, *lens], device=device).cumsum(0).int(),
            context_lens=torch.tensor(ends, device=device).int(),
            tables=group.of(chunks).to(device),
            write_slots=torch.tensor(slots, device=device),
            query_lens_host=lens,
            context_lens_host=ends,
            window=group.window,
            table_rows=rows.int() if rows.is_cuda else None,
        )

    rows_T = torch.tensor([p for _, p in positions], device=device)
    return ModelInput(torch.tensor(tokens, device=device), rows_T, tuple(map(batch, groups)))


def whole(lengths: Sequence[int]) -> list[list[Chunk]]:
    """Each sequence alone, in one chunk."""
    return [[(i, 0, length)] for i, length in enumerate(lengths)]


def mixed(lengths: Sequence[int], prompts: Sequence[int], sizes: Sequence[int]) -> list[list[Chunk]]:
    """All sequences together: prompts cut to `sizes` in turn, then one position a step; later sequences join later."""
    at, steps = [0] * len(lengths), []
    cuts = cycle(sizes)
    for number in range(10_000):
        step = []
        for i in range(min(number + 1, len(lengths))):
            count = min(next(cuts), prompts[i] - at[i]) if at[i] < prompts[i] else min(1, lengths[i] - at[i])
            if count:
                step.append((i, at[i], count))
                at[i] += count
        if not step:
            return steps
        steps.append(step)
    raise AssertionError("a sequence does not end")


def cycle(sizes: Sequence[int]) -> Iterator[int]:
    """The sizes, over and over."""
    while True:
        yield from sizes
