"""The sizes the scheduler plans within, decided once at start. Owns numbers and their arithmetic, nothing that changes."""

from dataclasses import dataclass

from tpserve.types.plan import NewSequence
from tpserve.types.window import blocks_needed

MAX_ADMISSION_BYTES = 32 << 20
"""Half of a plan's frame; the other half is for its chunks."""


@dataclass(frozen=True)
class SchedulerConfig:
    """`depth`: how many plans may be in flight, 2 without pipelining and stages + 1 with it.

    `sync_sampling`: how a drawn token reaches the plan that needs it. False: the worker keeps it, and the next position may be
    planned before rank 0 knows the token. True (pipelining): it comes back in a result and goes out as `Chunk.tokens`.
    `num_blocks`: KV blocks of all cache groups together, every one of `block_size` positions.
    `windows`: for each cache group the positions that its layers see, None for all (`CacheGroup.window`).
    `prefix_caching`: whether full blocks are found again by what they hold.
    `vocab_size`: how many token ids the model has.
    `max_admission_bytes`: the most that the admissions of one plan take on the wire together.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    num_blocks: int
    block_size: int
    depth: int
    sync_sampling: bool
    eos_ids: tuple[int, ...]
    windows: tuple[int | None, ...] = (None,)
    prefix_caching: bool = True
    max_admission_bytes: int = MAX_ADMISSION_BYTES
    vocab_size: int = 1 << 30

    def __post_init__(self) -> None:
        sizes = (self.max_num_seqs, self.max_num_batched_tokens, self.max_model_len, self.num_blocks, self.block_size)
        windows = (window for window in self.windows if window is not None)
        assert min(*sizes, self.depth, len(self.windows), *windows) >= 1, f"limits are positive: {self}"

    def blocks_for(self, positions: int) -> int:
        """Blocks that hold the first `positions` positions of a sequence, in each cache group that keeps them all."""
        return -(-positions // self.block_size)

    def admission_bytes(self, params_bytes: int, num_tokens: int) -> int:
        """A bound for the admission of a sequence of `num_tokens` known tokens. No table has more blocks than they fill."""
        num_groups = len(self.windows)
        return NewSequence.max_bytes(params_bytes, num_tokens, num_groups * self.blocks_for(num_tokens), num_groups)

    def least_blocks(self, positions: int) -> int:
        """Blocks without which a sequence of `positions` positions cannot be served, over all groups."""
        return blocks_needed(positions, self.windows, self.block_size)
