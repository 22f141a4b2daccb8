"""The sizes the scheduler plans within, decided once at start. Owns numbers and their arithmetic, nothing that changes."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """`depth`: how many plans may be in flight, 2 without pipelining and stages + 1 with it.

    `feedback`: how a drawn token reaches the plan that needs it. False: the worker keeps it, and the next position may be
    planned before rank 0 knows the token. True (pipelining): it comes back in a result and goes out as `Chunk.tokens`.
    `num_blocks`: KV blocks of each cache group, every one of `block_size` positions.
    `prefix_caching`: whether full blocks are found again by what they hold.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    num_blocks: int
    block_size: int
    depth: int
    feedback: bool
    eos_ids: tuple[int, ...]
    num_groups: int = 1
    prefix_caching: bool = True

    def __post_init__(self) -> None:
        sizes = (self.max_num_seqs, self.max_num_batched_tokens, self.max_model_len, self.num_blocks, self.block_size)
        assert min(*sizes, self.depth, self.num_groups) >= 1, f"limits are positive: {self}"

    def blocks_for(self, positions: int) -> int:
        """Blocks that hold the first `positions` positions of a sequence, in each cache group."""
        return -(-positions // self.block_size)
