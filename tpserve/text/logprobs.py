"""Log probability entries in the two shapes of the OpenAI API. Pure functions from `TokenEntry` to plain JSON values."""

from collections.abc import Sequence
from typing import Any

from tpserve.text.assembler import TokenEntry
from tpserve.text.tokenizer import Tokenizer

FLOOR = -9999.0
"""JSON has no -inf; the lowest value that clients are used to."""


def completion_logprobs(entries: Sequence[TokenEntry], tokenizer: Tokenizer, base_offset: int = 0) -> dict[str, Any]:
    """The completions shape. `top_logprobs` holds the chosen token too, so it may have one entry more than was asked for.

    `base_offset`: characters before the output in the text that the client gets (an echoed prompt).
    """
    tops: list[dict[str, float]] = []
    for entry in entries:
        top = {tokenizer.token_text(entry.token): max(entry.logprobs.chosen, FLOOR)}
        for token, value in pairs(entry):
            top.setdefault(tokenizer.token_text(token), value)  # of two tokens spelled alike the likelier stays
        tops.append(top)
    return {
        "tokens": [tokenizer.token_text(entry.token) for entry in entries],
        "token_logprobs": [max(entry.logprobs.chosen, FLOOR) for entry in entries],
        "top_logprobs": tops,
        "text_offset": [base_offset + entry.offset for entry in entries],
    }


def chat_logprobs(entries: Sequence[TokenEntry], tokenizer: Tokenizer) -> dict[str, Any]:
    """The chat shape: a list of entries with exact bytes, so that characters cut between tokens can be put together."""

    def shape(token: int, value: float) -> dict[str, Any]:
        data = tokenizer.token_bytes(token)
        return {"token": tokenizer.token_text(token), "logprob": value, "bytes": list(data)}

    return {
        "content": [
            shape(entry.token, max(entry.logprobs.chosen, FLOOR))
            | {"top_logprobs": [shape(token, value) for token, value in pairs(entry)]}
            for entry in entries
        ],
        "refusal": None,
    }


def pairs(entry: TokenEntry) -> list[tuple[int, float]]:
    """The most likely tokens and their values, best first."""
    return [(token, max(value, FLOOR)) for token, value in zip(entry.logprobs.top_ids, entry.logprobs.top, strict=True)]
