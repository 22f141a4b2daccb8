"""The cost of decoding a JSON text, computed before it is decoded.

msgspec holds the interpreter lock while it decodes, so a thread does not help: the event loop and all streams would stop. The
scan reads the bytes one slice at a time, builds no objects, and refuses a text whose decoding would take too long. It agrees with
a JSON parser on which bytes belong to strings, up to the first byte that is not JSON, where the parser stops.

    weight   a number or a constant 1; a string 2; an array, an object or a member's name 16; a number of over 19 digits 4 more
    depth    of nested arrays and objects

Each step is one call of a `bytes` method, which takes about one nanosecond per byte.
"""

from collections.abc import Iterator
from itertools import accumulate

from tpserve.errors import UserError

MAX_WEIGHT = 3 << 18
"""About 50 ms of decoding on a slow core, for any kind of value."""
MAX_DEPTH = 128
MAX_DIGITS = 40
"""Consecutive digits of a number: the time to parse an integer grows with their square."""
SLICE = 64 << 10

_BRACKETS = bytes(byte for byte in range(256) if byte not in b"[]{}")
_STEP = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}
_DIGITS = bytes.maketrans(b"123456789", b"000000000")
_LONG = b"0" * 20
_TOO_LONG = b"0" * (MAX_DIGITS + 1)


def scan(data: bytes) -> Iterator[None]:
    """Scan `data`, one slice per step. UserError as soon as the text is too large to decode."""
    weight, depth, begin, in_string = 1, 0, 0, False
    while begin < len(data):
        end = _slice_end(data, begin)
        parts = data[begin:end].replace(b"\\\\", b"").replace(b'\\"', b"").split(b'"')
        outside = b" ".join(parts[in_string::2])
        in_string ^= not len(parts) % 2
        brackets = outside.translate(None, _BRACKETS)
        digits = outside.translate(_DIGITS)
        if _TOO_LONG in digits:
            raise UserError(f"the body has a number of more than {MAX_DIGITS} digits", code="invalid_json")
        depths = list(accumulate(map(_STEP.__getitem__, brackets), initial=depth))
        if max(depths) > MAX_DEPTH:
            raise UserError(f"the body nests arrays and objects more than {MAX_DEPTH} deep", code="body_too_complex")
        depth = depths[-1]
        containers = brackets.count(b"[") + brackets.count(b"{")
        names = outside.count(b":")
        weight += outside.count(b",") + len(parts) - 1 + 15 * containers + 16 * names + 4 * digits.count(_LONG)
        if weight > MAX_WEIGHT:
            raise UserError(
                f"the body holds too many values: a number counts 1, a string 2, an array, an object or a member's name 16, and "
                f"{MAX_WEIGHT} is the most that this server takes at once; split the request",
                code="body_too_complex",
            )
        begin = end
        yield


def _slice_end(data: bytes, begin: int) -> int:
    """The end of the slice at `begin`. It never separates a backslash from the character that it escapes."""
    end = min(begin + SLICE, len(data))
    backslashes = end - begin - len(data[begin:end].rstrip(b"\\"))
    return end + backslashes % 2
