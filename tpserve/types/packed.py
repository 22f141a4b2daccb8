"""Integers as bytes: how arrays cross the wire (int32, little endian), so that a plan encodes in under a microsecond.

Every platform that runs torch with NCCL is little endian; `array` keeps the native order and `pack` asserts it.
"""

import sys
from array import array
from collections.abc import Iterable, Sequence

assert sys.byteorder == "little", "tpserve's wire format is little endian"


INT32_BYTES = 4


def pack(values: Iterable[int]) -> bytes:
    """Encode integers in [-2**31, 2**31) as int32 bytes."""
    return array("i", values).tobytes()


def unpack(data: bytes) -> Sequence[int]:
    """Decode int32 bytes; indexable and iterable. Raises ValueError when the length is no multiple of four."""
    values = array("i")
    values.frombytes(data)
    return values
