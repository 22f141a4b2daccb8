"""The scheduler's configuration: sizes that are decided once at start, and arithmetic on them. Immutable."""

from dataclasses import dataclass

from tpserve.types.plan import NewSequence
from tpserve.types.window import blocks_needed

MAX_ADMISSION_BYTES = 32 << 20
"""Half of a plan's frame, for its new sequences; the other half is for its chunks."""


@dataclass(frozen=True)
class SchedulerConfig:
    """Sizes are positive; the constructor asserts it.

    `depth`: how many plans may be in flight, 2 without pipelining and stages + 1 with it.
    `sync_sampling`: how a sampled token reaches the plan that needs it. False: the worker keeps it, and the next position may be
    planned before rank 0 knows the token. True (pipelining): a result brings it to rank 0, which sends it as `Chunk.tokens`.
    `num_blocks`: KV blocks of all cache groups together, each of `block_size` positions.
    `windows`: for each cache group the number of positions that its layers see, None for all (`CacheGroup.window`).
    `prefix_caching`: whether sequences share full blocks of equal contents.
    `max_admission_bytes`: the limit for the encoded new sequences of one plan together.
    `vocab_size`: number of token ids of the model.
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
        assert min(*sizes, self.depth, len(self.windows), *windows) >= 1, f"sizes are positive: {self}"

    def blocks_for(self, positions: int) -> int:
        """Number of blocks for the first `positions` positions of a sequence, in each cache group without a window."""
        return -(-positions // self.block_size)

    def admission_bytes(self, params_bytes: int, num_tokens: int) -> int:
        """An upper bound for the encoded `NewSequence` of a sequence of `num_tokens` known tokens, in bytes."""
        num_groups = len(self.windows)
        return NewSequence.max_bytes(params_bytes, num_tokens, num_groups * self.blocks_for(num_tokens), num_groups)

    def min_blocks(self, positions: int) -> int:
        """Number of blocks, over all groups, that a sequence of `positions` positions needs at least."""
        return blocks_needed(positions, self.windows, self.block_size)
