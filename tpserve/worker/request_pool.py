"""A rank's state between plans: each slot's tokens, block tables and sampling parameters.

No policy: a slot holds what its last admission wrote. Only plans change it, in the order admissions, new blocks, input ids; a
released slot keeps its contents until the next admission. Admissions, `Chunk.tokens` and the sampler write tokens.

    tokens[slot]    [0, known) written | the sampler of the plan that samples position `known` writes it
"""

import torch

from tpserve.types.packed import unpack
from tpserve.types.plan import NewSequence, StepPlan
from tpserve.worker.sampling_metadata import SamplingMetadata, sampling_metadata


def as_int32(data: bytes) -> torch.Tensor:
    """Packed ids as an int32 host tensor [N]; a copy, since messages are immutable."""
    return torch.frombuffer(bytearray(data), dtype=torch.int32) if data else torch.empty(0, dtype=torch.int32)


def to_device(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a host tensor to the device without waiting."""
    return x if device.type == "cpu" else x.pin_memory().to(device, non_blocking=True)


class RequestPool:
    """`num_slots` slots for sequences of at most `max_len` tokens.

    `tokens` [num_slots, max_len + 1] int32 is on the device: the sampler writes it and the next plan reads it without the host.
    `tables`, one [num_slots, max blocks] int32 for each of `windows` (`CacheGroup.window`), are on the host: they are small, come
    from plans, and go to the device with each batch. Entries before a window stay, though the blocks may belong to other
    sequences by then. `min_tokens` needs the model's `eos_ids` and `vocab_size`.
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
    ) -> None:
        self.block_size = block_size
        self._eos_ids, self._vocab_size = eos_ids, vocab_size
        self.tokens = torch.zeros((num_slots, max_len + 1), dtype=torch.int32, device=device)
        width = -(-max_len // block_size)
        self.windows = windows
        self.tables = [torch.zeros((num_slots, width), dtype=torch.int32) for _ in windows]
        self._table_lens = [[0] * num_slots for _ in windows]
        self.temperature = torch.zeros(num_slots, dtype=torch.float32)
        self.seed = torch.zeros(num_slots, dtype=torch.int64)
        self.choice = torch.zeros(num_slots, dtype=torch.int64)
        self.prompt_len = [0] * num_slots
        self.num_logprobs: list[int | None] = [None] * num_slots
        self.num_prompt_logprobs: list[int | None] = [None] * num_slots
        self.sampling_metadata: list[SamplingMetadata | None] = [None] * num_slots

    def update(self, plan: StepPlan) -> None:
        """Apply a plan's new sequences, new blocks and input ids, before its chunks are computed."""
        for new_sequence in plan.new_sequences:
            self._admit(new_sequence)
        for group in range(len(self.tables)):
            self._grow(plan, group)
        if plan.tokens:
            self._write_input_ids(plan)

    def _admit(self, new_sequence: NewSequence) -> None:
        """Fill a slot."""
        slot, params = new_sequence.slot, new_sequence.params
        tokens = as_int32(new_sequence.tokens)
        self.tokens[slot, : len(tokens)] = to_device(tokens, self.tokens.device)
        for group, ids in enumerate(new_sequence.tables):
            table = as_int32(ids)
            self.tables[group][slot, : len(table)] = table
            self._table_lens[group][slot] = len(table)
        self.temperature[slot] = params.temperature
        self.seed[slot] = new_sequence.seed - (1 << 64) if new_sequence.seed >> 63 else new_sequence.seed
        self.choice[slot] = new_sequence.choice
        self.prompt_len[slot] = new_sequence.prompt_len
        self.num_logprobs[slot] = params.logprobs
        self.num_prompt_logprobs[slot] = params.prompt_logprobs
        self.sampling_metadata[slot] = sampling_metadata(params, new_sequence.prompt_len, self._eos_ids, self._vocab_size)

    def _grow(self, plan: StepPlan, group: int) -> None:
        """Append the chunks' new blocks in one write: sequences of equal length need new blocks in the same step."""
        slots, lens = unpack(plan.slots), self._table_lens[group]
        rows: list[int] = []
        columns: list[int] = []
        blocks: list[int] = []
        for index, of_group, ids in plan.runs():
            if of_group == group:
                slot = slots[index]
                rows.extend([slot] * len(ids))
                columns.extend(range(lens[slot], lens[slot] + len(ids)))
                blocks.extend(ids)
                lens[slot] += len(ids)
        if rows:
            self.tables[group][torch.tensor(rows), torch.tensor(columns)] = torch.tensor(blocks, dtype=torch.int32)

    def _write_input_ids(self, plan: StepPlan) -> None:
        """Write `Chunk.tokens`, so that every chunk reads its input from `tokens` alone."""
        slots: list[int] = []
        positions: list[int] = []
        for slot, start, count, has_ids in zip(
            unpack(plan.slots), unpack(plan.starts), unpack(plan.counts), plan.input_ids, strict=True
        ):
            if has_ids:
                slots.extend([slot] * count)
                positions.extend(range(start, start + count))
        index = to_device(torch.tensor([slots, positions]), self.tokens.device)
        self.tokens[index[0], index[1]] = to_device(as_int32(plan.tokens), self.tokens.device)
