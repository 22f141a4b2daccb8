"""Log probabilities in the shapes of the OpenAI API and of vLLM, and what follows from them. Pure, plain JSON values out."""

from collections.abc import Iterable, Sequence
from typing import Any

from tpserve.text.assembler import OutputDelta
from tpserve.text.logprob_entries import PromptScores, TokenEntry
from tpserve.text.tokenizer import Tokenizer
from tpserve.types.plan import TokenLogprobs

FLOOR = -9999.0
"""JSON has no -inf; the lowest value that clients are used to."""


def completion_logprobs(entries: Sequence[TokenEntry], tokenizer: Tokenizer, base_offset: int = 0) -> dict[str, Any]:
    """The completions shape. `top_logprobs` holds the chosen token too, so it may have one entry more than was asked for.

    `base_offset`: characters before the output in the text that the client gets (an echoed prompt).
    """

    def top(entry: TokenEntry) -> dict[str, float] | None:
        if entry.logprobs is None:
            return None
        named = {entry.token: spelled(entry.token, tokenizer)}
        values = {named[entry.token]: max(entry.logprobs.chosen, FLOOR)}
        for token, value in pairs(entry.logprobs):
            if token not in named:
                named[token] = spelled(token, tokenizer)
                values[named[token] if named[token] not in values else f"token_id:{token}"] = value
        return values

    return {
        "tokens": [spelled(entry.token, tokenizer) for entry in entries],
        "token_logprobs": [max(entry.logprobs.chosen, FLOOR) if entry.logprobs else None for entry in entries],
        "top_logprobs": [top(entry) for entry in entries],
        "text_offset": [base_offset + entry.offset for entry in entries],
    }


def spelled(token: int, tokenizer: Tokenizer) -> str:
    """A token as the completions API names it: its text, or, when that is no whole characters, its bytes ("bytes:\\xf0\\x9f")."""
    data = tokenizer.token_bytes(token)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(chr(byte) if 0x20 <= byte < 0x7F and byte != 0x5C else f"\\x{byte:02x}" for byte in data)


def chat_logprobs(entries: Sequence[TokenEntry], tokenizer: Tokenizer) -> dict[str, Any]:
    """The chat shape: a list of entries with exact bytes, so that characters cut between tokens can be put together."""

    def shape(token: int, value: float) -> dict[str, Any]:
        data = tokenizer.token_bytes(token)
        return {"token": tokenizer.token_text(token), "logprob": value, "bytes": list(data)}

    return {
        "content": [
            shape(entry.token, max(entry.logprobs.chosen, FLOOR))
            | {"top_logprobs": [shape(token, value) for token, value in pairs(entry.logprobs)]}
            for entry in entries
            if entry.logprobs is not None
        ],
        "refusal": None,
    }


def prompt_logprobs(
    scores: PromptScores, positions: Iterable[int], num_top: int, tokenizer: Tokenizer
) -> list[dict[str, Any] | None]:
    """vLLM's shape: a position's most likely tokens by id, and its own. The rank of one that is not among them is not known."""

    def shape(token: int, value: float, rank: int | None) -> dict[str, Any]:
        return {"logprob": value, "rank": rank, "decoded_token": tokenizer.token_text(token)}

    def at(position: int) -> dict[str, Any] | None:
        if (logprobs := scores.at(position, num_top)) is None:
            return None
        found = {str(token): shape(token, value, rank) for rank, (token, value) in enumerate(pairs(logprobs), 1)}
        token = scores.ids[position]
        found.setdefault(str(token), shape(token, max(logprobs.chosen, FLOOR), None))
        return found

    return [at(position) for position in positions]


def pairs(logprobs: TokenLogprobs) -> list[tuple[int, float]]:
    """The most likely tokens and their values, best first."""
    return [(token, max(value, FLOOR)) for token, value in zip(logprobs.top_ids, logprobs.top, strict=True)]


def likeliest(pieces: Sequence[OutputDelta], count: int) -> list[OutputDelta]:
    """The `count` whole outputs with the highest mean log probability of a token, best first; of equal ones the first."""

    def mean(delta: OutputDelta) -> float:
        values = [entry.logprobs.chosen for entry in delta.entries if entry.logprobs is not None]
        return sum(values) / len(values) if values else 0.0

    return sorted(pieces, key=mean, reverse=True)[:count]
