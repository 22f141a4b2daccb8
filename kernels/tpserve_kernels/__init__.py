"""Triton kernels beside their torch references. This package imports torch and triton only, nothing of the server.

One file per op: the op, `*_reference` of the same signature, and the kernel. The reference is the specification: float32
inside, on any device. The op has the same shapes, dtypes and errors.

Invariant: the bits of a row depend on that row alone, never on its batch: tile shapes follow from the model's shapes and dtype,
sums have one order, and there are no atomics. Every launch passes `enable_fp_fusion=False`, so that the compiler cannot fuse a
multiply and an add in one kernel and not in another (its default differs between versions of Triton).
"""
