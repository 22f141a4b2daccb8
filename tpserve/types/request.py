"""A request as the engine sees it: ids and numbers, no text."""

from msgspec import Struct

from tpserve.types.sampling import SamplingParams


class Request(Struct, frozen=True, array_like=True):
    """One sequence to continue. A client's request with n choices is n of these, told apart by `choice`.

    `id` is the frontend's number for this sequence, never reused. `prompt` and `output` are packed int32 ids
    (`types.packed`): `output` holds the tokens already produced, empty unless the request is resubmitted after a fault.
    `seed` keys every random draw of the sequence (unsigned 64 bit), so that a resubmitted sequence draws the same numbers.
    `priority`: lower ones first. `cache_salt`: prefixes are shared with requests of the same salt only.
    """

    id: int
    prompt: bytes
    params: SamplingParams
    seed: int
    choice: int = 0
    output: bytes = b""
    priority: int = 0
    cache_salt: str = ""
