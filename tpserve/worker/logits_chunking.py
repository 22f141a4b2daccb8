"""How many rows go through the LM head together, and what they take. Plain integers, no torch.

Whole vocabularies side by side are the largest thing on a rank besides weights and cache; so many rows are together that all that
is made of their logits takes `HEAD_BYTES`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

HEAD_BYTES = 512 << 20
PLAIN_BYTES = 24
"""For each logit of a rank's share: the logit itself, and what the draw or log probabilities make of it."""
FILTERED_BYTES = 64
"""For each logit of the whole vocabulary: copies and sums of top-p, and masks that name as many ids."""
HISTORY_BYTES = 16
"""For each token of the longest sequence: penalties see all of it."""


@dataclass(frozen=True)
class LogitsChunking:
    """How many rows go through the LM head together, equal on all ranks of a stage, and what one of them takes at most."""

    plain: int
    filtered: int
    plain_bytes: int
    filtered_bytes: int

    @staticmethod
    def of(shards: Sequence[range], max_len: int) -> "LogitsChunking":
        """`shards`: every rank's range of the vocabulary; `max_len`: tokens of the longest sequence."""
        plain = max(len(shard) for shard in shards) * PLAIN_BYTES
        filtered = shards[-1].stop * FILTERED_BYTES + max_len * HISTORY_BYTES
        return LogitsChunking(max(1, HEAD_BYTES // plain), max(1, HEAD_BYTES // filtered), plain, filtered)

    def most_bytes(self, max_sampled: int, max_scored: int) -> int:
        """A bound for steps that draw and score so many rows at most."""
        plain = min(self.plain, max(max_sampled, max_scored))
        return max(plain * self.plain_bytes, min(self.filtered, max_sampled) * self.filtered_bytes)
