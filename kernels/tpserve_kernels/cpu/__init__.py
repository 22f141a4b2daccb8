"""Kernels for CPUs: each function stands beside its specification in plain torch. Without the library callers take that."""
