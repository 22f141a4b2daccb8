"""The journal: one terminal a client, whatever the engine says and in whatever order."""

import asyncio
from collections.abc import Sequence
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.http.tiny_tokenizer import EOS, byte_level
from tpserve.errors import UserError
from tpserve.frontend.journal import Journal, NewSequence, Ticket
from tpserve.text.assembler import Assembler, Piece
from tpserve.text.tokenizer import Tokenizer
from tpserve.types.messages import Abort, Add, Cut, Delta, Done, EngineInput, EngineOutput, PhaseTimes, Stats
from tpserve.types.sampling import SamplingParams

TOKENIZER = Tokenizer(byte_level(), {})
CAT = TOKENIZER.encode("the cat sat")


class Harness:
    """A journal, what it sent, and a clock that moves by hand."""

    def __init__(self) -> None:
        self.sent: list[EngineInput] = []
        self.now = 0.0
        self.journal = Journal(self.sent.extend, "tiny", clock=lambda: self.now)

    def open(self, n: int = 1, stop: Sequence[str] = (), streaming: bool = True, seed: int | None = None) -> Ticket:
        new = [NewSequence([1, 2], SamplingParams(), Assembler(TOKENIZER, stop=stop), seed, choice) for choice in range(n)]
        return self.journal.open(new, streaming=streaming)

    def value(self, name: str, **labels: str) -> float | None:
        return self.journal.metrics.registry.get_sample_value(f"tpserve:{name}", {"model_name": "tiny", **labels})


def texts(pieces: Sequence[tuple[object, Piece]]) -> str:
    return "".join(piece.text for _, piece in pieces)


def test_choices_become_requests_with_seeds() -> None:
    harness = Harness()
    harness.open(n=3)
    harness.open(seed=7)
    requests = [message.request for message in harness.sent if isinstance(message, Add)]
    assert [r.choice for r in requests] == [0, 1, 2, 0] and len({r.id for r in requests}) == 4
    assert len({r.seed for r in requests[:3]}) == 3 and requests[3].seed == 7
    assert all(0 <= r.seed < 2**64 for r in requests) and harness.journal.num_open == 4


def test_deltas_then_done() -> None:
    harness = Harness()
    ticket = harness.open()
    harness.journal.receive([Delta(0, 0, tuple(CAT[:2]))])
    first = texts(ticket.take())
    harness.journal.receive([Delta(0, 2, (*CAT[2:], EOS)), Done(0, "stop", len(CAT) + 1, cached_tokens=1)])
    ((sequence, piece),) = ticket.take()
    assert first + piece.text == "the cat sat" and piece.finish == "stop" and piece.tokens[-1] == EOS
    assert ticket.ended and sequence.cached_tokens == 1 and harness.journal.num_open == 0
    assert ticket.take() == [], "one terminal"


def test_only_the_token_that_stopped_has_no_text() -> None:
    harness = Harness()
    ticket = harness.open()
    harness.journal.receive(
        [Delta(0, 0, tuple(CAT)), Delta(0, len(CAT), (CAT[0],)), Done(0, "stop", len(CAT) + 1, stop_id=CAT[0])]
    )
    ((_, piece),) = ticket.take()
    assert (piece.text, piece.stop_reason, len(piece.tokens)) == ("the cat sat", CAT[0], len(CAT) + 1)


def test_only_the_expected_position_is_taken() -> None:
    harness = Harness()
    ticket = harness.open()
    for start in (1, 0, 0, 1, 5):
        harness.journal.receive([Delta(0, start, (CAT[start % len(CAT)],))])
    assert texts(ticket.take()) == TOKENIZER.decode(CAT[:2])


def test_stop_string_ends_the_client_and_cuts_the_engine() -> None:
    harness = Harness()
    ticket = harness.open(stop=["cat"])
    harness.journal.receive([Delta(0, 0, tuple(CAT))])
    length = len(TOKENIZER.encode("the cat"))
    assert harness.sent[1:] == [Cut(0, length)] and ticket.ended and harness.journal.num_open == 0
    harness.journal.receive([Delta(0, len(CAT), (5,)), Done(0, "stop", length)])
    ((_, piece),) = ticket.take()
    assert (piece.text, piece.finish, piece.stop_reason, piece.num_tokens) == ("the ", "stop", "cat", length)
    harness.journal.abort(ticket)
    assert len(harness.sent) == 2, "nothing is aborted that ended"


def test_abort_ends_what_is_open() -> None:
    harness = Harness()
    ticket = harness.open(n=2)
    harness.journal.receive([Done(0, "length", 0)])
    harness.journal.abort(ticket)
    harness.journal.abort(ticket)
    harness.journal.receive([Done(1, "abort", 0)])
    assert harness.sent[2:] == [Abort(1)] and harness.journal.num_open == 0
    assert harness.value("request_success_total", finished_reason="abort") == 1


@pytest.mark.parametrize(
    ("done", "status"),
    [(Done(0, "error", 0, error="no room"), 500), (Done(0, "abort", 0), 503), (Done(0, "length", 4), 500)],
)
def test_a_failed_sequence_fails_its_ticket(done: Done, status: int) -> None:
    harness = Harness()
    ticket, other = harness.open(n=2), harness.open()
    harness.journal.receive([done])
    with pytest.raises(UserError) as info:
        ticket.take()
    assert info.value.status == status and ticket.ended and harness.sent[3:] == [Abort(1)]
    assert not other.ended and harness.journal.num_open == 1


def test_fail_all_says_why_and_sends_nothing() -> None:
    harness = Harness()
    tickets = [harness.open(n=2), harness.open()]
    harness.journal.fail_all("rank 1 failed", 503)
    for ticket in tickets:
        with pytest.raises(UserError, match="rank 1 failed"):
            ticket.take()
    assert len(harness.sent) == 3 and harness.journal.num_open == 0


def test_waiting_wakes_for_what_the_reader_wants() -> None:
    async def run() -> list[str]:
        harness, seen = Harness(), []
        for streaming in (True, False):
            ticket = harness.open(streaming=streaming)
            id = ticket.sequences[0].request.id
            for message in (Delta(id, 0, tuple(CAT[:2])), Done(id, "length", 2)):
                harness.journal.receive([message])
                try:
                    await asyncio.wait_for(ticket.wait(), 0.01)
                    seen.append("awake")
                except TimeoutError:
                    seen.append("asleep")
        return seen

    assert asyncio.run(run()) == ["awake", "awake", "asleep", "awake"]


def test_metrics_of_a_request() -> None:
    harness = Harness()
    harness.open()
    for at, message in ((1.5, Delta(0, 0, (CAT[0],))), (1.75, Delta(0, 1, (CAT[1],)))):
        harness.now = at
        harness.journal.receive([message])
    harness.now = 2.0
    harness.journal.receive([Done(0, "length", 2, times=PhaseTimes(0.5, 1.0, 0.25)), Stats(1, 2, 3, 4, 0, 9, 20, 10)])
    harness.journal.receive([Stats(0, 0, 0, 4, 1, 9, 25, 12)])
    harness.journal.receive([Stats(0, 0, 0, 4, 0, 1, 5, 1)])
    sums = {"time_to_first_token_seconds": 1.5, "inter_token_latency_seconds": 0.25, "e2e_request_latency_seconds": 2.0}
    sums |= {"request_queue_time_seconds": 0.5, "request_generation_tokens": 2, "request_prompt_tokens": 2}
    assert {name: harness.value(f"{name}_sum") for name in sums} == sums
    assert harness.value("prompt_tokens_total") == 30, "a new epoch's totals are added to the old ones"
    assert harness.value("num_preemptions_total") == 1 and harness.value("kv_cache_usage_perc") == 0
    assert harness.value("request_success_total", finished_reason="length") == 1


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32))
def test_random_histories_have_one_terminal_each(seed: int) -> None:
    """Frames with drops, repeats, foreign ids, early ends: every ticket ends once, with a beginning of the right text."""
    random, harness = Random(seed), Harness()
    tickets = [harness.open(n=random.randint(1, 3), stop=random.choice([(), ("sat",)])) for _ in range(4)]
    sequences = [sequence for ticket in tickets for sequence in ticket.sequences]
    finals, got = dict.fromkeys(range(len(sequences)), 0), dict.fromkeys(range(len(sequences)), "")
    for _ in range(120):
        id, start = random.randrange(len(sequences) + 1), random.randrange(len(CAT))
        frame: list[EngineOutput] = [Delta(id, start, tuple(CAT[start : start + random.randint(1, 2)]))]
        if random.random() < 0.03:
            frame.append(Done(id, random.choice(["stop", "length", "abort", "error"]), random.randint(0, len(CAT))))
        harness.journal.receive(frame)
        ticket = random.choice(tickets)
        if random.random() < 0.02:
            harness.journal.abort(ticket)
        if ticket.failure is None:
            for sequence, piece in ticket.take():
                got[sequence.request.id] += piece.text
                finals[sequence.request.id] += piece.finish is not None
    harness.journal.fail_all("over", 503)
    assert harness.journal.num_open == 0 and all(ticket.ended for ticket in tickets)
    assert all(count <= 1 for count in finals.values())
    assert all("the cat sat".startswith(text) for text in got.values())
    counted = [harness.value("request_success_total", finished_reason=r) for r in ("stop", "length", "abort", "error")]
    assert sum(value or 0 for value in counted) == len(sequences)
