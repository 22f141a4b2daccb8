"""The end of a step on the last stage: hidden states to logits, logits to tokens and logprobs.

Owns the order of the collectives, which is equal on all ranks of the stage: first the rows to score in slices, then each batch of
`redraw_batches`, then each of `sample_batches`. Invariant: `LogitsChunking` bounds the rows of logits in memory at any time. A
prompt token's logprob takes the same path as a sampled token's and has the same bits; so does a token that is drawn again.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter

import torch

from tpserve.models.decoder import Decoder
from tpserve.parallel.group import Group
from tpserve.sampler.draw import DrawParams, draw_rows, gather_logits
from tpserve.sampler.filters import apply
from tpserve.sampler.logits import CardLogits, Logits, WrittenLogits
from tpserve.sampler.logprobs import logprobs
from tpserve.types.packed import pack
from tpserve.types.plan import PromptLogprobs, StepPlan, StepResult, TokenLogprobs
from tpserve.worker.grammars import GrammarDraw, GrammarState, SlotGrammar
from tpserve.worker.host_arrays import to_device
from tpserve.worker.input_batch import ChunkArrays
from tpserve.worker.logits_chunking import LogitsChunking
from tpserve.worker.logits_rows import (
    PromptLogprobsBatch,
    SampleBatch,
    prompt_logprobs_batch,
    redraw_batches,
    rows_left,
    sample_batches,
)
from tpserve.worker.request_pool import RequestPool
from tpserve_kernels.sampler_types import DrawTarget, RawLogits

GrammarRow = tuple[int, SlotGrammar, GrammarDraw]
"""(chunk index, grammar, token) of a sequence with a grammar."""
COMPILE_WAIT_S = 0.005
LogprobTensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""(logprob of the token [S] float32, ids of the top tokens [S, n], their logprobs [S, n] float32)"""


@dataclass(frozen=True)
class SamplerOutput:
    """The sampled tokens [S] of a batch and their logprobs, in host memory."""

    batch: SampleBatch
    tokens_S: torch.Tensor
    logprobs: LogprobTensors | None
    draws: tuple[GrammarRow, ...]

    def entries(self) -> list[tuple[int, TokenLogprobs]]:
        """(chunk index, logprobs) for requests with logprobs, each with its own number of top tokens."""
        if self.logprobs is None:
            return []
        chosen_S, ids_Sn, top_Sn = (x.tolist() for x in self.logprobs)
        return [
            (chunk, TokenLogprobs(chosen_S[i], tuple(ids_Sn[i][:n]), tuple(top_Sn[i][:n])))
            for i, (chunk, n) in enumerate(zip(self.batch.chunks, self.batch.num_logprobs, strict=True))
            if n is not None
        ]

    def grammar_ends(self) -> list[tuple[int, str]]:
        """(chunk index, error) of the tokens that end their grammar."""
        for _, grammar, _ in self.draws:
            grammar.follow()
        return [(chunk, draw.end) for chunk, _, draw in self.draws if draw.end is not None]


@dataclass(frozen=True)
class PromptLogprobsOutput:
    """Prompt logprobs of the scored rows, in host memory; ids are int32."""

    batch: PromptLogprobsBatch
    logprobs: LogprobTensors

    def entries(self) -> list[tuple[int, PromptLogprobs]]:
        """(chunk index, prompt logprobs), each with its own number of top tokens."""
        parts = zip(*(x.split_with_sizes(self.batch.counts) for x in self.logprobs), strict=True)
        result = []
        for chunk, num_top, (chosen, ids, top) in zip(self.batch.chunks, self.batch.num_top, parts, strict=True):
            n = min(num_top, ids.shape[1])
            result.append((chunk, PromptLogprobs(n, _to_bytes(chosen), _to_bytes(ids[:, :n]), _to_bytes(top[:, :n]))))
        return result


@dataclass(frozen=True)
class ModelOutput:
    """What one step sampled and scored; complete when the event of the launch has passed."""

    sampled: tuple[SamplerOutput, ...] = ()
    scores: PromptLogprobsOutput | None = None
    redrawn: tuple[tuple[SampleBatch, torch.Tensor], ...] = ()
    """Known tokens that were drawn again, [S] of each batch, in host memory."""
    compiled: Callable[[], tuple[tuple[int, str], ...]] = tuple
    """`StepResult.compiled`."""
    drawn: torch.Tensor | None = None
    """A graph's token of each chunk, in host memory. `sampled` has what is to be taken in their place."""

    def result(self, plan: StepPlan) -> StepResult:
        """The message for rank 0."""
        tokens = [-1] * (len(plan.slots) // 4) if self.drawn is None else self.drawn.tolist()
        for part in self.sampled:
            for chunk, token in zip(part.batch.chunks, part.tokens_S.tolist(), strict=True):
                tokens[chunk] = token
        entries = tuple(entry for part in self.sampled for entry in part.entries())
        return StepResult(
            plan.epoch,
            plan.step,
            pack(tokens),
            entries,
            tuple(self.scores.entries()) if self.scores else (),
            tuple(entry for part in self.sampled for entry in part.grammar_ends()),
            self.compiled(),
            self._redrawn(),
        )

    def _redrawn(self) -> tuple[tuple[int, bytes], ...]:
        """`StepResult.redrawn`."""
        drawn: list[tuple[int, int, int]] = []
        for batch, on_host_S in self.redrawn:
            drawn.extend(zip(batch.chunks, batch.positions, on_host_S.tolist(), strict=True))
        drawn.sort()
        return tuple((chunk, pack(token for _, _, token in rows)) for chunk, rows in groupby(drawn, key=itemgetter(0)))


class SamplerStage:
    """One rank's LM head and sampler."""

    def __init__(self, decoder: Decoder, request_pool: RequestPool, tp: Group) -> None:
        self._decoder = decoder
        self._request_pool = request_pool
        self._tp = tp
        self.logits_chunking = LogitsChunking.of(
            decoder.vocab_shards, request_pool.tokens.shape[1], on_card=request_pool.tokens.is_cuda
        )

    @property
    def vocab(self) -> range:
        """The ids of this rank's logits."""
        return self._decoder.vocab_shards[self._tp.rank]

    def run(self, hidden_TH: torch.Tensor, plan: StepPlan, chunks: ChunkArrays) -> ModelOutput:
        """Queue sampling and scoring for `hidden_TH` [T, hidden_size]; sampled tokens also go into the request pool."""
        compiled = self._ask_ranks(plan) if plan.grammars.asked else tuple
        to_score = prompt_logprobs_batch(plan, chunks, self._request_pool)
        scores = None if to_score is None else self._score(hidden_TH, to_score)  # first: sampling writes the slots' tokens
        inputs = plan, chunks, self._request_pool, self.logits_chunking
        redrawn = tuple((batch, self._redraw(hidden_TH, batch)) for batch in redraw_batches(*inputs)) if plan.redraw else ()
        sampled = tuple(self._sample(self._logits(hidden_TH, batch), batch) for batch in sample_batches(*inputs))
        return ModelOutput(sampled, scores, redrawn, compiled)

    def draw_all(
        self, hidden_BH: torch.Tensor, params: DrawParams, slots_B: torch.Tensor, logits_BV: torch.Tensor
    ) -> torch.Tensor:
        """For a graph: write what the head gives each row, and return its token [B] without filters, also in the request pool.

        `slots_B`: int32; a row with a negative one is padding, and its token is left as it was allocated.
        """
        logits = self._decoder.head(hidden_BH)
        assert isinstance(logits, CardLogits) and logits.raw.values_SV.dtype == logits_BV.dtype
        logits_BV.copy_(logits.raw.values_SV)
        tokens_B = torch.empty(len(hidden_BH), dtype=torch.int64, device=logits_BV.device)
        target = DrawTarget(tokens_B, slots_B, self._request_pool.tokens)
        draw_rows(self._decoder.of_raw(logits_BV), self._decoder.vocab_shards, params, self._tp, target)
        return tokens_B

    def finish(self, logits_BV: torch.Tensor, drawn_B: torch.Tensor, plan: StepPlan, chunks: ChunkArrays) -> ModelOutput:
        """Queue what a graph has left to do: rows with filters, grammars or logprobs are drawn again from its logits."""
        compiled = self._ask_ranks(plan) if plan.grammars.asked else tuple
        batches = rows_left(chunks, self._request_pool, self.logits_chunking)
        left = tuple(self._sample(self._decoder.of_raw(logits_BV[batch.rows]), batch) for batch in batches)
        return ModelOutput(left, compiled=compiled, drawn=_to_host(drawn_B[: len(chunks.slots)]))

    def _ask_ranks(self, plan: StepPlan) -> Callable[[], tuple[tuple[int, str], ...]]:
        """Ask all ranks of the stage whether they have compiled the grammars in question; the answer, once the device has it.

        A plan without chunks gives them some time for it.
        """
        asked, own = plan.grammars.asked, self._request_pool.compiled
        assert own is not None, "only the last stage has grammars"
        if not plan.slots:
            own.wait_for_any(asked, COMPILE_WAIT_S)
        states = [own.state(number) for number in asked]
        errors = {number: own.error(number) for number, state in zip(asked, states, strict=True) if state is GrammarState.FAILED}
        states_N = to_device(torch.tensor(states), self._request_pool.tokens.device)
        states_PN = _to_host(self._tp.all_gather(states_N) if self._tp.size > 1 else states_N[None])

        def compiled() -> tuple[tuple[int, str], ...]:
            answers = []
            for number, of_ranks in zip(asked, states_PN.T.tolist(), strict=True):
                if GrammarState.FAILED in of_ranks:
                    # taken above: by now a later plan may have dropped the grammar
                    answers.append((number, errors.get(number) or "another rank says so, and its log why"))
                elif GrammarState.COMPILING not in of_ranks:
                    answers.append((number, ""))
            return tuple(answers)

        return compiled

    def _redraw(self, hidden_TH: torch.Tensor, batch: SampleBatch) -> torch.Tensor:
        """Draw known tokens again, [S] on their way to the host; nothing else keeps them."""
        return _to_host(self._draw(self._logits(hidden_TH, batch), batch, keep=False))

    def _logits(self, hidden_TH: torch.Tensor, batch: SampleBatch) -> Logits:
        """The logits of a batch's rows. On the CPU they may stay unwritten without filters and logprobs."""
        hidden_SH = hidden_TH if len(hidden_TH) == len(batch.chunks) else hidden_TH[batch.rows]
        logits = self._decoder.head(hidden_SH)
        read_again = batch.filters is not None or batch.num_logprobs
        return WrittenLogits(logits.written()) if read_again and not isinstance(logits, CardLogits) else logits

    def _sample(self, logits: Logits, batch: SampleBatch) -> SamplerOutput:
        """Sample one batch: filters, draw, logprobs."""
        tokens_S = self._draw(logits, batch, keep=True)
        entries: LogprobTensors | None = None
        if batch.num_logprobs:
            most = max(n for n in batch.num_logprobs if n is not None)
            chosen_S, ids_Sn, top_Sn = logprobs(logits, self._decoder.vocab_shards, tokens_S, most, self._tp)
            entries = _to_host(chosen_S), _to_host(ids_Sn), _to_host(top_Sn)
        on_host_S = _to_host(tokens_S)
        return SamplerOutput(batch, on_host_S, entries, _grammar_draws(batch, on_host_S, tokens_S.is_cuda))

    def _draw(self, logits: Logits, batch: SampleBatch, *, keep: bool) -> torch.Tensor:
        """Token ids [S], also written to the request pool if it should `keep` them.

        With filters that need whole rows these are gathered, and every rank draws the same tokens from them.
        """
        shards, tp, tokens_XL = self._decoder.vocab_shards, self._tp, self._request_pool.tokens
        if batch.filters is not None:
            logits_SV, first = logits.written(), 0
            if self.logits_chunking.sharded and batch.filters.per_id:
                logits_SV, first = logits_SV if logits_SV.is_cuda else logits_SV.clone(), shards[tp.rank].start
            else:
                if tp.size > 1 or not logits_SV.is_cuda:  # on a card they are a copy already
                    logits_SV = gather_logits(logits_SV, shards, tp)
                shards, tp = (range(logits_SV.shape[1]),), Group()
            temperature_S, position_S = batch.draw.temperature_S, batch.draw.position_S
            logits_SV = apply(logits_SV, batch.filters, temperature_S, position_S, tokens_XL, batch.slots, first)
            logits = CardLogits(RawLogits(logits_SV)) if logits_SV.is_cuda else WrittenLogits(logits_SV)
        out_S = torch.empty(len(batch.chunks), dtype=torch.int64, device=tokens_XL.device)
        target = DrawTarget(out_S, batch.slots, tokens_XL) if keep else DrawTarget(out_S)
        draw_rows(logits, shards, batch.draw, tp, target, all_greedy=batch.all_greedy)
        return out_S

    def _score(self, hidden_TH: torch.Tensor, batch: PromptLogprobsBatch) -> PromptLogprobsOutput:
        """Prompt logprobs, in slices of rows that `LogitsChunking` allows."""
        tokens_N = self._request_pool.tokens[batch.slots, batch.positions].long()
        shards, most = self._decoder.vocab_shards, max(batch.num_top)
        slices = []
        for at in range(0, len(tokens_N), self.logits_chunking.plain):
            rows = slice(at, at + self.logits_chunking.plain)
            logits = self._decoder.head(hidden_TH[batch.rows[rows]])
            slices.append(logprobs(logits, shards, tokens_N[rows], most, self._tp))
        chosen_N, ids_Nn, top_Nn = (torch.cat(parts) for parts in zip(*slices, strict=True))
        return PromptLogprobsOutput(batch, (_to_host(chosen_N), _to_host(ids_Nn.int()), _to_host(top_Nn)))


def _to_host(x: torch.Tensor) -> torch.Tensor:
    """Queue the copy right after the draw; a later copy would wait for every plan launched since."""
    if not x.is_cuda:
        return x
    return torch.empty_like(x, device="cpu", pin_memory=True).copy_(x, non_blocking=True)


def _to_bytes(x: torch.Tensor) -> bytes:
    """A host tensor's values in row-major order."""
    data = bytearray(x.nbytes)
    if data:
        torch.frombuffer(data, dtype=x.dtype).view(x.shape).copy_(x)
    return bytes(data)


def _grammar_draws(batch: SampleBatch, on_host_S: torch.Tensor, on_card: bool) -> tuple[GrammarRow, ...]:
    """Hand each sequence's token, on its way to the host, to its grammar."""
    event: torch.Event | None = None
    if batch.grammars and on_card:
        event = torch.Event("cuda")
        event.record()
    draws = []
    for index, (chunk, grammar) in enumerate(zip(batch.chunks, batch.grammars, strict=True) if batch.grammars else ()):
        if grammar is not None:
            draw = GrammarDraw(on_host_S, index, event)
            grammar.drawn(draw)
            draws.append((chunk, grammar, draw))
    return tuple(draws)
