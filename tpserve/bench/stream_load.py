"""The load of `tpserve bench frontend`, as its processes share it: what each stream says, and how a request names its stream.

Pure. The fake engine and the client derive the tokens of a stream from its number alone, so that whatever a client reads can be
checked to the letter. A request names its stream by its temperature, which every API hands to the engine as it came.
"""

import random
import re
from itertools import accumulate
from typing import Any, Literal

from msgspec import Struct

from tpserve.text.tokenizer import Tokenizer

StreamApi = Literal["completions", "chat", "responses", "messages"]
PATHS: dict[StreamApi, str] = {
    "completions": "/v1/completions",
    "chat": "/v1/chat/completions",
    "responses": "/v1/responses",
    "messages": "/v1/messages",
}
MAX_STREAMS = 16_384
"""Each has a temperature of its own, a multiple of one part in so many."""
_PLAIN = re.compile(r'[\w"\\,.]+')
"""Texts that no template of answers gives a meaning; quotes and backslashes are escaped in JSON."""
PROMPT = "Tell me a story"


class StreamLoad(Struct, frozen=True):
    """The inputs of every process. `rate`: steps a second; None: as fast as the clients read."""

    api: StreamApi
    streams: int
    output_len: int
    rounds: int
    rate: float | None
    seed: int
    token_ids: list[int]
    """The tokens that streams are made of: each has a text of its own, whatever stands before it."""


def plain_tokens(tokenizer: Tokenizer, vocab_size: int) -> list[int]:
    """The tokens for `StreamLoad.token_ids`."""
    texts = {token: tokenizer.token_text(token) for token in range(min(vocab_size, tokenizer.vocab_size))}
    return [token for token, text in texts.items() if _PLAIN.fullmatch(text) and not tokenizer.is_special(token)]


def tokens_of(load: StreamLoad, stream: int) -> list[int]:
    """The tokens of a stream. They differ from stream to stream."""
    return random.Random(f"{load.seed}.{stream}").choices(load.token_ids, k=load.output_len)


def texts_of(load: StreamLoad, tokenizer: Tokenizer, stream: int) -> tuple[str, list[int]]:
    """The text of a stream, and its length after each token."""
    texts = [tokenizer.token_text(token) for token in tokens_of(load, stream)]
    return "".join(texts), list(accumulate(map(len, texts)))


def temperature_of(stream: int) -> float:
    """The temperature that names a stream: exact in binary, above 0 and at most 1."""
    return (stream + 1) / MAX_STREAMS


def stream_of(temperature: float) -> int:
    """The stream that a temperature names."""
    return round(temperature * MAX_STREAMS) - 1


def body_of(load: StreamLoad, stream: int) -> dict[str, Any]:
    """The JSON body of the request of a stream."""
    body: dict[str, Any] = {"stream": True, "temperature": temperature_of(stream)}
    length = "max_output_tokens" if load.api == "responses" else "max_tokens"
    body[length] = load.output_len
    if load.api == "completions":
        return body | {"prompt": PROMPT}
    if load.api == "responses":
        return body | {"input": PROMPT, "store": False}
    return body | {"messages": [{"role": "user", "content": PROMPT}]}


def lost_and_mixed(expected: str, read: str) -> tuple[bool, bool]:
    """Whether a stream lacks something of its end, and whether it has something that is not its own."""
    return len(read) < len(expected), not expected.startswith(read)
