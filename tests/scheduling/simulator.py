"""A simulated worker without a model: it turns every rule of plans in flight into an assertion. No torch.

`SimulatedWorker` executes plans as a rank does, but it writes the token itself into the KV block, with the group that the block
serves. With each chunk it reads back, through the block tables, all that the chunk's positions see (the prefix, or what is in the
window) and compares it with the sequence. A wrong table, an aliased block, a block freed too early or a position computed twice
fails at the first token. Several slots may hold a block when all of it was written before, for their group; then no slot writes
it. No slot holds a block before its window. Tokens and scores are pure functions of the prefix, the seed and the choice:
`continuation` and `score` give what a request produces alone, and no batch may change that. Known tokens are drawn again only
where they are output that came with the admission, among the last `MAX_REDRAWN` of it.

`SimulatedDevice` runs the worker asynchronously over pipeline stages on a virtual clock and records what ran when. It asserts
what only the order of sends and results can break: no plan releases a slot or allocates a block that a plan in flight uses (in a
window: what its first position sees), or shares a block before the result of the plan that filled it is applied.
"""

from array import array
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from zlib import crc32

from msgspec import msgpack

from tpserve.scheduling.scheduler_config import SchedulerConfig
from tpserve.types.packed import pack, unpack
from tpserve.types.plan import MAX_REDRAWN, Chunk, NewSequence, PromptLogprobs, StepPlan, StepResult
from tpserve.types.request import Request
from tpserve.types.window import first_block

EMPTY = -1


def draw(prefix: Sequence[int], seed: int, choice: int, vocab_size: int) -> int:
    """The token after `prefix`."""
    return crc32(pack(prefix), (seed ^ choice * 0x9E3779B1) & 0xFFFFFFFF) % vocab_size


def continuation(request: Request, count: int, vocab_size: int) -> list[int]:
    """The first `count` output tokens of a request when nothing ends it, those it was resubmitted with included."""
    tokens = [*unpack(request.prompt), *unpack(request.output)]
    goal = len(unpack(request.prompt)) + count
    while len(tokens) < goal:
        tokens.append(draw(tokens, request.seed, request.choice, vocab_size))
    return tokens[len(unpack(request.prompt)) : goal]


def num_different(request: Request, vocab_size: int) -> int:
    """How many of the last `MAX_REDRAWN` tokens that a request was resubmitted with are not those of its true context."""
    prompt, output = unpack(request.prompt), unpack(request.output)
    tokens = [*prompt, *output]
    positions = range(max(len(prompt), len(tokens) - MAX_REDRAWN), len(tokens))
    return sum(tokens[at] != draw(tokens[:at], request.seed, request.choice, vocab_size) for at in positions)


def score(prompt: Sequence[int], position: int) -> float:
    """The log probability of the prompt's token at `position`, exact in a float32."""
    return -float(crc32(pack(prompt[: position + 1])) % 1024)


@dataclass
class _SimulatedSlot:
    """A sequence on the device. `tokens`: all known ones; `num_admitted`: how many of them came with the admission."""

    new_sequence: NewSequence
    tokens: list[int]
    num_admitted: int
    tables: list[list[int]]
    computed: int


class SimulatedWorker:
    """Executes plans in order against simulated blocks and samples deterministic tokens in [0, vocab_size)."""

    def __init__(self, config: SchedulerConfig, vocab_size: int = 1000, epoch: int = 0) -> None:
        self._config = config
        self._vocab_size = vocab_size
        self._epoch = epoch
        self._step = 0
        self._slots: dict[int, _SimulatedSlot] = {}
        self._holders: list[set[tuple[int, int]]] = [set() for _ in range(config.num_blocks)]
        """For each block the (slot, group) pairs that hold it."""
        self._entries = [[(EMPTY, EMPTY)] * config.block_size for _ in range(config.num_blocks)]
        """For each position of each block: the group that wrote it, and the token."""

    def execute(self, plan: StepPlan) -> StepResult:
        """Run one plan."""
        assert (plan.epoch, plan.step) == (self._epoch, self._step), "plans come in order"
        self._step += 1
        for slot in plan.releases:
            self._release(slot)
        chunks = plan.chunks(len(self._config.windows))
        starts = {chunk.slot: chunk.start for chunk in chunks}
        assert chunks and len(starts) == len(chunks), "a plan names each slot at most once"
        assert {a.slot for a in plan.new_sequences} <= starts.keys(), "a new sequence has a chunk in its first plan"
        for new_sequence in plan.new_sequences:
            self._admit(new_sequence, starts[new_sequence.slot])
        assert plan.num_tokens() <= self._config.max_num_batched_tokens, "a plan keeps to the token budget"
        self._check_bytes(plan)
        tokens = [self._run(chunk) for chunk in chunks]
        scores = tuple((index, self._score(chunk)) for index, chunk in enumerate(chunks) if chunk.score)
        redrawn = tuple((index, pack(self._redraw(chunk))) for index, chunk in enumerate(chunks) if chunk.redraw)
        return StepResult(plan.epoch, plan.step, pack(tokens), prompt_logprobs=scores, redrawn=redrawn)

    def _check_bytes(self, plan: StepPlan) -> None:
        """New sequences, and the rest of the plan, stay within their shares of a frame when encoded."""
        config = self._config
        new_sequences = sum(len(msgpack.encode(new_sequence)) for new_sequence in plan.new_sequences)
        assert new_sequences <= config.max_admission_bytes, "a plan's admissions keep to their bytes"
        rest = len(msgpack.encode(plan)) - new_sequences
        most = StepPlan.max_bytes(config.max_num_seqs, config.max_num_batched_tokens, len(config.windows))
        assert rest <= most, f"a plan takes {rest} bytes beside its admissions"

    def _release(self, slot: int) -> None:
        """Free the slot. Its blocks keep their contents until they are allocated again."""
        state = self._slots.pop(slot)
        for group, table in enumerate(state.tables):
            for block in table[self._first(group, state.computed) :]:
                self._holders[block].remove((slot, group))

    def _admit(self, new_sequence: NewSequence, start: int) -> None:
        """Positions [0, start) are in shared blocks, except those that the position `start` does not see."""
        slot, tokens, size = new_sequence.slot, list(unpack(new_sequence.tokens)), self._config.block_size
        assert slot not in self._slots, f"slot {slot} is taken"
        assert 0 <= slot < self._config.max_num_seqs
        assert start % size == 0, "blocks are shared whole"
        assert len(new_sequence.tables) == len(self._config.windows), "a table for each group"
        self._slots[slot] = _SimulatedSlot(new_sequence, tokens, len(tokens), [[] for _ in new_sequence.tables], start)
        for group, packed in enumerate(new_sequence.tables):
            table, first = unpack(packed), self._first(group, start)
            assert not any(table[:first]), "before a window there are no blocks"
            for index, block in enumerate(table[first : start // size], first):
                expected = [(group, token) for token in tokens[index * size : (index + 1) * size]]
                assert self._entries[block] == expected, f"block {block} does not hold what it is shared for"
                self._holders[block].add((slot, group))
            self._slots[slot].tables[group].extend(table[: start // size])
            self._allocate(slot, group, table[start // size :])

    def _allocate(self, slot: int, group: int, blocks: Sequence[int]) -> None:
        """Allocate blocks for writing."""
        for block in blocks:
            assert 0 <= block < self._config.num_blocks
            assert not self._holders[block], f"block {block} is held by slots and groups {self._holders[block]}"
            self._holders[block].add((slot, group))
            self._entries[block] = [(EMPTY, EMPTY)] * self._config.block_size
            self._slots[slot].tables[group].append(block)

    def _first(self, group: int, position: int) -> int:
        """The first block that the group holds of a sequence computed up to `position`."""
        return first_block(position, self._config.windows[group], self._config.block_size)

    def _run(self, chunk: Chunk) -> int:
        """Write a chunk's tokens where its keys and values would go; draw if it samples, else -1."""
        state = self._slots[chunk.slot]
        for group, blocks in enumerate(chunk.blocks):
            self._allocate(chunk.slot, group, blocks)
        stop = chunk.start + chunk.count
        assert chunk.count > 0 and chunk.start == state.computed, "each position is computed once, in order"
        assert stop <= len(state.tokens), "a position's token is known or drawn before it is computed"
        needs_tokens = self._config.sync_sampling and stop > state.num_admitted
        assert bool(chunk.tokens) == needs_tokens, "a chunk has tokens exactly when the admission did not send them"
        tokens = list(chunk.tokens) or state.tokens[chunk.start : stop]
        size = self._config.block_size
        for group, table in enumerate(state.tables):
            for position, token in zip(range(chunk.start, stop), tokens, strict=True):
                block = table[position // size]
                assert self._holders[block] == {(chunk.slot, group)}, f"block {block} is written and held by others"
                self._entries[block][position % size] = group, token
            self._read_back(state, group, chunk.start, stop)
            for block in table[self._first(group, chunk.start) : self._first(group, stop)]:
                self._holders[block].remove((chunk.slot, group))
        state.computed = stop
        return self._sample(state) if chunk.sample else EMPTY

    def _read_back(self, state: _SimulatedSlot, group: int, start: int, stop: int) -> None:
        """Check through the group's table all that positions [start, stop) see."""
        size, table, window = self._config.block_size, state.tables[group], self._config.windows[group]
        assert len(table) * size >= stop
        seen = range(0 if window is None else max(0, start - window + 1), stop)
        read = [self._entries[table[position // size]][position % size] for position in seen]
        expected = [(group, state.tokens[position]) for position in seen]
        assert read == expected, f"slot {state.new_sequence.slot}: the cache does not hold the sequence"

    def _score(self, chunk: Chunk) -> PromptLogprobs:
        """Scores of the prompt tokens that follow the chunk's positions."""
        state = self._slots[chunk.slot]
        assert state.new_sequence.params.prompt_logprobs is not None, "only a request with prompt_logprobs is scored"
        last = min(chunk.start + chunk.count, state.new_sequence.prompt_len - 1)
        assert chunk.start < last, "a chunk that scores has something to score"
        prompt = state.tokens[: state.new_sequence.prompt_len]
        values = array("f", [score(prompt, position) for position in range(chunk.start + 1, last + 1)])
        return PromptLogprobs(0, values.tobytes(), b"", b"")

    def _redraw(self, chunk: Chunk) -> list[int]:
        """Draw the chunk's last known tokens again, each from the tokens before it."""
        state = self._slots[chunk.slot]
        new_sequence, last = state.new_sequence, chunk.start + chunk.count - chunk.sample
        positions = range(last - chunk.redraw + 1, last + 1)
        assert chunk.start < positions[0], "a token is drawn from a position of the chunk"
        first = max(new_sequence.prompt_len, state.num_admitted - MAX_REDRAWN)
        assert first <= positions[0] and last < state.num_admitted, "only the last output that an admission sent is drawn again"
        return [draw(state.tokens[:at], new_sequence.seed, new_sequence.choice, self._vocab_size) for at in positions]

    def _sample(self, state: _SimulatedSlot) -> int:
        """Draw the next token."""
        new_sequence, length = state.new_sequence, state.computed
        assert length == len(state.tokens), "a token is drawn once, after everything known is computed"
        end = min(new_sequence.prompt_len + new_sequence.params.max_tokens, self._config.max_model_len)
        assert length < end, "nothing is drawn past a known end"
        token = draw(state.tokens, new_sequence.seed, new_sequence.choice, self._vocab_size)
        state.tokens.append(token)
        return token


@dataclass(frozen=True)
class StageSpan:
    """Plan `step` occupied `stage` during [start_s, end_s)."""

    step: int
    stage: int
    start_s: float
    end_s: float


@dataclass
class SimulatedDevice:
    """An asynchronous device of `stages` stages. A stage takes `cost_s(plan)`; a result reaches rank 0 `hop_s` after its end.

    `submit` never waits. `spans` is the trace of the stages, `sent_s` and `applied_s` the times of each step's plan and result.
    """

    config: SchedulerConfig
    stages: int = 1
    cost_s: Callable[[StepPlan], float] = lambda plan: 1.0
    hop_s: float = 0.25
    vocab_size: int = 1000
    spans: list[StageSpan] = field(default_factory=list)
    sent_s: dict[int, float] = field(default_factory=dict)
    applied_s: dict[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._worker = SimulatedWorker(self.config, self.vocab_size)
        self._free_s = [0.0] * self.stages
        self._pending: deque[tuple[float, StepPlan, StepResult]] = deque()
        self._tables: dict[int, list[list[int]]] = {}
        """Block tables of each slot by group, after all plans sent so far."""
        self._written: dict[int, int] = {}
        """The last step that writes a block."""

    @property
    def in_flight(self) -> int:
        return len(self._pending)

    @property
    def ready_s(self) -> float:
        """When the oldest result arrives; infinity with nothing in flight."""
        return self._pending[0][0] if self._pending else float("inf")

    def submit(self, plan: StepPlan, now: float) -> None:
        """Send a plan; it runs when its stages are free."""
        assert len(self._pending) < self.config.depth, "at most `depth` plans are in flight"
        self._check_in_flight(plan)
        self.sent_s[plan.step] = now
        at_s = now
        for stage in range(self.stages):
            start_s = max(at_s, self._free_s[stage])
            at_s = self._free_s[stage] = start_s + self.cost_s(plan)
            self.spans.append(StageSpan(plan.step, stage, start_s, at_s))
        self._pending.append((at_s + self.hop_s, plan, self._worker.execute(plan)))

    def collect(self, now: float) -> StepResult:
        """The oldest result; it must have arrived."""
        ready_s, plan, result = self._pending.popleft()
        assert ready_s <= now, "a result is collected after it has arrived"
        self.applied_s[plan.step] = now
        return result

    def _check_in_flight(self, plan: StepPlan) -> None:
        """No slot or block in flight changes its owner; with sync_sampling, no plan continues a token in flight."""
        at: dict[int, int] = {}  # the first position of each slot whose result is not applied
        for _, sent, _ in self._pending:
            for slot, start in zip(unpack(sent.slots), unpack(sent.starts), strict=True):
                at.setdefault(slot, start)
        drawing = {
            slot for _, sent, _ in self._pending for slot, sample in zip(unpack(sent.slots), sent.sample, strict=True) if sample
        }
        assert at.keys().isdisjoint(plan.releases), "a slot in flight was released"
        for slot in plan.releases:
            del self._tables[slot]
        slots = unpack(plan.slots)
        assert not self.config.sync_sampling or drawing.isdisjoint(slots), "a sequence is planned before its token is back"
        size, windows = self.config.block_size, self.config.windows
        in_flight = {
            block
            for slot, position in at.items()
            for table, window in zip(self._tables[slot], windows, strict=True)
            for block in table[first_block(position, window, size) :]
        }
        chunks = {chunk.slot: chunk for chunk in plan.chunks(len(windows))}
        for new_sequence in plan.new_sequences:
            self._tables[new_sequence.slot] = [list(unpack(packed)) for packed in new_sequence.tables]
            start = chunks[new_sequence.slot].start
            for table, window in zip(self._tables[new_sequence.slot], windows, strict=True):
                self._check_shared(table[first_block(start, window, size) : start // size])
                assert in_flight.isdisjoint(table[start // size :]), "a block in flight was allocated"
        for index, group, blocks in plan.runs():
            assert in_flight.isdisjoint(blocks), "a block in flight was allocated"
            self._tables[slots[index]][group].extend(blocks)
        for slot, chunk in chunks.items():
            for table in self._tables[slot]:
                for block in table[chunk.start // size : -(-(chunk.start + chunk.count) // size)]:
                    self._written[block] = plan.step

    def _check_shared(self, blocks: Sequence[int]) -> None:
        applied = self._pending[0][1].step if self._pending else float("inf")
        assert all(self._written[block] < applied for block in blocks), "a block is shared before it is known to be full"
