"""Bytes of a matrix in the packed forms of kernels/cpu/product.h and product_int8.h. Imports no torch, as planners do.

Both are the same for every instruction set: a head, then panels of 16 outputs.

Legend: K inner channels, N outputs.
"""

ALIGNMENT = 64
"""Of a packed matrix in memory, and the bytes of its head."""
PANEL = 16
BFLOAT16_UNIT, INT8_UNIT = 32, 64
"""K is filled up to a multiple of these."""


def packed_bytes(item: int, outputs: int, inner: int) -> int:
    """Bytes of a packed matrix [N, K] of float32 (`item` 4) or bfloat16 (`item` 2)."""
    row = item * (_filled(inner, BFLOAT16_UNIT) if item == 2 else inner)
    return ALIGNMENT + _filled(outputs, PANEL) * row


def packed_int8_bytes(outputs: int, inner: int) -> int:
    """Bytes of an int8 matrix [N, K], the scale and the sum of each output included."""
    return ALIGNMENT + _filled(outputs, PANEL) * (_filled(inner, INT8_UNIT) + 8)


def _filled(count: int, unit: int) -> int:
    return -(-count // unit) * unit
