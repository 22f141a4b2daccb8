"""Clients of the request table, each with the answer that an undisturbed run gives, and the checks of what they really get."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tests.scheduling.simulator import draw
from tests.simulation.mesh import POISON
from tpserve.engine_client.requests import RequestHandle
from tpserve.errors import UserError
from tpserve.text.assembler import Assembler, first_match
from tpserve.types.messages import FinishReason
from tpserve.types.packed import pack, unpack
from tpserve.types.request import Request
from tpserve.types.sampling import EngineSamplingParams

if TYPE_CHECKING:
    from tests.simulation.world import SimulatedService


def letter(token: int) -> str:
    return chr(97 + token % 26)


class LetterStream:
    """A `TextStream`: each token is one letter."""

    pending = ""

    def __init__(self) -> None:
        self.chars = 0
        self.offsets: list[int] = []

    def step(self, token: int) -> str:
        self.offsets.append(self.chars)
        self.chars += 1
        return letter(token)

    def skip(self) -> None:
        self.offsets.append(self.chars)

    def flush(self) -> str:
        return ""


class LetterTokenizer:
    """What an `Assembler` needs of a tokenizer."""

    def stream(self, prompt: Sequence[int], skip_special_tokens: bool, shown: frozenset[int]) -> LetterStream:
        return LetterStream()


@dataclass
class Answer:
    """One sequence: what an undisturbed run gives, and what has arrived."""

    expected: list[int]
    finish: FinishReason
    tokens: list[int] = field(default_factory=list)
    ended: FinishReason | None = None


def undisturbed(request: Request, stop: Sequence[str], vocab_size: int) -> Answer:
    """The answer of a run without faults."""
    known, tokens, text = list(unpack(request.prompt)), list[int](), ""
    while len(tokens) < request.params.max_tokens:
        token = draw(known, request.seed, request.choice, vocab_size)
        known.append(token)
        tokens.append(token)
        if token in request.params.stop_token_ids:
            return Answer(tokens, "stop")
        text += letter(token)
        if first_match(text, stop):
            return Answer(tokens, "stop")
    return Answer(tokens, "length")


class SimulatedClient:
    """One client's request, which may have several choices."""

    def __init__(self, service: "SimulatedService", *, poison: bool = False) -> None:
        self.service, self.poison = service, poison
        random, table = service.random, service.frontend.table
        prompt = [random.randrange(POISON) for _ in range(random.choice([1, 3, 8, 18]))]
        if poison:
            prompt = [POISON, random.choice([0, 0, 1, 5]), *prompt]
        params = EngineSamplingParams(
            max_tokens=random.choice([1, 3, 6, 10, 20]),
            stop_token_ids=(random.randrange(service.vocab_size),) if random.random() < 0.3 else (),
        )
        stop = [letter(random.randrange(26)) + letter(random.randrange(26))] if random.random() < 0.2 else []
        seed, self.answers, requests = random.getrandbits(32), list[Answer](), []
        for choice in range(2 if random.random() < 0.2 else 1):
            request = Request(table.next_id(), pack(prompt), params, seed, choice, priority=random.choice([0, 0, 0, 1]))
            self.answers.append(undisturbed(request, stop, service.vocab_size))
            assembler = Assembler(LetterTokenizer(), prompt, stop=stop, stop_token_ids=params.stop_token_ids)  # type: ignore[arg-type]
            requests.append((request, assembler))
        self.failure: UserError | None = None
        self.left = False
        self.handle: RequestHandle = table.open(requests, streaming=True)

    @property
    def quarantined(self) -> bool:
        return self.failure is not None and self.failure.code == "request_quarantined"

    @property
    def done(self) -> bool:
        return self.left or self.failure is not None or all(answer.ended for answer in self.answers)

    def leave(self) -> None:
        """Disconnect."""
        if not self.done:
            self.take()
            self.left = True
            self.service.frontend.table.abort(self.handle)

    def take(self) -> None:
        """Read what has arrived: the next tokens of the undisturbed answer, and nothing after the end."""
        if self.done:
            return
        try:
            deltas = self.handle.take()
        except UserError as error:
            assert self.service.ends or error.code == "request_quarantined", f"a client gets an error: {error}"
            self.failure = error
            return
        for sequence, delta in deltas:
            answer = self.answers[sequence.index]
            assert answer.ended is None, "output after the end"
            answer.tokens += delta.tokens
            assert answer.tokens == answer.expected[: len(answer.tokens)], (
                f"request {sequence.request.id}: {answer.tokens} is not the beginning of {answer.expected}"
            )
            answer.ended = delta.finish
            if answer.ended is not None:
                assert (len(answer.tokens), answer.ended) == (len(answer.expected), answer.finish), f"ended early: {answer}"
