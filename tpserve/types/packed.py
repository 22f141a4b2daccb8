"""Integer arrays as bytes on the wire (int32, little endian), so that a plan encodes in under a microsecond.

`array` uses the native byte order; the assertion below refuses big-endian platforms.
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
    """Decode int32 bytes. Raises ValueError when the length is not a multiple of four."""
    values = array("i")
    values.frombytes(data)
    return values
