"""Turns token ids into output deltas: text, stop strings, log probability entries, the finish reason.

One `Assembler` a sequence, without I/O: `push` the engine's tokens, `end` with the engine's finish reason, `take` the deltas.
It never knows HTTP, other sequences or time. Invariants:

    text     decoded = [taken][ready to take][held back: may begin a stop string][not certain: see `stream`]
    tokens   every token up to the end is in exactly one delta, with its log probabilities, once its offset in the text is known
    end      reached once; tokens pushed later are dropped
    prompt   with `scores`, nothing becomes visible before they are complete; the first delta contains them
    deltas   the split of tokens into pushes changes neither the joined text, nor the tokens, nor the end
    echo     the text of a prompt without its last `num_open` tokens, joined with the output's, is the text of all their tokens

The engine decides on EOS and stop tokens, the assembler on stop strings: after a match `num_tokens` is the length to which
the engine may truncate the sequence.
"""

from collections.abc import Collection, Sequence

from msgspec import Struct

from tpserve.text.logprob_entries import PromptScores, TokenEntry
from tpserve.text.tokenizer import Tokenizer
from tpserve.types.messages import FinishReason
from tpserve.types.plan import TokenLogprobs


class OutputDelta(Struct, frozen=True):
    """The output that became visible since the previous delta. Only the last delta has `finish`.

    `stop_reason`: the stop string or stop token that ended the sequence, None for EOS or length.
    `num_tokens`: output tokens so far, this delta included. `offsets`: the index in the output's text of each of `tokens`.
    `scores`: of the prompt, on the first delta if requested.
    `open_offsets`: on the first delta, the index in the output's text of each open token of an echoed prompt.
    """

    text: str
    tokens: list[int]
    entries: list[TokenEntry]
    num_tokens: int
    offsets: list[int] = []
    finish: FinishReason | None = None
    stop_reason: str | int | None = None
    scores: PromptScores | None = None
    open_offsets: list[int] = []


class Assembler:
    """The output of one sequence after `prompt`. Stop strings are not empty, and are ignored in the first `min_tokens` tokens.

    All choices of a prompt may share `scores`. `num_open`: tokens at the end of an echoed prompt whose text the output may
    change (`Tokenizer.num_open`); the output's text begins with theirs. `shown`: special tokens that are not skipped.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: Sequence[int] = (),
        *,
        stop: Sequence[str] = (),
        stop_token_ids: Collection[int] = (),
        include_stop: bool = False,
        min_tokens: int = 0,
        skip_special_tokens: bool = True,
        scores: PromptScores | None = None,
        num_open: int = 0,
        shown: frozenset[int] = frozenset(),
    ) -> None:
        assert all(stop), "an empty stop string matches everywhere"
        closed = len(prompt) - num_open
        self._stream = tokenizer.stream(prompt[:closed], skip_special_tokens, shown)
        self._stop = tuple(stop)
        self._stop_token_ids = frozenset(stop_token_ids)
        self._include_stop = include_stop
        self._min_tokens = min_tokens
        self._num_open = num_open
        self._num_taken = 0
        self._search_at: int | None = None
        """Index in the text of the first token that may contain a stop string; None: not known yet."""
        self._held = ""
        self._ready: list[str] = []
        self._tokens: list[int] = []
        self._logprobs: list[TokenLogprobs] = []
        self._begun = False
        self._end_taken = False
        self.scores = scores
        self.num_tokens = 0
        self.finish: FinishReason | None = None
        self.stop_reason: str | int | None = None
        for token in prompt[closed:]:
            self._add(self._stream.step(token))

    def push(self, tokens: Sequence[int], logprobs: Sequence[TokenLogprobs] = (), *, stops: bool = False) -> None:
        """Add the next tokens. `logprobs`: one a token, or none. `stops`: the last token is an EOS or stop token without text."""
        last = len(tokens) - 1
        for index, token in enumerate(tokens):
            if self.finish is not None:
                return
            self.num_tokens += 1
            self._tokens.append(token)
            if logprobs:
                self._logprobs.append(logprobs[index])
            if not self._include_stop and (token in self._stop_token_ids or (stops and index == last)):
                self._stream.skip()
                self._add("")
            else:
                self._add(self._stream.step(token))
                if self._stop:
                    self._search_pending()

    def end(self, finish: FinishReason, stop_id: int | None = None) -> None:
        """End with the engine's finish reason. Ignored after a stop string, which came first."""
        if self.finish is None:
            self._add(self._stream.flush())
        if self.finish is None:
            self._finish(finish, stop_id)

    def abandon(self, finish: FinishReason) -> None:
        """End without the held-back text. Decodes nothing, so it also works after a decoding error."""
        if self.finish is None:
            self._finish(finish, None)

    @property
    def has_news(self) -> bool:
        """Whether `take` would return a delta."""
        if self.scores is not None and not self.scores.complete:
            return False
        placed = self._begun or len(self._stream.offsets) >= self._num_open
        return placed and (bool(self._ready) or (self.finish is not None and not self._end_taken))

    def take(self) -> OutputDelta | None:
        """The delta since the last call; None without new text and before the end."""
        if not self.has_news:
            return None
        offsets, self._stream.offsets = self._stream.offsets, []
        self._num_taken += len(offsets)
        own = 0 if self._begun else self._num_open
        open_offsets, offsets = offsets[:own], offsets[own:] if own else offsets
        count, entries = len(offsets), list[TokenEntry]()
        tokens, self._tokens = self._tokens, []
        if count < len(tokens):
            tokens, self._tokens = tokens[:count], tokens[count:]
        if self._logprobs:
            logprobs, self._logprobs = self._logprobs[:count], self._logprobs[count:]
            entries = [TokenEntry(*entry) for entry in zip(tokens, offsets, logprobs, strict=True)]
        ready, self._ready = self._ready, []
        scores, self._begun = None if self._begun else self.scores, True
        self._end_taken = self.finish is not None
        text = ready[0] if len(ready) == 1 else "".join(ready)
        return OutputDelta(text, tokens, entries, self.num_tokens, offsets, self.finish, self.stop_reason, scores, open_offsets)

    def _add(self, new: str) -> None:
        """Search new certain text for stop strings; hold back an end that may begin one."""
        if not self._stop:
            if new:
                self._ready.append(new)
            return
        if self._search_at is None and self._num_placed > self._num_unsearched:
            self._search_at = self._stream.offsets[self._num_unsearched - self._num_taken]
        if not new:
            return
        first = self._num_not_searched(len(new))
        if first:
            self._ready.append(self._held + new[:first])
            self._held = ""
        if first == len(new):
            return
        text = self._held + new[first:]
        if match := first_match(text, self._stop):
            at, stop = match
            text = text[: at + len(stop)] if self._include_stop else text[:at]
            self._held = ""
            if text:
                self._ready.append(text)
            self._stream.flush()
            self._finish("stop", stop)
            return
        certain = len(text) - longest_beginning(text, self._stop)
        self._held = text[certain:]
        if certain:
            self._ready.append(text[:certain])

    @property
    def _num_unsearched(self) -> int:
        """Tokens in which stop strings are ignored."""
        return self._num_open + self._min_tokens

    @property
    def _num_placed(self) -> int:
        """Tokens whose offset in the text is known, open tokens of the prompt included."""
        return self._num_taken + len(self._stream.offsets)

    def _num_not_searched(self, count: int) -> int:
        """How many of the last `count` characters belong to tokens in which stop strings are ignored."""
        if self._search_at is None:
            return count
        return min(count, max(0, self._search_at - (self._stream.chars - count)))

    def _search_pending(self) -> None:
        """Search the uncertain text, too: a match ends the sequence although later tokens could change that text."""
        if self.finish is None and self._num_placed >= self._num_unsearched:
            pending = self._stream.pending
            if pending and first_match(self._held + pending, self._stop):
                self._add(self._stream.flush())

    def _finish(self, finish: FinishReason, stop_reason: str | int | None) -> None:
        if self._held:
            self._ready.append(self._held)
            self._held = ""
        self.finish = finish
        self.stop_reason = stop_reason


def first_match(text: str, stops: Sequence[str]) -> tuple[int, str] | None:
    """(index, stop string) of the first match; of two at the same index, the earlier one in `stops`."""
    matches = [(at, order) for order, stop in enumerate(stops) if (at := text.find(stop)) >= 0]
    if not matches:
        return None
    at, order = min(matches)
    return at, stops[order]


def longest_beginning(text: str, stops: Sequence[str]) -> int:
    """Length of the longest suffix of `text` that is a proper prefix of a stop string: at most max(len(stop)) - 1."""
    longest = 0
    for stop in stops:
        for length in range(min(len(stop) - 1, len(text)), longest, -1):
            if text.endswith(stop[:length]):
                longest = length
                break
    return longest
