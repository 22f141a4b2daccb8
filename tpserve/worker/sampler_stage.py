"""The last stage's end of a step: hidden states become logits, and those become tokens and log probabilities.

Owns the order of the collective calls, which is the same on all ranks of the stage: the scored rows in slices, then the
batches of `rows.sampled` in turn. Invariant: rows of logits stand side by side only as many as `LogitsChunking` allows. A
prompt token's
log probability comes the same way as a drawn token's, and has the same bits.
"""

from dataclasses import dataclass

import torch

from tpserve.models.decoder import Decoder
from tpserve.parallel.group import Group
from tpserve.sampler.draw import draw, gather_logits
from tpserve.sampler.filters import apply
from tpserve.sampler.logprobs import logprobs
from tpserve.types.packed import pack
from tpserve.types.plan import PromptLogprobs, StepPlan, StepResult, TokenLogprobs
from tpserve.worker.input_batch import ChunkTensors
from tpserve.worker.logits_chunking import LogitsChunking
from tpserve.worker.logits_rows import PromptLogprobsBatch, SampleBatch, prompt_logprobs_batch, sample_batches
from tpserve.worker.request_pool import RequestPool

LogprobTensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""chosen [S], top ids [S, n], top [S, n]"""


@dataclass(frozen=True)
class SamplerOutput:
    """What a batch drew, in host memory."""

    batch: SampleBatch
    tokens_S: torch.Tensor
    logprobs: LogprobTensors | None

    def entries(self) -> list[tuple[int, TokenLogprobs]]:
        """(chunk, logprobs) for the chunks that asked, each cut to the number it asked for."""
        if self.logprobs is None:
            return []
        chosen_S, ids_Sn, top_Sn = (x.tolist() for x in self.logprobs)
        return [
            (chunk, TokenLogprobs(chosen_S[i], tuple(ids_Sn[i][:n]), tuple(top_Sn[i][:n])))
            for i, (chunk, n) in enumerate(zip(self.batch.chunks, self.batch.num_logprobs, strict=True))
            if n is not None
        ]


@dataclass(frozen=True)
class PromptLogprobsOutput:
    """Log probabilities of the scored rows, in host memory; ids are int32."""

    batch: PromptLogprobsBatch
    logprobs: LogprobTensors

    def entries(self) -> list[tuple[int, PromptLogprobs]]:
        """(chunk, logprobs), each cut to the number it asked for."""
        parts = zip(*(x.split_with_sizes(self.batch.counts) for x in self.logprobs), strict=True)
        result = []
        for chunk, wanted, (chosen, ids, top) in zip(self.batch.chunks, self.batch.num_top, parts, strict=True):
            n = min(wanted, ids.shape[1])
            result.append((chunk, PromptLogprobs(n, _to_bytes(chosen), _to_bytes(ids[:, :n]), _to_bytes(top[:, :n]))))
        return result


@dataclass(frozen=True)
class ModelOutput:
    """What one step drew and scored; complete when the launch's event has passed."""

    drawn: tuple[SamplerOutput, ...] = ()
    scores: PromptLogprobsOutput | None = None

    def result(self, plan: StepPlan) -> StepResult:
        """In the form that is sent to rank 0."""
        tokens = [-1] * (len(plan.slots) // 4)
        for part in self.drawn:
            for chunk, token in zip(part.batch.chunks, part.tokens_S.tolist(), strict=True):
                tokens[chunk] = token
        entries = tuple(entry for part in self.drawn for entry in part.entries())
        return StepResult(plan.epoch, plan.step, pack(tokens), entries, tuple(self.scores.entries()) if self.scores else ())


class SamplerStage:
    """One rank's LM head and sampler."""

    def __init__(self, decoder: Decoder, request_pool: RequestPool, tp: Group) -> None:
        self._decoder = decoder
        self._request_pool = request_pool
        self._tp = tp
        self.logits_chunking = LogitsChunking.of(decoder.vocab_shards, request_pool.tokens.shape[1])

    def run(self, hidden_TH: torch.Tensor, plan: StepPlan, chunks: ChunkTensors) -> ModelOutput:
        """Queue all that the plan wants of the last stage's hidden states; drawn tokens go to the slots."""
        wanted = prompt_logprobs_batch(plan, chunks, self._request_pool)
        scores = None if wanted is None else self._score(hidden_TH, wanted)  # first: a draw writes the slots' tokens
        drawn = tuple(
            self._draw(hidden_TH, batch) for batch in sample_batches(plan, chunks, self._request_pool, self.logits_chunking)
        )
        return ModelOutput(drawn, scores)

    def _draw(self, hidden_TH: torch.Tensor, batch: SampleBatch) -> SamplerOutput:
        logits_SV = self._decoder.logits(hidden_TH[batch.rows])
        tokens_S = self._choose(logits_SV, batch)
        self._request_pool.tokens[batch.slots, batch.positions] = tokens_S.int()
        entries: LogprobTensors | None = None
        if batch.num_logprobs:
            most = max(n for n in batch.num_logprobs if n is not None)
            chosen_S, ids_Sn, top_Sn = logprobs(logits_SV, self._decoder.vocab_shards, tokens_S, most, self._tp)
            entries = _to_host(chosen_S), _to_host(ids_Sn), _to_host(top_Sn)
        return SamplerOutput(batch, _to_host(tokens_S), entries)

    def _choose(self, logits_SV: torch.Tensor, batch: SampleBatch) -> torch.Tensor:
        """The tokens; rows with filters are gathered whole, and every rank draws the same from them."""
        shards, tp = self._decoder.vocab_shards, self._tp
        if batch.filters is not None:
            logits_SV = gather_logits(logits_SV, shards, tp)
            tokens_SL = self._request_pool.tokens[batch.slots, : batch.filters.history]
            logits_SV = apply(logits_SV, batch.filters, batch.temperature, batch.positions, tokens_SL)
            shards, tp = (range(logits_SV.shape[1]),), Group()
        asked = (batch.temperature, batch.seed, batch.positions, batch.choice)
        return draw(logits_SV, shards, *asked, tp, all_greedy=batch.all_greedy)

    def _score(self, hidden_TH: torch.Tensor, batch: PromptLogprobsBatch) -> PromptLogprobsOutput:
        tokens_N = self._request_pool.tokens[batch.slots, batch.positions].long()
        shards, most = self._decoder.vocab_shards, max(batch.num_top)
        slices = []
        for at in range(0, len(tokens_N), self.logits_chunking.plain):
            here = slice(at, at + self.logits_chunking.plain)
            logits_SV = self._decoder.logits(hidden_TH[batch.rows[here]])
            slices.append(logprobs(logits_SV, shards, tokens_N[here], most, self._tp))
        chosen_N, ids_Nn, top_Nn = (torch.cat(parts) for parts in zip(*slices, strict=True))
        return PromptLogprobsOutput(batch, (_to_host(chosen_N), _to_host(ids_Nn.int()), _to_host(top_Nn)))


def _to_host(x: torch.Tensor) -> torch.Tensor:
    """Queue the copy right behind the draw: read later, it would wait for every plan launched since."""
    if not x.is_cuda:
        return x
    return torch.empty_like(x, device="cpu", pin_memory=True).copy_(x, non_blocking=True)


def _to_bytes(x: torch.Tensor) -> bytes:
    """A host tensor's numbers, row after row."""
    data = bytearray(x.nbytes)
    if data:
        torch.frombuffer(data, dtype=x.dtype).view(x.shape).copy_(x)
    return bytes(data)
