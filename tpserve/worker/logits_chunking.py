"""How many rows go through the LM head together, and how much memory they take. Plain integers, no torch.

Rows of logits are the largest tensors on a rank besides weights and KV cache. The number of rows in one group is chosen so that
the logits and everything computed from them stay within `HEAD_BYTES`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from tpserve.models.units import VOCAB_UNIT

HEAD_BYTES = 512 << 20
PLAIN_BYTES = 24
"""Bytes for each logit of a rank's vocabulary shard: the logit, and temporaries of the draw or of the logprobs."""
FILTERED_BYTES = 64
"""Bytes for each logit of the whole vocabulary: copies and sums of top-p, and masks over all ids."""
HISTORY_BYTES = 16
"""Bytes for each token of the longest sequence: penalties read all of it."""
CARD_PLAIN_BYTES = 8
"""On a card, whose kernels make no temporaries of a vocabulary: what the LM head gives, and the best of blocks and parts."""
CARD_FILTERED_BYTES = 24
"""On a card: what the head gives, the logits written, gathered twice among ranks, and those that a truncation copies together."""


@dataclass(frozen=True)
class LogitsChunking:
    """Rows per group without and with filters, and the bytes of one such row. Equal on all ranks of a stage."""

    plain: int
    filtered: int
    plain_bytes: int
    filtered_bytes: int
    sharded: bool = False
    """Whether several ranks have parts of the vocabulary, whole blocks of the draw each."""

    @staticmethod
    def of(shards: Sequence[range], max_len: int, *, on_card: bool = False) -> "LogitsChunking":
        """`shards`: every rank's range of the vocabulary; `max_len`: length of the longest sequence in tokens."""
        plain = max(len(shard) for shard in shards) * (CARD_PLAIN_BYTES if on_card else PLAIN_BYTES)
        filtered = shards[-1].stop * FILTERED_BYTES + max_len * HISTORY_BYTES
        if on_card:
            filtered = shards[-1].stop * CARD_FILTERED_BYTES
        sharded = len(shards) > 1 and all(shard.start % VOCAB_UNIT == 0 for shard in shards)
        return LogitsChunking(max(1, HEAD_BYTES // plain), max(1, HEAD_BYTES // filtered), plain, filtered, sharded)

    def most_bytes(self, max_sampled: int, max_scored: int) -> int:
        """An upper bound, in bytes, for steps that sample and score at most so many rows."""
        plain = min(self.plain, max(max_sampled, max_scored))
        return max(plain * self.plain_bytes, min(self.filtered, max_sampled) * self.filtered_bytes)
