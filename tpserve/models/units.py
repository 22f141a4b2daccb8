"""The units in which vocabulary and MLP channels are split over tensor-parallel ranks."""

VOCAB_UNIT = 128
"""The sampler's block size in vocabulary entries."""
MLP_UNIT = 64
