"""Triton kernels beside their torch references. This package knows torch and triton only, nothing of the server.

One file an op: the op, `*_reference` of the same signature (the specification: float32 inside, any device), and the kernel.
A row's bits depend on that row alone, never on the batch around it: tile shapes follow from the model's shapes and dtype,
sums run in one order, and there are no atomics. Every launch states `enable_fp_fusion=False`, so that the compiler is not
free to fuse a multiply and an add in one kernel and not in another (its default differs between Triton's versions).
"""
