"""In what units a model is dealt to tensor-parallel ranks, beside attention heads and layers."""

VOCAB_UNIT = 128
"""The sampler draws over blocks of so many vocabulary entries."""
MLP_UNIT = 64
