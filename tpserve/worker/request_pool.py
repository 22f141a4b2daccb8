"""A rank's state between plans: each slot's tokens, block tables and sampling parameters.

No policy: a slot holds what its last admission wrote. Only plans change it, in the order admissions, new blocks, input ids; a
released slot keeps its contents until the next admission. Admissions, `Chunk.tokens` and the sampler write tokens.

On a card the tables lie beside the tokens, and a plan's changes are `Edits`, which go there with the step's integers.

    tokens[slot]    [0, known) written | the sampler of the plan that samples position `known` writes it
"""

from array import array
from collections.abc import Sequence

import torch

from tpserve.types.packed import unpack
from tpserve.types.plan import NewSequence, StepPlan
from tpserve.types.sampling import EngineSamplingParams
from tpserve.worker.grammars import CompiledGrammars, SlotGrammar
from tpserve.worker.sampling_metadata import SamplingMetadata, sampling_metadata


class Edits:
    """Integers to write to the request pool on a card: `values[i]` to entry `columns[i]` of row `rows[i]`.

    Row g * slots + slot is the block table of a slot in cache group g, row groups * slots + slot its tokens.
    """

    def __init__(self) -> None:
        self.rows, self.columns, self.values = array("i"), array("i"), array("i")

    def __len__(self) -> int:
        return len(self.rows)

    def add(self, row: int, column: int, values: Sequence[int]) -> None:
        """Write `values` to the entries of a row from `column` on."""
        self.rows.extend([row] * len(values))
        self.columns.extend(range(column, column + len(values)))
        self.values.extend(values)

    def extend(self, rows: Sequence[int], columns: Sequence[int], values: Sequence[int]) -> None:
        """Several edits, one at each index."""
        self.rows.extend(rows)
        self.columns.extend(columns)
        self.values.extend(values)

    def take(self) -> "tuple[array[int], array[int], array[int]]":
        """Rows, columns and values so far; the next edits are others."""
        taken = self.rows, self.columns, self.values
        self.rows, self.columns, self.values = array("i"), array("i"), array("i")
        return taken


class DeviceBlockTables:
    """The block tables of one cache group on a card, changed by edits. `first_row`: that of slot 0."""

    def __init__(self, edits: Edits, num_slots: int, first_row: int) -> None:
        self._edits = edits
        self._first_row = first_row
        self._lens = [0] * num_slots

    def set(self, slot: int, ids: bytes) -> None:
        """Begin a slot's table with these packed block ids."""
        self._lens[slot] = 0
        self.append(slot, unpack(ids))

    def append(self, slot: int, ids: Sequence[int]) -> None:
        """Add blocks to a slot's table."""
        self._edits.add(self._first_row + slot, self._lens[slot], ids)
        self._lens[slot] += len(ids)


class BlockTables:
    """The block tables of one cache group: `num_slots` rows of `width` block ids, on the host.

    They are small, come from plans, and are gathered for each batch. Entries before the group's window stay, though the blocks
    may belong to other sequences by then.
    """

    def __init__(self, num_slots: int, width: int, block_size: int) -> None:
        self.width, self.block_size = width, block_size
        self.blocks = array("i", bytes(4 * num_slots * width))
        """Row after row."""
        self._lens = [0] * num_slots

    def set(self, slot: int, ids: bytes) -> None:
        """Begin a slot's table with these packed block ids."""
        self._lens[slot] = 0
        self.append(slot, unpack(ids))

    def append(self, slot: int, ids: Sequence[int]) -> None:
        """Add blocks to a slot's table."""
        at, count = slot * self.width + self._lens[slot], len(ids)
        self.blocks[at : at + count] = array("i", ids)
        self._lens[slot] += count

    def rows(self, slots: Sequence[int], width: int) -> "array[int]":
        """The first `width` entries of each slot's row, row after row."""
        if len(slots) == 1:
            return self.blocks[slots[0] * self.width : slots[0] * self.width + width]
        with memoryview(self.blocks) as blocks:
            return array("i", b"".join([blocks[slot * self.width : slot * self.width + width] for slot in slots]))


class RequestPool:
    """`num_slots` slots for sequences of at most `max_len` tokens.

    `tokens` [num_slots, max_len + 1] int32 is on the device: the sampler writes it and the next plan reads it without the host.
    `tables`: one for each of `windows` (`CacheGroup.window`). `min_tokens` needs the model's `eos_ids` and `vocab_size`.
    `compiled`: on ranks of the last stage; None: no sequence has a grammar.

    On a card `device_tables` [groups, num_slots, blocks] int32 are there, too, and `edits` wait for the next step.
    """

    def __init__(
        self,
        num_slots: int,
        max_len: int,
        block_size: int,
        windows: tuple[int | None, ...],
        device: torch.device,
        *,
        eos_ids: tuple[int, ...],
        vocab_size: int,
        compiled: CompiledGrammars | None = None,
    ) -> None:
        self.compiled = compiled
        self.block_size = block_size
        self._eos_ids, self._vocab_size = eos_ids, vocab_size
        self.tokens = torch.zeros((num_slots, max_len + 1), dtype=torch.int32, device=device)
        self.windows = windows
        width = -(-max_len // block_size)
        self._tokens_row = 0
        """The row of slot 0's tokens, as edits count rows."""
        self.edits = Edits()
        self.device_tables: torch.Tensor | None = None
        self.tables: list[BlockTables | DeviceBlockTables] = [BlockTables(num_slots, width, block_size) for _ in windows]
        if self.tokens.is_cuda:
            self._tokens_row = len(windows) * num_slots
            self.device_tables = torch.zeros((len(windows), num_slots, width), dtype=torch.int32, device=device)
            self.tables = [DeviceBlockTables(self.edits, num_slots, group * num_slots) for group in range(len(windows))]
        self.params = [EngineSamplingParams()] * num_slots
        self.seed = [0] * num_slots
        """The bits of an unsigned seed as a signed integer."""
        self.choice = [0] * num_slots
        self.prompt_len = [0] * num_slots
        self.sampling_metadata: list[SamplingMetadata | None] = [None] * num_slots
        self.grammars: list[SlotGrammar | None] = [None] * num_slots

    def update(self, plan: StepPlan) -> None:
        """Apply a plan's orders for grammars, new sequences, new blocks and input ids, before its chunks are computed."""
        if self.compiled is not None:
            for number, text in plan.grammars.new:
                self.compiled.start(number, text)
            for number in plan.grammars.dropped:
                self.compiled.drop(number)
        for new_sequence in plan.new_sequences:
            self._admit(new_sequence)
        if plan.block_runs:
            slots = unpack(plan.slots)
            for chunk, group, ids in plan.runs():
                self.tables[group].append(slots[chunk], ids)
        if plan.tokens:
            self._write_input_ids(plan)

    def _admit(self, new_sequence: NewSequence) -> None:
        """Fill a slot."""
        slot, params = new_sequence.slot, new_sequence.params
        ids = unpack(new_sequence.tokens)
        if self.device_tables is not None:
            self.edits.add(self._tokens_row + slot, 0, ids)
        elif ids:
            self.tokens[slot, : len(ids)] = _tensor(ids)
        for tables, ids in zip(self.tables, new_sequence.tables, strict=True):
            tables.set(slot, ids)
        self.params[slot] = params
        self.seed[slot] = new_sequence.seed - (1 << 64) if new_sequence.seed >> 63 else new_sequence.seed
        self.choice[slot] = new_sequence.choice
        self.prompt_len[slot] = new_sequence.prompt_len
        self.grammars[slot] = None
        if new_sequence.grammar >= 0 and self.compiled is not None:
            output = unpack(new_sequence.tokens)[new_sequence.prompt_len :]
            self.grammars[slot] = self.compiled.begin(new_sequence.grammar, list(output))
        self.sampling_metadata[slot] = sampling_metadata(
            params, new_sequence.prompt_len, self._eos_ids, self._vocab_size, constrained=self.grammars[slot] is not None
        )

    def _write_input_ids(self, plan: StepPlan) -> None:
        """Write `Chunk.tokens`, so that every chunk reads its input from `tokens` alone."""
        rows, columns = array("i"), array("i")
        for slot, start, count, has_ids in zip(
            unpack(plan.slots), unpack(plan.starts), unpack(plan.counts), plan.input_ids, strict=True
        ):
            if has_ids:
                rows.extend([self._tokens_row + slot] * count)
                columns.extend(range(start, start + count))
        if self.device_tables is not None:
            self.edits.extend(rows, columns, unpack(plan.tokens))
        else:
            self.tokens[_tensor(rows), _tensor(columns)] = _tensor(unpack(plan.tokens))


def _tensor(values: Sequence[int]) -> torch.Tensor:
    return torch.frombuffer(array("i", values), dtype=torch.int32)
