"""The ledger worker: a device without a model, which turns every rule of plans in flight into an assertion.

`LedgerWorker` executes plans like a rank does, but what it writes into a KV block is the token itself. Before each draw it
reads the whole prefix back through the block table and compares it with what the sequence must be, so that a wrong table,
an aliased block or a position computed twice fails at the first token it touches. Its tokens are a pure function of the
prefix, the seed and the choice: `continuation` gives what a request must produce alone, whatever the batch does to it.

`LedgerDevice` runs the worker asynchronously over pipeline stages on a virtual clock, keeps a trace of what ran when, and
asserts what only the order of sends and applies can break: no plan may release a slot or hand out a block that a plan in
flight still uses. Neither imports torch; both are for tests and dry runs, and serve nobody.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from zlib import crc32

from tpserve.scheduling.limits import Limits
from tpserve.types.packed import pack, unpack
from tpserve.types.plan import Admission, Chunk, StepPlan, StepResult
from tpserve.types.request import Request

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


@dataclass
class _Slot:
    """A sequence on the device. `tokens`: all that is known; `given`: how many of them came with the admission."""

    admission: Admission
    tokens: list[int]
    given: int
    tables: list[list[int]]
    computed: int = 0


class LedgerWorker:
    """Executes plans in order against fake blocks and answers with deterministic tokens in [0, vocab_size)."""

    def __init__(self, limits: Limits, vocab_size: int = 1000, epoch: int = 0) -> None:
        self._limits = limits
        self._vocab_size = vocab_size
        self._epoch = epoch
        self._step = 0
        self._slots: dict[int, _Slot] = {}
        self._owners: list[dict[int, int]] = [{} for _ in range(limits.num_groups)]
        self._entries = [[[EMPTY] * limits.block_size for _ in range(limits.num_blocks)] for _ in range(limits.num_groups)]

    def execute(self, plan: StepPlan) -> StepResult:
        """Run one plan."""
        assert (plan.epoch, plan.step) == (self._epoch, self._step), "plans come in order"
        self._step += 1
        for slot in plan.releases:
            self._release(slot)
        for admission in plan.admissions:
            self._admit(admission)
        chunks = plan.chunks(self._limits.num_groups)
        slots = [chunk.slot for chunk in chunks]
        assert chunks and len(set(slots)) == len(slots), "a plan names each slot at most once"
        assert {a.slot for a in plan.admissions} <= set(slots), "who is admitted computes at once"
        assert plan.num_tokens() <= self._limits.max_num_batched_tokens, "a plan keeps to the token budget"
        return StepResult(plan.epoch, plan.step, pack([self._run(chunk) for chunk in chunks]))

    def _release(self, slot: int) -> None:
        state = self._slots.pop(slot)
        for group, table in enumerate(state.tables):
            for block in table:
                del self._owners[group][block]
                self._entries[group][block] = [EMPTY] * self._limits.block_size

    def _admit(self, admission: Admission) -> None:
        assert admission.slot not in self._slots, f"slot {admission.slot} is taken"
        assert 0 <= admission.slot < self._limits.max_num_seqs
        tokens = list(unpack(admission.tokens))
        self._slots[admission.slot] = _Slot(admission, tokens, len(tokens), [[] for _ in admission.tables])
        for group, table in enumerate(admission.tables):
            self._own(admission.slot, group, unpack(table))

    def _own(self, slot: int, group: int, blocks: Sequence[int]) -> None:
        for block in blocks:
            owner = self._owners[group].setdefault(block, slot)
            assert owner == slot and block not in self._slots[slot].tables[group], f"block {block} belongs to slot {owner}"
            assert 0 <= block < self._limits.num_blocks
            self._slots[slot].tables[group].append(block)

    def _run(self, chunk: Chunk) -> int:
        """Write a chunk's tokens where its keys and values would go; draw if it samples, else -1."""
        state = self._slots[chunk.slot]
        for group, blocks in enumerate(chunk.blocks):
            self._own(chunk.slot, group, blocks)
        stop = chunk.start + chunk.count
        assert chunk.count > 0 and chunk.start == state.computed, "each position is computed once, in order"
        assert stop <= len(state.tokens), "a position's token is known or drawn before it is computed"
        fed_back = self._limits.feedback and stop > state.given
        assert bool(chunk.tokens) == fed_back, "tokens are given exactly when an admission did not carry them"
        tokens = list(chunk.tokens) or state.tokens[chunk.start : stop]
        size = self._limits.block_size
        for entries, table in zip(self._entries, state.tables, strict=True):
            for position, token in zip(range(chunk.start, stop), tokens, strict=True):
                entries[table[position // size]][position % size] = token
        state.computed = stop
        return self._sample(state) if chunk.sample else EMPTY

    def _sample(self, state: _Slot) -> int:
        """Draw the next token from the prefix as the block tables tell it."""
        admission, length, size = state.admission, state.computed, self._limits.block_size
        assert length == len(state.tokens), "a token is drawn once, after everything known is computed"
        end = min(admission.prompt_len + admission.params.max_tokens, self._limits.max_model_len)
        assert length < end, "nothing is drawn past a known end"
        for entries, table in zip(self._entries, state.tables, strict=True):
            prefix = [token for block in table for token in entries[block]][:length]
            assert prefix == state.tokens, f"slot {admission.slot}: the cache does not hold the sequence"
            assert len(table) * size >= length
        token = draw(prefix, admission.seed, admission.choice, self._vocab_size)
        state.tokens.append(token)
        return token


@dataclass(frozen=True)
class Span:
    """Plan `step` occupied `stage` during [start_s, end_s)."""

    step: int
    stage: int
    start_s: float
    end_s: float


@dataclass
class LedgerDevice:
    """An asynchronous device of `stages` stages. A stage takes `cost_s(plan)`; a result reaches rank 0 `hop_s` after its end.

    `submit` never waits. `spans` is the trace of the stages, `sent_s` and `applied_s` the times of each step's plan and result.
    """

    limits: Limits
    stages: int = 1
    cost_s: Callable[[StepPlan], float] = lambda plan: 1.0
    hop_s: float = 0.25
    vocab_size: int = 1000
    spans: list[Span] = field(default_factory=list)
    sent_s: dict[int, float] = field(default_factory=dict)
    applied_s: dict[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._worker = LedgerWorker(self.limits, self.vocab_size)
        self._free_s = [0.0] * self.stages
        self._pending: deque[tuple[float, StepPlan, StepResult]] = deque()
        self._tables: dict[int, list[set[int]]] = {}
        """Blocks of each slot by group, as the plans sent so far have it."""

    @property
    def in_flight(self) -> int:
        return len(self._pending)

    @property
    def ready_s(self) -> float:
        """When the oldest result is there; infinity with nothing in flight."""
        return self._pending[0][0] if self._pending else float("inf")

    def submit(self, plan: StepPlan, now: float) -> None:
        """Send a plan; it runs when its stages are free."""
        assert len(self._pending) < self.limits.depth, "no more than `depth` plans in flight"
        self._check_in_flight(plan)
        self.sent_s[plan.step] = now
        at_s = now
        for stage in range(self.stages):
            start_s = max(at_s, self._free_s[stage])
            at_s = self._free_s[stage] = start_s + self.cost_s(plan)
            self.spans.append(Span(plan.step, stage, start_s, at_s))
        self._pending.append((at_s + self.hop_s, plan, self._worker.execute(plan)))

    def collect(self, now: float) -> StepResult:
        """The oldest result, which must be there."""
        ready_s, plan, result = self._pending.popleft()
        assert ready_s <= now, "a result is collected after it has arrived"
        self.applied_s[plan.step] = now
        return result

    def _check_in_flight(self, plan: StepPlan) -> None:
        """No slot or block changes hands while a plan in flight names it; with feedback, nobody is planned past a draw."""
        named = {slot for _, sent, _ in self._pending for slot in unpack(sent.slots)}
        drawing = {
            slot for _, sent, _ in self._pending for slot, sample in zip(unpack(sent.slots), sent.sample, strict=True) if sample
        }
        assert named.isdisjoint(plan.releases), "a slot in flight was released"
        for slot in plan.releases:
            del self._tables[slot]
        slots = unpack(plan.slots)
        assert not self.limits.feedback or drawing.isdisjoint(slots), "a sequence is planned before its token is back"
        new = [(a.slot, group, unpack(table)) for a in plan.admissions for group, table in enumerate(a.tables)]
        new += [(slots[index], group, blocks) for index, group, blocks in plan.runs()]
        for slot, group, blocks in new:
            held = [tables[group] for owner, tables in self._tables.items() if owner in named]
            assert all(table.isdisjoint(blocks) for table in held), "a block in flight was handed out"
            self._tables.setdefault(slot, [set() for _ in range(self.limits.num_groups)])[group].update(blocks)
