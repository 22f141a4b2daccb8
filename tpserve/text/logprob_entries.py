"""What is known of single tokens: log probabilities of an output's tokens as they come, and of a whole prompt's.

Pure data beside the assembler; never knows HTTP or other requests. Invariants of `PromptScores`:

    taken      a beginning of the prompt: chunks may repeat what is known, and never leave a gap
    complete   every token but the first has its log probability; the first follows nothing and has none
"""

from array import array
from collections.abc import Sequence

from msgspec import Struct

from tpserve.text.tokenizer import Tokenizer
from tpserve.types.plan import PromptLogprobs, TokenLogprobs


class TokenEntry(Struct, frozen=True):
    """One token's log probabilities, None for a prompt's first token.

    `offset`: characters of the output's text, or of the echoed prompt's, before the one in which it begins.
    """

    token: int
    offset: int
    logprobs: TokenLogprobs | None


class PromptScores:
    """The log probabilities of one prompt, taken chunk by chunk. One choice of the prompt fills them, all may show them.

    Kept packed: 30 000 tokens with the 20 most likely ones of each take 5 MB.
    """

    def __init__(self, prompt: Sequence[int]) -> None:
        self.ids = prompt
        self._chosen = array("f")
        self._top_ids = array("i")
        self._top = array("f")
        self._num_top = 0

    def push(self, start: int, chunk: PromptLogprobs) -> bool:
        """Take the scores of the tokens from position `start` on; False unless they hold the next one and fit the prompt."""
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
        return len(self._chosen) == len(self.ids) - 1

    @property
    def num_values(self) -> int:
        """Log probabilities taken so far."""
        return len(self._chosen) + len(self._top)

    def at(self, position: int, num_top: int) -> TokenLogprobs | None:
        """The token at `position` with its `num_top` most likely rivals; None for the first."""
        if position == 0:
            return None
        begin = (position - 1) * self._num_top
        end = begin + min(num_top, self._num_top)
        return TokenLogprobs(self._chosen[position - 1], tuple(self._top_ids[begin:end]), tuple(self._top[begin:end]))

    def entries(self, tokenizer: Tokenizer, text: str, num_top: int, num_open: int = 0) -> list[TokenEntry]:
        """One entry a token but the last `num_open`, for a client that is shown the prompt as `text`."""
        offsets = token_offsets(tokenizer, self.ids[: len(self.ids) - num_open], text)
        return [TokenEntry(self.ids[i], offset, self.at(i, num_top)) for i, offset in enumerate(offsets)]

    def open_entries(self, offsets: Sequence[int], num_top: int) -> list[TokenEntry]:
        """The entries of the last tokens, whose text begins the output's: `Piece.open_offsets`."""
        first = len(self.ids) - len(offsets)
        return [TokenEntry(self.ids[i], offset, self.at(i, num_top)) for i, offset in enumerate(offsets, first)]


def token_offsets(tokenizer: Tokenizer, ids: Sequence[int], text: str) -> list[int]:
    """Characters of `text` before each of its tokens.

    A special token counts where the text spells it, and adds none where it does not (a beginning that the tokenizer added).
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
