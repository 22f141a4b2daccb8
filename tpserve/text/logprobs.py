"""Builds log probabilities in the shapes of the OpenAI API and of vLLM, and ranks outputs by them. Pure; returns JSON values."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from tpserve.text.assembler import OutputDelta
from tpserve.text.logprob_entries import PromptScores, TokenEntry
from tpserve.text.tokenizer import Tokenizer
from tpserve.types.plan import TokenLogprobs

FLOOR = -9999.0
"""Replaces -inf, which JSON lacks; the value that vLLM sends."""


Spell = Callable[[int], str]
"""How a token is written: `spelled` or `as_id`."""


def completion_logprobs(entries: Sequence[TokenEntry], spell: Spell, base_offset: int = 0) -> dict[str, Any]:
    """The completions shape. `top_logprobs` includes the chosen token, so it may have one entry more than requested.

    `base_offset`: characters of the response's text before the output (an echoed prompt).
    """

    def top(entry: TokenEntry) -> dict[str, float] | None:
        if entry.logprobs is None:
            return None
        named = {entry.token: spell(entry.token)}
        values = {named[entry.token]: max(entry.logprobs.chosen, FLOOR)}
        for token, value in pairs(entry.logprobs):
            if token not in named:
                named[token] = spell(token)
                values[named[token] if named[token] not in values else as_id(token)] = value
        return values

    return {
        "tokens": [spell(entry.token) for entry in entries],
        "token_logprobs": [max(entry.logprobs.chosen, FLOOR) if entry.logprobs else None for entry in entries],
        "top_logprobs": [top(entry) for entry in entries],
        "text_offset": [base_offset + entry.offset for entry in entries],
    }


def as_id(token: int) -> str:
    """A token by its id, as vLLM writes it."""
    return f"token_id:{token}"


def spelled(token: int, tokenizer: Tokenizer) -> str:
    """A token as the completions API writes it: its text or, for incomplete UTF-8, its bytes ("bytes:\\xf0\\x9f")."""
    data = tokenizer.token_bytes(token)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(chr(byte) if 0x20 <= byte < 0x7F and byte != 0x5C else f"\\x{byte:02x}" for byte in data)


def chat_logprobs(entries: Sequence[TokenEntry], tokenizer: Tokenizer, spell: Spell | None = None) -> dict[str, Any]:
    """The chat shape: entries with exact bytes, so that a client can join characters that are split between tokens.

    `spell`: None for the token's text.
    """
    spell = spell or tokenizer.token_text

    def shape(token: int, value: float) -> dict[str, Any]:
        data = tokenizer.token_bytes(token)
        return {"token": spell(token), "logprob": value, "bytes": list(data)}

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
    """vLLM's shape: for each position the most likely tokens and the prompt's token, by id.

    `rank` is None for a prompt token that is not among the most likely ones.
    """

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
    """The `count` complete outputs with the highest mean log probability per token, best first; ties keep their order."""

    def mean(delta: OutputDelta) -> float:
        values = [entry.logprobs.chosen for entry in delta.entries if entry.logprobs is not None]
        return sum(values) / len(values) if values else 0.0

    return sorted(pieces, key=mean, reverse=True)[:count]
