"""Decides each step: which sequences compute which positions, in which slots and blocks. Rank 0 only.

Owns every sequence from its Add to its Done. Never touches torch, a socket, a clock or a thread: time comes as `now`.

A plan is in flight from `schedule` until its result is applied. At most `depth` plans are in flight; results come in step order.

    async sampling    (`sync_sampling` false) the worker keeps sampled tokens, so position p + 1 is planned before rank 0 knows
                      the token at p
    sync sampling     a sequence with a sampled token in flight is not planned until the token is back; the chunks of a prefill
                      may queue up
    ends              nothing is planned past a known end (max_tokens, max_model_len); tokens after an unexpected end (EOS, stop
                      id, Truncate, abort) are dropped when they arrive
    release           a slot and its blocks are free once no plan in flight names them; the next plan tells the workers
    preemption        when blocks are short, planning stops until all results are applied; then the last sequence in order loses
                      its blocks, keeps its tokens and waits at its old place to be recomputed
    order             lower `priority` first, then arrival; a waiting sequence that needs a slot or blocks takes them from
                      running sequences of a higher number, by preemption
    windows           a block that no later position sees is freed when the result that proves it is applied
    grammars          a sequence with a grammar waits, without a slot, until all ranks have compiled it; plans ask for that, one
                      without chunks when there is nothing else to plan
    resumption        a request that comes with output was interrupted by a fault. The prefill that recomputes it draws its last
                      tokens again, and those that differ are counted; the known ones stay. A preempted sequence draws none again
    prefix cache      a block can be shared once the result of the plan that filled it is applied; a sequence that needs a block
                      which is being computed waits for it, and others overtake it
    pause             `keep`: nothing is planned until `resume`; `wait`: nothing that has not begun. Plans in flight go on, and
                      what was computed stays, so that a pause changes no token
"""

from collections import deque
from collections.abc import Collection
from dataclasses import dataclass

from tpserve.scheduling.block_manager import BlockManager
from tpserve.scheduling.grammars import GrammarTable
from tpserve.scheduling.policy import ScheduledBatch, SchedulingPolicy
from tpserve.scheduling.queue import WaitingQueue
from tpserve.scheduling.scheduler_config import SchedulerConfig
from tpserve.scheduling.sequence import Sequence
from tpserve.types.messages import Delta, Done, EngineOutput, FinishReason, PauseMode, PromptLogprobsChunk, Stats
from tpserve.types.packed import pack, unpack
from tpserve.types.plan import MAX_REDRAWN, Chunk, NewSequence, PromptLogprobs, StepPlan, StepResult, TokenLogprobs
from tpserve.types.request import Request, content_error


@dataclass(frozen=True)
class _InFlightStep:
    """A plan in flight: its chunks and their sequences."""

    step: int
    rows: tuple[tuple[Sequence, Chunk], ...]


class Scheduler:
    """Continuous batching: decodes first, then prefill chunks in order until the token budget is used."""

    def __init__(self, config: SchedulerConfig, epoch: int = 0) -> None:
        self.config = config
        self.epoch = epoch
        self._blocks = BlockManager(config)
        self._free_slots = list(reversed(range(config.max_num_seqs)))
        self._waiting = WaitingQueue()
        self._grammars = GrammarTable()
        self._running: dict[int, Sequence] = {}
        self._policy = SchedulingPolicy(config, self._blocks, self._waiting, self._running)
        self._in_flight: deque[_InFlightStep] = deque()
        self._releases: list[int] = []
        self._outputs: list[EngineOutput] = []
        self._step = 0
        self._preemptions = 0
        self._prompt_tokens = 0
        self._generation_tokens = 0
        self._prefix_cache_queries = 0
        self._prefix_cache_hits = 0
        self._resumed = 0
        self._resume_mismatches = 0
        self._mismatched: list[tuple[int, int, int]] = []
        self._arrivals = 0
        self._pause: PauseMode | None = None
        self._controls = 0

    # requests

    def add(self, request: Request, now: float) -> None:
        """Queue a request. One that cannot be served gets an error Done at once."""
        assert not self._find(request.id), f"request {request.id} was added twice"
        sequence = Sequence.of(request, self.config.max_model_len, now, self._arrivals)
        self._arrivals += 1
        self._resumed += bool(request.output)
        if refusal := self._refusal(sequence):
            self._end(sequence, "error", now, error=refusal)
        elif not self._already_complete(sequence, now) and not self._grammars.hold(sequence):
            self._waiting.add(sequence)

    def refuse(self, id: int, error: str) -> None:
        """Answer a request for which `add` raised, with an error Done."""
        self._outputs.append(Done(id, "error", 0, error=error))

    def abort(self, id: int, now: float) -> None:
        """End a request whose client is gone. Unknown and finished ids are ignored."""
        if sequence := self._find(id):
            self._end(sequence, "abort", now)

    def truncate(self, id: int, length: int, now: float) -> None:
        """End a request at `length` output tokens (the frontend found a stop string). Unknown and finished ids are ignored."""
        if sequence := self._find(id):
            self._end(sequence, "stop", now, num_tokens=min(length, sequence.num_output))

    # steps

    def schedule(self, now: float) -> StepPlan | None:
        """The next plan. None with nothing to do, with `depth` plans in flight, or when blocks are short until results arrive."""
        if len(self._in_flight) >= self.config.depth or self._pause == "keep":
            return None
        begins = self._pause is None
        while (batch := self._policy.next_batch(len(self._free_slots), len(self._in_flight), begins=begins)) is None:
            if self._in_flight:
                return None
            self._preempt()
        asks = begins and not self._in_flight and self._grammars.waits()
        return self._commit(batch, now) if batch or asks else None

    def apply(self, result: StepResult, now: float) -> None:
        """Apply the result of the oldest plan in flight."""
        step = self._in_flight.popleft()
        assert (result.epoch, result.step) == (self.epoch, step.step), "results are applied in step order"
        tokens, logprobs, scores = unpack(result.tokens), dict(result.logprobs), dict(result.prompt_logprobs)
        grammar_ends, redrawn = dict(result.grammar_ends), dict(result.redrawn)
        assert len(tokens) == len(step.rows), "a result has one token per chunk of its plan"
        for index, (sequence, chunk) in enumerate(step.rows):
            sequence.in_flight -= 1
            if sequence.ended:
                self._release_if_done(sequence)
                continue
            self._blocks.commit(sequence, chunk.start + chunk.count)
            if chunk.score:
                self._emit_prompt_logprobs(sequence, chunk, scores[index])
            if chunk.redraw:
                self._compare(sequence, unpack(redrawn[index]))
            if chunk.sample:
                self._append_token(sequence, tokens[index], logprobs.get(index), grammar_ends.get(index), now)
            elif len(sequence.tokens) == sequence.end and not sequence.needs_scores:
                self._end(sequence, "length", now)
        for number, error in result.compiled:
            self._on_compiled(number, error, now)

    def take_outputs(self) -> list[EngineOutput]:
        """The outputs since the last call: deltas, prompt logprobs, Dones."""
        outputs, self._outputs = self._outputs, []
        return outputs

    def take_mismatches(self) -> list[tuple[int, int, int]]:
        """(request id, different tokens, tokens drawn again) of resumed requests since the last call, where any differs."""
        mismatched, self._mismatched = self._mismatched, []
        return mismatched

    def stats(self) -> Stats:
        """Gauges and running totals; `steps` counts plans."""
        return Stats(
            running=len(self._running),
            waiting=len(self._waiting) + len(self._grammars),
            blocks_used=self._blocks.used,
            blocks_total=self.config.num_blocks,
            preemptions=self._preemptions,
            steps=self._step,
            prompt_tokens=self._prompt_tokens,
            generation_tokens=self._generation_tokens,
            prefix_cache_queries=self._prefix_cache_queries,
            prefix_cache_hits=self._prefix_cache_hits,
            epoch=self.epoch,
            resumed=self._resumed,
            resume_mismatches=self._resume_mismatches,
            controls=self._controls,
            paused=self.paused,
        )

    @property
    def idle(self) -> bool:
        """Whether nothing waits, runs or is in flight: all slots and blocks are free."""
        return not (self._waiting or self._running or self._in_flight or self._grammars)

    # operators

    def pause(self, mode: PauseMode) -> None:
        """Plan nothing any more (`keep`), or only sequences that have begun (`wait`)."""
        self._pause = mode
        self._controls += 1

    def resume(self) -> None:
        """End a pause."""
        self._pause = None
        self._controls += 1

    def reset_prefix_cache(self) -> None:
        """Find nothing any more of what has been computed so far."""
        self._blocks.reset_cache()
        self._controls += 1

    @property
    def paused(self) -> bool:
        """Whether a pause has been reached: no plan is in flight, and none is made before `resume`."""
        if self._pause is None or self._in_flight:
            return False
        return self._pause == "keep" or not (self._running or any(sequence.begun for sequence in self._waiting))

    # planning

    def _commit(self, batch: ScheduledBatch, now: float) -> StepPlan:
        """Allocate what the batch needs and turn it into a plan in flight."""
        releases, self._releases = self._releases, []
        new_sequences: list[NewSequence] = []
        chunks: list[Chunk] = []
        for sequence, _, shared in batch:
            if sequence.slot < 0:
                self._blocks.share(sequence, shared)  # before an allocation evicts what was matched
        for sequence, count, _ in batch:
            blocks: tuple[tuple[int, ...], ...] = ()
            if sequence.slot < 0:
                new_sequences.append(self._admit(sequence, count, now))
            else:
                blocks = self._blocks.grow(sequence, sequence.planned + count)
            start, sample = sequence.planned, count == sequence.num_to_compute and sequence.length < sequence.end
            input_ids = sequence.input_ids(start, count) if self.config.sync_sampling else ()
            score, redraw = sequence.scores(start, count), sequence.redraws(start, count)
            chunks.append(Chunk(sequence.slot, start, count, sample, input_ids, blocks, score, redraw))
            sequence.planned += count
            sequence.pending_draws += sample
            sequence.in_flight += 1
        plan = StepPlan.of(self.epoch, self._step, chunks, new_sequences, releases, self._grammars.orders())
        self._in_flight.append(_InFlightStep(self._step, tuple(zip((row[0] for row in batch), chunks, strict=True))))
        self._step += 1
        return plan

    def _admit(self, sequence: Sequence, count: int, now: float) -> NewSequence:
        """Move a sequence from waiting to running; its first chunk has `count` positions."""
        request = sequence.request
        self._waiting.pop(request.id)
        self._running[request.id] = sequence
        sequence.slot = self._free_slots.pop()
        sequence.admitted = len(sequence.tokens)
        self._blocks.allocate(sequence, count)
        sequence.planned = sequence.computed
        if sequence.started_s is None:
            sequence.started_s = now
            self._count_cached(sequence)
        tables = tuple(pack(table) for table in sequence.tables)
        packed = pack(sequence.tokens)
        return NewSequence(
            sequence.slot, packed, sequence.prompt_len, sequence.params, request.seed, request.choice, tables, sequence.grammar
        )

    def _count_cached(self, sequence: Sequence) -> None:
        if self.config.prefix_caching and not sequence.needs_scores:
            sequence.cached_tokens = min(sequence.planned, sequence.prompt_len)
            self._prefix_cache_queries += sequence.prompt_len
            self._prefix_cache_hits += sequence.cached_tokens

    def _preempt(self) -> None:
        """Send the last running sequence in order back to the queue."""
        sequence = max(self._running.values(), key=lambda s: s.order)
        del self._running[sequence.request.id]
        self._free(sequence)
        sequence.suspend()
        self._waiting.add(sequence)
        self._preemptions += 1

    # ends

    def _refusal(self, sequence: Sequence) -> str:
        """Why a request can never be served; "" when it can. The frontend checks first, in terms of the API."""
        config, prompt_len = self.config, sequence.prompt_len
        if wrong := content_error(sequence.request, config.vocab_size):
            return wrong
        if not prompt_len:
            return "the prompt has no tokens; give at least one"
        if prompt_len + min(1, sequence.request.params.max_tokens) > config.max_model_len:
            return f"the prompt has {prompt_len} tokens, and max_model_len {config.max_model_len} leaves no room to generate one"
        if (size := config.admission_bytes(sequence.params_bytes, sequence.end)) > config.max_admission_bytes:
            return f"the request takes {size} bytes of a plan, which has {config.max_admission_bytes}; send a shorter one"
        if (blocks := config.min_blocks(sequence.end - 1)) > config.num_blocks:
            return f"the request needs {blocks} KV blocks and there are {config.num_blocks}; ask for fewer tokens"
        return ""

    def _already_complete(self, sequence: Sequence, now: float) -> bool:
        """End a resubmitted request whose output is complete; whether it was."""
        if sequence.num_output and self._stopped(sequence, sequence.tokens[-1], now):
            return True
        if len(sequence.tokens) < sequence.end or sequence.needs_scores:
            return False
        self._end(sequence, "length", now)
        return True

    def _emit_prompt_logprobs(self, sequence: Sequence, chunk: Chunk, logprobs: PromptLogprobs) -> None:
        """Output the prompt logprobs of a chunk, without those that were sent before a preemption."""
        new = logprobs.after(sequence.num_scored - chunk.start - 1)
        self._outputs.append(PromptLogprobsChunk(sequence.request.id, sequence.num_scored, new))
        sequence.num_scored += new.num_tokens

    def _compare(self, sequence: Sequence, drawn: Collection[int]) -> None:
        """Compare known tokens with those that were drawn again in their places."""
        first, last = sequence.next_redraw, sequence.next_redraw + len(drawn)
        different = sum(token != known for token, known in zip(drawn, sequence.tokens[first:last], strict=True))
        sequence.next_redraw = last
        sequence.mismatches += different
        self._resume_mismatches += different
        if sequence.mismatches and not sequence.redrawing:
            count = min(MAX_REDRAWN, last - sequence.prompt_len)
            self._mismatched.append((sequence.request.id, sequence.mismatches, count))

    def _append_token(
        self, sequence: Sequence, token: int, logprobs: TokenLogprobs | None, grammar_end: str | None, now: float
    ) -> None:
        """Append a sampled token, output it, and end the sequence if it is the last. `grammar_end`: of `StepResult`, or None."""
        assert token >= 0, "a chunk that samples has a token in its result"
        sequence.pending_draws -= 1
        first: tuple[int, float] | tuple[()] = ()
        if sequence.first_token_s is None:
            sequence.first_token_s = now
            first = (sequence.cached_tokens, sequence.times(now).queue_s)
            self._prompt_tokens += sequence.prompt_len
        sequence.last_token_s = now
        self._generation_tokens += 1
        entries = () if logprobs is None else (logprobs,)
        self._outputs.append(Delta(sequence.request.id, sequence.num_output, (token,), entries, *first))
        sequence.tokens.append(token)
        if self._stopped(sequence, token, now):
            return
        if grammar_end:
            self._end(sequence, "error", now, error=f"the grammar is refused: {grammar_end}", by_grammar=True)
        elif grammar_end is not None:
            self._end(sequence, "stop", now, by_grammar=True)
        elif len(sequence.tokens) == sequence.end:
            self._end(sequence, "length", now)

    def _on_compiled(self, number: int, error: str, now: float) -> None:
        """Queue the sequences that waited for a grammar, or refuse them."""
        for sequence in self._grammars.failed(number) if error else self._grammars.compiled(number):
            if error:
                self._end(sequence, "error", now, error=f"the grammar cannot be compiled: {error}")
            else:
                self._waiting.add(sequence)

    def _stopped(self, sequence: Sequence, token: int, now: float) -> bool:
        """End the sequence if `token` is EOS or a stop id; whether it is. The token itself belongs to the output."""
        params = sequence.request.params
        at_eos = not params.ignore_eos and token in self.config.eos_ids
        if not at_eos and token not in params.stop_token_ids:
            return False
        self._end(sequence, "stop", now, stop_id=None if at_eos else token)
        return True

    def _end(
        self,
        sequence: Sequence,
        finish: FinishReason,
        now: float,
        *,
        num_tokens: int | None = None,
        stop_id: int | None = None,
        error: str = "",
        by_grammar: bool = False,
    ) -> None:
        """Output Done and free the sequence, now or when the last plan that names it is applied."""
        id = sequence.request.id
        self._running.pop(id, None)
        self._waiting.pop(id)
        self._grammars.release(sequence)
        sequence.ended = True
        count = sequence.num_output if num_tokens is None else num_tokens
        times = sequence.times(now)
        self._outputs.append(Done(id, finish, count, stop_id=stop_id, times=times, error=error, by_grammar=by_grammar))
        self._release_if_done(sequence)

    def _release_if_done(self, sequence: Sequence) -> None:
        if sequence.slot >= 0 and not sequence.in_flight:
            self._free(sequence)
            sequence.slot = -1

    def _free(self, sequence: Sequence) -> None:
        """Free a slot and its blocks. The next plan releases the slot on the workers before it can be used again."""
        self._blocks.free(sequence)
        self._free_slots.append(sequence.slot)
        self._releases.append(sequence.slot)

    def _find(self, id: int) -> Sequence | None:
        return self._running.get(id) or self._waiting.get(id) or self._grammars.get(id)
