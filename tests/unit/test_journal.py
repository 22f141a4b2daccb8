"""The journal: one terminal a client, whatever the engine says and in whatever order."""

import asyncio
from array import array
from collections.abc import Sequence
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.http.tiny_tokenizer import EOS, byte_level
from tpserve.errors import UserError
from tpserve.frontend.journal import Journal, Ticket
from tpserve.text.assembler import Assembler, Piece
from tpserve.text.entries import PromptScores
from tpserve.text.tokenizer import Tokenizer
from tpserve.types.messages import Abort, Add, Cut, Delta, Done, EngineInput, EngineOutput, PhaseTimes, Scored, Stats
from tpserve.types.packed import pack
from tpserve.types.plan import PromptLogprobs
from tpserve.types.request import Request
from tpserve.types.sampling import SamplingParams
from tpserve.wire import codec

TOKENIZER = Tokenizer(byte_level(), {})
CAT = TOKENIZER.encode("the cat sat")
PLAIN = SamplingParams()


class Harness:
    """A journal, what it sent, and a clock that moves by hand."""

    def __init__(self) -> None:
        self.sent: list[EngineInput] = []
        self.now = 0.0
        self.journal = Journal(self.sent.extend, "tiny", clock=lambda: self.now)

    def open(self, n: int = 1, stop: Sequence[str] = (), streaming: bool = True, seed: int = 1) -> Ticket:
        requests = [(self.request([1, 2], choice=choice, seed=seed), Assembler(TOKENIZER, stop=stop)) for choice in range(n)]
        return self.journal.open(requests, streaming=streaming)

    def request(self, prompt: list[int], params: SamplingParams = PLAIN, seed: int = 1, **more: Any) -> Request:
        return Request(self.journal.next_id(), pack(prompt), params, seed, **more)

    def open_scored(self, n: int = 1, stop: Sequence[str] = (), max_tokens: int = 16) -> Ticket:
        """Choices of a prompt of four tokens, the first of which is scored."""
        scores = PromptScores([1, 2, 3, 4])
        params = [SamplingParams(max_tokens=max_tokens, prompt_logprobs=None if choice else 0) for choice in range(n)]
        requests = [(self.request([1, 2, 3, 4], p), Assembler(TOKENIZER, stop=stop, scores=scores)) for p in params]
        return self.journal.open(requests, streaming=True)

    def value(self, name: str, **labels: str) -> float | None:
        return self.journal.metrics.registry.get_sample_value(f"tpserve:{name}", {"model_name": "tiny", **labels})


def scored(id: int, start: int, count: int) -> Scored:
    return Scored(id, start, PromptLogprobs(0, array("f", [-1.0] * count).tobytes(), b"", b""))


def texts(pieces: Sequence[tuple[object, Piece]]) -> str:
    return "".join(piece.text for _, piece in pieces)


def test_choices_become_requests_with_numbers() -> None:
    harness = Harness()
    harness.open(n=3)
    harness.open(seed=7)
    requests = [message.request for message in harness.sent if isinstance(message, Add)]
    assert [r.choice for r in requests] == [0, 1, 2, 0] and len({r.id for r in requests}) == 4
    assert requests[3].seed == 7 and harness.journal.num_open == 4


def test_deltas_then_done() -> None:
    harness = Harness()
    ticket = harness.open()
    harness.journal.receive([Delta(0, 0, tuple(CAT[:2]), cached_tokens=1)])
    first = texts(ticket.take())
    harness.journal.receive([Delta(0, 2, (*CAT[2:], EOS)), Done(0, "stop", len(CAT) + 1)])
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


def test_priority_and_salt_go_with_the_request() -> None:
    harness = Harness()
    request = harness.request([1], choice=2, priority=-3, cache_salt="salt")
    harness.journal.open([(request, Assembler(TOKENIZER))], streaming=False)
    (add,) = harness.sent
    assert isinstance(add, Add) and (add.request.choice, add.request.priority, add.request.cache_salt) == (2, -3, "salt")


def test_scores_come_before_the_answer() -> None:
    """Repeated and stray ones are dropped, and so are tokens that come before their prompt's scores."""
    harness = Harness()
    ticket = harness.open_scored(n=2)
    for message in (scored(0, 2, 2), Delta(0, 0, tuple(CAT)), scored(1, 1, 3), scored(0, 1, 1), scored(0, 1, 1), scored(9, 1, 1)):
        harness.journal.receive([message])
        assert ticket.take() == []
    harness.journal.receive([Delta(1, 0, tuple(CAT)), Done(1, "length", len(CAT))])
    assert ticket.take() == [], "the second choice shows the scores of the first"
    harness.journal.receive([scored(0, 1, 3)])
    ((sequence, piece),) = ticket.take()
    assert (sequence.index, piece.text, piece.finish) == (1, "the cat sat", "length") and piece.scores is not None
    harness.journal.receive([scored(0, 1, 3), Delta(0, 0, tuple(CAT)), Done(0, "length", len(CAT))])
    ((sequence, piece),) = ticket.take()
    assert (sequence.index, piece.text) == (0, "the cat sat") and piece.scores is not None
    assert ticket.ended and harness.journal.num_open == 0 and len(harness.sent) == 2


def test_complete_scores_wake_who_waited() -> None:
    async def run() -> bool:
        harness = Harness()
        ticket = harness.open_scored(n=2)
        harness.journal.receive([Delta(1, 0, tuple(CAT))])
        assert not ticket._wake.is_set()
        harness.journal.receive([scored(0, 1, 3)])
        await asyncio.wait_for(ticket.wait(), 1)
        return texts(ticket.take()) != ""

    assert asyncio.run(run())


def test_scores_alone_are_an_answer() -> None:
    harness = Harness()
    ticket = harness.open_scored(max_tokens=0)
    harness.journal.receive([scored(0, 1, 3), Done(0, "length", 0)])
    ((_, piece),) = ticket.take()
    assert (piece.text, piece.tokens, piece.finish) == ("", [], "length") and piece.scores is not None and ticket.ended


@pytest.mark.parametrize("messages", [[], [scored(0, 1, 2)], [scored(0, 1, 2), Delta(0, 0, tuple(CAT))]])
def test_lost_scores_are_a_failure(messages: list[EngineOutput]) -> None:
    harness = Harness()
    ticket = harness.open_scored(n=2)
    harness.journal.receive([*messages, Done(0, "length", 0)])
    with pytest.raises(UserError, match="scores of the prompt were lost") as info:
        ticket.take()
    assert info.value.status == 500 and ticket.ended and harness.sent[2:] == [Abort(1)] and harness.journal.num_open == 0


@pytest.mark.parametrize("end", ["abort", "fail", "done"])
def test_a_stop_string_while_the_prompt_is_scored(end: str) -> None:
    """The engine is cut at once; the client has its one terminal when the scores are there, or whatever ends the request."""
    harness = Harness()
    ticket = harness.open_scored(n=2, stop=["cat"])
    harness.journal.receive([scored(0, 1, 1), Delta(1, 0, tuple(CAT))])
    assert harness.sent[2:] == [Cut(1, len(TOKENIZER.encode("the cat")))] and harness.journal.num_open == 1
    assert ticket.take() == [] and not ticket.ended
    if end == "abort":
        harness.journal.abort(ticket)
        assert harness.sent[3:] == [Abort(0)] and ticket.take() == []
    elif end == "fail":
        harness.journal.fail_all("rank 1 failed", 503)
        with pytest.raises(UserError, match="rank 1 failed"):
            ticket.take()
    else:
        harness.journal.receive([scored(0, 2, 2), Done(0, "length", 0)])
        assert [(s.index, piece.text, piece.finish) for s, piece in ticket.take()] == [(0, "", "length"), (1, "the ", "stop")]
    harness.journal.receive([scored(0, 2, 2), Done(0, "abort", 0), Done(1, "stop", 3)])
    assert ticket.ended and harness.journal.num_open == 0 and len(harness.sent) <= 4


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


@pytest.mark.parametrize("bad", [Delta(0, 0, (2**40,)), Scored(0, 1, PromptLogprobs(0, b"\0" * 6, b"", b""))])
def test_what_the_journal_cannot_take_fails_its_own_request(bad: EngineOutput, caplog: pytest.LogCaptureFixture) -> None:
    harness = Harness()
    ticket = harness.open_scored(n=2) if isinstance(bad, Scored) else harness.open(n=2)
    other = harness.open()
    harness.journal.receive([bad, Delta(2, 0, tuple(CAT)), Done(2, "length", len(CAT))])
    assert ticket.ended and sorted(message.id for message in harness.sent if isinstance(message, Abort)) == [0, 1]
    with pytest.raises(UserError, match="error of its own with this request") as failed:
        ticket.take()
    assert failed.value.status == 500 and "request 0 fails in the frontend" in caplog.text
    assert texts(other.take()) == "the cat sat", "the others notice nothing"
    assert harness.journal.num_open == 0


def test_a_request_that_cannot_be_sent_fails_and_is_not_left_open() -> None:
    harness = Harness()

    def send(inputs: Sequence[EngineInput]) -> None:
        harness.sent.extend(codec.ENGINE_INPUT.decode(codec.ENGINE_INPUT.encode(inputs)))

    harness.journal = Journal(send, "tiny")
    ticket = harness.open(seed=2**70)
    with pytest.raises(UserError, match="cannot be sent"):
        ticket.take()
    assert harness.journal.num_open == 0 and not harness.sent
    harness.open(seed=1)
    assert harness.journal.num_open == 1


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
    assert harness.value("prefix_cache_hits_total") == 0
    harness.journal.receive([Done(0, "length", 2, times=PhaseTimes(0.5, 1.0, 0.25)), Stats(1, 2, 3, 4, 0, 9, 20, 10, 30, 16)])
    harness.journal.receive([Stats(0, 0, 0, 4, 1, 9, 25, 12, 30, 16)])
    harness.journal.receive([Stats(0, 0, 0, 4, 0, 1, 5, 1, 8, 0)])
    sums = {"time_to_first_token_seconds": 1.5, "inter_token_latency_seconds": 0.25, "e2e_request_latency_seconds": 2.0}
    sums |= {"request_queue_time_seconds": 0.5, "request_generation_tokens": 2, "request_prompt_tokens": 2}
    assert {name: harness.value(f"{name}_sum") for name in sums} == sums
    assert harness.value("prompt_tokens_total") == 30, "a new epoch's totals are added to the old ones"
    assert (harness.value("prefix_cache_queries_total"), harness.value("prefix_cache_hits_total")) == (38, 16)
    assert harness.value("num_preemptions_total") == 1 and harness.value("kv_cache_usage_perc") == 0
    assert harness.value("request_success_total", finished_reason="length") == 1


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32))
def test_random_histories_have_one_terminal_each(seed: int) -> None:
    """Frames with drops, repeats, foreign ids, early ends: every ticket ends once, with a beginning of the right text."""
    random, harness = Random(seed), Harness()
    openers = [harness.open, harness.open_scored]
    tickets = [random.choice(openers)(n=random.randint(1, 3), stop=random.choice([(), ("sat",)])) for _ in range(4)]
    sequences = [sequence for ticket in tickets for sequence in ticket.sequences]
    finals, got = dict.fromkeys(range(len(sequences)), 0), dict.fromkeys(range(len(sequences)), "")
    for _ in range(120):
        id, start = random.randrange(len(sequences) + 1), random.randrange(len(CAT))
        frame: list[EngineOutput] = [Delta(id, start, tuple(CAT[start : start + random.randint(1, 2)]))]
        if random.random() < 0.03:
            frame.append(Done(id, random.choice(["stop", "length", "abort", "error"]), random.randint(0, len(CAT))))
        if random.random() < 0.3:
            first = random.randint(1, 3)
            frame.insert(0, scored(id, first, random.randint(1, 4 - first)))
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
