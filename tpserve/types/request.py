"""The engine's form of a request: token ids and numbers, no text."""

from collections.abc import Sequence
from math import isfinite

from msgspec import Struct

from tpserve.types.packed import unpack
from tpserve.types.sampling import MAX_LOGPROBS, EngineSamplingParams


class Request(Struct, frozen=True, array_like=True):
    """One sequence to continue. A client's request with n choices becomes n of these, with different `choice`.

    `id`: the frontend's number for this sequence, never reused. `prompt` and `output`: packed int32 ids (`types.packed`);
    `output` holds the tokens produced before a failure, and is empty unless the request is resubmitted. `seed` (unsigned 64 bit):
    the key of every random draw, so that a resubmitted sequence draws the same numbers. `priority`: lower values go first.
    `cache_salt`: prefixes are shared only between requests with the same salt.
    `redraw`: the last tokens of `output` are drawn again and compared; other weights drew them where it is false.
    """

    id: int
    prompt: bytes
    params: EngineSamplingParams
    seed: int
    choice: int = 0
    output: bytes = b""
    priority: int = 0
    cache_salt: str = ""
    redraw: bool = True


def content_error(request: Request, vocab_size: int) -> str:
    """Why ranks cannot compute a request; empty if they can. Rank 0 checks before it plans, so that ranks can trust a plan.

    The frontend has checked the same before, in its clients' terms. Raises ValueError when the length of packed ids is not a
    multiple of four.
    """
    p = request.params
    biased = [id for id, _ in p.logit_bias]
    shares = (p.temperature, p.top_p, p.min_p, p.presence_penalty, p.frequency_penalty, p.repetition_penalty)
    counts = (p.max_tokens, p.min_tokens, p.top_k, request.choice)
    rules = (
        ("a token", all(_are_ids(unpack(ids), vocab_size) for ids in (request.prompt, request.output))),
        ("stop_token_ids", _are_ids(p.stop_token_ids, _INT32)),
        ("logit_bias", _are_ids(biased, vocab_size) and _distinct(biased) and all(isfinite(value) for _, value in p.logit_bias)),
        ("allowed_token_ids", _are_ids(p.allowed_token_ids, vocab_size) and _distinct(p.allowed_token_ids)),
        ("bad_words", all(word and _are_ids(word, vocab_size) for word in p.bad_words)),
        ("a sampling parameter", all(map(isfinite, shares)) and p.temperature >= 0 and 0 < p.top_p <= 1 and 0 <= p.min_p <= 1),
        ("repetition_penalty", p.repetition_penalty > 0),
        ("a count", _are_ids(counts, _INT32)),
        ("logprobs", all(count is None or 0 <= count <= MAX_LOGPROBS for count in (p.logprobs, p.prompt_logprobs))),
        ("the seed", 0 <= request.seed < 1 << 64),
    )
    return next((f"{name} of the request is out of range" for name, valid in rules if not valid), "")


_INT32 = (1 << 31) - 1


def _are_ids(values: Sequence[int], end: int) -> bool:
    return not values or (min(values) >= 0 and max(values) < end)


def _distinct(values: Sequence[int]) -> bool:
    return len(set(values)) == len(values)
