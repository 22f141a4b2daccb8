"""Log probabilities of single tokens: of an output's tokens, and of all tokens of a prompt.

Pure data that the assembler uses; never knows HTTP or other requests. Invariants of `PromptScores`:

    taken      the scores cover a prefix of the prompt: chunks may overlap it, but never leave a gap
    complete   every token except the first has its log probability; the first token has none
"""

from array import array
from collections.abc import Sequence

from msgspec import Struct

from tpserve.text.tokenizer import Tokenizer
from tpserve.types.plan import PromptLogprobs, TokenLogprobs


class TokenEntry(Struct, frozen=True):
    """One token's log probabilities, None for a prompt's first token.

    `offset`: index in the text of the output, or of the echoed prompt, of the character in which the token begins.
    """

    token: int
    offset: int
    logprobs: TokenLogprobs | None


class PromptScores:
    """The log probabilities of one prompt, added chunk by chunk. One choice fills them, all choices may return them.

    Stored packed: 30 000 tokens with the 20 most likely ones of each take 5 MB.
    """

    def __init__(self, prompt: Sequence[int]) -> None:
        self.ids = prompt
        self._chosen = array("f")
        self._top_ids = array("i")
        self._top = array("f")
        self._num_top = 0

    def push(self, start: int, chunk: PromptLogprobs) -> bool:
        """Add the scores of the tokens from position `start` on. False if they leave a gap, add nothing, or exceed the prompt."""
        known = len(self._chosen) + 1 - start
        if not 0 <= known < chunk.num_tokens or start + chunk.num_tokens > len(self.ids):
            return False
        new = chunk.after(known)
        self._num_top = new.num_top
        self._chosen.frombytes(new.chosen)
        self._top_ids.frombytes(new.top_ids)
        self._top.frombytes(new.top)
        return True

    @property
    def complete(self) -> bool:
        """Whether every token except the first has its log probability."""
        return len(self._chosen) == len(self.ids) - 1

    @property
    def num_values(self) -> int:
        """Number of log probabilities stored so far."""
        return len(self._chosen) + len(self._top)

    def at(self, position: int, num_top: int) -> TokenLogprobs | None:
        """The log probability at `position`, with those of the `num_top` most likely tokens; None for the first token."""
        if position == 0:
            return None
        begin = (position - 1) * self._num_top
        end = begin + min(num_top, self._num_top)
        return TokenLogprobs(self._chosen[position - 1], tuple(self._top_ids[begin:end]), tuple(self._top[begin:end]))

    def entries(self, tokenizer: Tokenizer, text: str, num_top: int, num_open: int = 0) -> list[TokenEntry]:
        """One entry for each token except the last `num_open`. `text`: the prompt as the response echoes it."""
        offsets = token_offsets(tokenizer, self.ids[: len(self.ids) - num_open], text)
        return [TokenEntry(self.ids[i], offset, self.at(i, num_top)) for i, offset in enumerate(offsets)]

    def open_entries(self, offsets: Sequence[int], num_top: int) -> list[TokenEntry]:
        """The entries of the open tokens at the end of the prompt; `offsets`: `OutputDelta.open_offsets`."""
        first = len(self.ids) - len(offsets)
        return [TokenEntry(self.ids[i], offset, self.at(i, num_top)) for i, offset in enumerate(offsets, first)]


def token_offsets(tokenizer: Tokenizer, ids: Sequence[int], text: str) -> list[int]:
    """The index in `text` at which each token begins.

    A special token that `text` does not spell (a BOS that the tokenizer added) has no characters.
    """
    stream = tokenizer.stream(skip_special_tokens=False)
    for token in ids:
        at = stream.chars + len(stream.pending)
        if tokenizer.is_special(token) and not text.startswith(tokenizer.piece(token), at):
            stream.skip()
        else:
            stream.step(token)
    stream.flush()
    return [min(offset, len(text)) for offset in stream.offsets]
