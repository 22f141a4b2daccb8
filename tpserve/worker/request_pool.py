"""What a rank remembers between plans: each slot's tokens, block tables and sampling parameters.

Owns no policy: a slot holds whatever the last admission put there. Its content is changed by plans only, in the order
releases, admissions, chunks; tokens are written by admissions, by `Chunk.tokens`, and by the sampler.

    tokens[slot]    [0, known) written | position `known` written by the sampler of the plan that draws it
"""

import torch

from tpserve.types.packed import unpack
from tpserve.types.plan import NewSequence, StepPlan
from tpserve.worker.sampling_metadata import SamplingMetadata, sampling_metadata


def as_int32(data: bytes) -> torch.Tensor:
    """Packed ids as an int32 host tensor (a copy: messages are immutable)."""
    return torch.frombuffer(bytearray(data), dtype=torch.int32) if data else torch.empty(0, dtype=torch.int32)


def to_device(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """To the device without waiting for it."""
    return x if device.type == "cpu" else x.pin_memory().to(device, non_blocking=True)


class RequestPool:
    """`num_slots` places for sequences of at most `max_len` tokens.

    Tokens live on the device, because the sampler writes them there and the next plan reads them without the host.
    Block tables, one for each of `windows` (`CacheGroup.window`), live on the host: they are small, known only from plans, and
    sent with each batch. What lies before a window stays in them, though the blocks may be others' by then.
    `eos_ids` and `vocab_size` are the model's: `min_tokens` puts off its ends.
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
        """Take over what the plan says about its slots, before its chunks are computed."""
        for new_sequence in plan.new_sequences:
            self._admit(new_sequence)
        for group in range(len(self.tables)):
            self._grow(plan, group)
        if plan.tokens:
            self._write_input_ids(plan)

    def _admit(self, new_sequence: NewSequence) -> None:
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
        """Append the chunks' new blocks, all in one write: sequences of one length need theirs in the same step."""
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
        for slot, start, count, given in zip(
            unpack(plan.slots), unpack(plan.starts), unpack(plan.counts), plan.input_ids, strict=True
        ):
            if given:
                slots.extend([slot] * count)
                positions.extend(range(start, start + count))
        where = to_device(torch.tensor([slots, positions]), self.tokens.device)
        self.tokens[where[0], where[1]] = to_device(as_int32(plan.tokens), self.tokens.device)
