"""The request table: one terminal a client, whatever the engine says and in whatever order."""

import asyncio
from array import array
from collections.abc import Sequence
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.http.tiny_tokenizer import EOS, byte_level
from tpserve.engine_client.requests import RequestHandle, RequestTable
from tpserve.errors import UserError
from tpserve.observe.metrics import Metrics
from tpserve.text.assembler import Assembler, OutputDelta
from tpserve.text.logprob_entries import PromptScores
from tpserve.text.tokenizer import Tokenizer
from tpserve.types.messages import (
    Abort,
    Add,
    Delta,
    Done,
    EngineInput,
    EngineOutput,
    PhaseTimes,
    PromptLogprobsChunk,
    Stats,
    Truncate,
)
from tpserve.types.packed import pack
from tpserve.types.plan import PromptLogprobs
from tpserve.types.request import Request
from tpserve.types.sampling import EngineSamplingParams
from tpserve.wire import codec

TOKENIZER = Tokenizer(byte_level(), {})
CAT = TOKENIZER.encode("the cat sat")
PLAIN = EngineSamplingParams()


class Harness:
    """A request table, what it sent, and a clock that moves by hand."""

    def __init__(self) -> None:
        self.sent: list[EngineInput] = []
        self.now = 0.0
        self.request_table = RequestTable(self.sent.extend, Metrics("tiny"), clock=lambda: self.now)

    def open(self, n: int = 1, stop: Sequence[str] = (), streaming: bool = True, seed: int = 1) -> RequestHandle:
        requests = [(self.request([1, 2], choice=choice, seed=seed), Assembler(TOKENIZER, stop=stop)) for choice in range(n)]
        return self.request_table.open(requests, streaming=streaming)

    def request(self, prompt: list[int], params: EngineSamplingParams = PLAIN, seed: int = 1, **more: Any) -> Request:
        return Request(self.request_table.next_id(), pack(prompt), params, seed, **more)

    def open_scored(self, n: int = 1, stop: Sequence[str] = (), max_tokens: int = 16) -> RequestHandle:
        """Choices of a prompt of four tokens, the first of which is scored."""
        scores = PromptScores([1, 2, 3, 4])
        params = [EngineSamplingParams(max_tokens=max_tokens, prompt_logprobs=None if choice else 0) for choice in range(n)]
        requests = [(self.request([1, 2, 3, 4], p), Assembler(TOKENIZER, stop=stop, scores=scores)) for p in params]
        return self.request_table.open(requests, streaming=True)

    def value(self, name: str, **labels: str) -> float | None:
        return self.request_table.metrics.registry.get_sample_value(f"tpserve:{name}", {"model_name": "tiny", **labels})


def scored(id: int, start: int, count: int) -> PromptLogprobsChunk:
    return PromptLogprobsChunk(id, start, PromptLogprobs(0, array("f", [-1.0] * count).tobytes(), b"", b""))


def texts(pieces: Sequence[tuple[object, OutputDelta]]) -> str:
    return "".join(delta.text for _, delta in pieces)


def test_choices_become_requests_with_numbers() -> None:
    harness = Harness()
    harness.open(n=3)
    harness.open(seed=7)
    requests = [message.request for message in harness.sent if isinstance(message, Add)]
    assert [r.choice for r in requests] == [0, 1, 2, 0] and len({r.id for r in requests}) == 4
    assert requests[3].seed == 7 and harness.request_table.num_open == 4


def test_deltas_then_done() -> None:
    harness = Harness()
    handle = harness.open()
    harness.request_table.receive([Delta(0, 0, tuple(CAT[:2]), cached_tokens=1)])
    first = texts(handle.take())
    harness.request_table.receive([Delta(0, 2, (*CAT[2:], EOS)), Done(0, "stop", len(CAT) + 1)])
    ((sequence, delta),) = handle.take()
    assert first + delta.text == "the cat sat" and delta.finish == "stop" and delta.tokens[-1] == EOS
    assert handle.ended and sequence.cached_tokens == 1 and harness.request_table.num_open == 0
    assert handle.take() == [], "one terminal"


def test_only_the_token_that_stopped_has_no_text() -> None:
    harness = Harness()
    handle = harness.open()
    harness.request_table.receive(
        [Delta(0, 0, tuple(CAT)), Delta(0, len(CAT), (CAT[0],)), Done(0, "stop", len(CAT) + 1, stop_id=CAT[0])]
    )
    ((_, delta),) = handle.take()
    assert (delta.text, delta.stop_reason, len(delta.tokens)) == ("the cat sat", CAT[0], len(CAT) + 1)


def test_only_the_expected_position_is_taken() -> None:
    harness = Harness()
    handle = harness.open()
    for start in (1, 0, 0, 1, 5):
        harness.request_table.receive([Delta(0, start, (CAT[start % len(CAT)],))])
    assert texts(handle.take()) == TOKENIZER.decode(CAT[:2])


def test_priority_and_salt_go_with_the_request() -> None:
    harness = Harness()
    request = harness.request([1], choice=2, priority=-3, cache_salt="salt")
    harness.request_table.open([(request, Assembler(TOKENIZER))], streaming=False)
    (add,) = harness.sent
    assert isinstance(add, Add) and (add.request.choice, add.request.priority, add.request.cache_salt) == (2, -3, "salt")


def test_scores_come_before_the_answer() -> None:
    """Repeated and stray ones are dropped, and so are tokens that come before their prompt's scores."""
    harness = Harness()
    handle = harness.open_scored(n=2)
    for message in (scored(0, 2, 2), Delta(0, 0, tuple(CAT)), scored(1, 1, 3), scored(0, 1, 1), scored(0, 1, 1), scored(9, 1, 1)):
        harness.request_table.receive([message])
        assert handle.take() == []
    harness.request_table.receive([Delta(1, 0, tuple(CAT)), Done(1, "length", len(CAT))])
    assert handle.take() == [], "the second choice shows the scores of the first"
    harness.request_table.receive([scored(0, 1, 3)])
    ((sequence, delta),) = handle.take()
    assert (sequence.index, delta.text, delta.finish) == (1, "the cat sat", "length") and delta.scores is not None
    harness.request_table.receive([scored(0, 1, 3), Delta(0, 0, tuple(CAT)), Done(0, "length", len(CAT))])
    ((sequence, delta),) = handle.take()
    assert (sequence.index, delta.text) == (0, "the cat sat") and delta.scores is not None
    assert handle.ended and harness.request_table.num_open == 0 and len(harness.sent) == 2


def test_complete_scores_wake_who_waited() -> None:
    async def run() -> bool:
        harness = Harness()
        handle = harness.open_scored(n=2)
        harness.request_table.receive([Delta(1, 0, tuple(CAT))])
        assert not handle._wake.is_set()
        harness.request_table.receive([scored(0, 1, 3)])
        await asyncio.wait_for(handle.wait(), 1)
        return texts(handle.take()) != ""

    assert asyncio.run(run())


def test_scores_alone_are_an_answer() -> None:
    harness = Harness()
    handle = harness.open_scored(max_tokens=0)
    harness.request_table.receive([scored(0, 1, 3), Done(0, "length", 0)])
    ((_, delta),) = handle.take()
    assert (delta.text, delta.tokens, delta.finish) == ("", [], "length") and delta.scores is not None and handle.ended


@pytest.mark.parametrize("messages", [[], [scored(0, 1, 2)], [scored(0, 1, 2), Delta(0, 0, tuple(CAT))]])
def test_lost_scores_are_a_failure(messages: list[EngineOutput]) -> None:
    harness = Harness()
    handle = harness.open_scored(n=2)
    harness.request_table.receive([*messages, Done(0, "length", 0)])
    with pytest.raises(UserError, match="scores of the prompt were lost") as info:
        handle.take()
    assert info.value.status == 500 and handle.ended and harness.sent[2:] == [Abort(1)] and harness.request_table.num_open == 0


@pytest.mark.parametrize("end", ["abort", "fail", "done"])
def test_a_stop_string_while_the_prompt_is_scored(end: str) -> None:
    """The engine is cut at once; the client has its one terminal when the scores are there, or whatever ends the request."""
    harness = Harness()
    handle = harness.open_scored(n=2, stop=["cat"])
    harness.request_table.receive([scored(0, 1, 1), Delta(1, 0, tuple(CAT))])
    assert harness.sent[2:] == [Truncate(1, len(TOKENIZER.encode("the cat")))] and harness.request_table.num_open == 1
    assert handle.take() == [] and not handle.ended
    if end == "abort":
        harness.request_table.abort(handle)
        assert harness.sent[3:] == [Abort(0)] and handle.take() == []
    elif end == "fail":
        harness.request_table.fail_all("rank 1 failed", 503)
        with pytest.raises(UserError, match="rank 1 failed"):
            handle.take()
    else:
        harness.request_table.receive([scored(0, 2, 2), Done(0, "length", 0)])
        assert [(s.index, delta.text, delta.finish) for s, delta in handle.take()] == [(0, "", "length"), (1, "the ", "stop")]
    harness.request_table.receive([scored(0, 2, 2), Done(0, "abort", 0), Done(1, "stop", 3)])
    assert handle.ended and harness.request_table.num_open == 0 and len(harness.sent) <= 4


def test_stop_string_ends_the_client_and_cuts_the_engine() -> None:
    harness = Harness()
    handle = harness.open(stop=["cat"])
    harness.request_table.receive([Delta(0, 0, tuple(CAT))])
    length = len(TOKENIZER.encode("the cat"))
    assert harness.sent[1:] == [Truncate(0, length)] and handle.ended and harness.request_table.num_open == 0
    harness.request_table.receive([Delta(0, len(CAT), (5,)), Done(0, "stop", length)])
    ((_, delta),) = handle.take()
    assert (delta.text, delta.finish, delta.stop_reason, delta.num_tokens) == ("the ", "stop", "cat", length)
    harness.request_table.abort(handle)
    assert len(harness.sent) == 2, "nothing is aborted that ended"


def test_abort_ends_what_is_open() -> None:
    harness = Harness()
    handle = harness.open(n=2)
    harness.request_table.receive([Done(0, "length", 0)])
    harness.request_table.abort(handle)
    harness.request_table.abort(handle)
    harness.request_table.receive([Done(1, "abort", 0)])
    assert harness.sent[2:] == [Abort(1)] and harness.request_table.num_open == 0
    assert harness.value("request_success_total", finished_reason="abort") == 1


@pytest.mark.parametrize(
    ("done", "status"),
    [
        (Done(0, "error", 0, error="no room"), 500),
        (Done(0, "error", 0, error="the grammar is refused", by_grammar=True), 400),
        (Done(0, "abort", 0), 503),
        (Done(0, "length", 4), 500),
    ],
)
def test_a_failed_sequence_fails_its_ticket(done: Done, status: int) -> None:
    harness = Harness()
    handle, other = harness.open(n=2), harness.open()
    harness.request_table.receive([done])
    with pytest.raises(UserError) as info:
        handle.take()
    assert info.value.status == status and handle.ended and harness.sent[3:] == [Abort(1)]
    assert not other.ended and harness.request_table.num_open == 1


@pytest.mark.parametrize("bad", [Delta(0, 0, (2**40,)), PromptLogprobsChunk(0, 1, PromptLogprobs(0, b"\0" * 6, b"", b""))])
def test_what_the_journal_cannot_take_fails_its_own_request(bad: EngineOutput, caplog: pytest.LogCaptureFixture) -> None:
    harness = Harness()
    handle = harness.open_scored(n=2) if isinstance(bad, PromptLogprobsChunk) else harness.open(n=2)
    other = harness.open()
    harness.request_table.receive([bad, Delta(2, 0, tuple(CAT)), Done(2, "length", len(CAT))])
    assert handle.ended and sorted(message.id for message in harness.sent if isinstance(message, Abort)) == [0, 1]
    with pytest.raises(UserError, match="error of its own with this request") as failed:
        handle.take()
    assert failed.value.status == 500 and "request 0 fails in the frontend" in caplog.text
    assert texts(other.take()) == "the cat sat", "the others notice nothing"
    assert harness.request_table.num_open == 0


def test_a_request_that_cannot_be_sent_fails_and_is_not_left_open() -> None:
    harness = Harness()

    def send(inputs: Sequence[EngineInput]) -> None:
        harness.sent.extend(codec.ENGINE_INPUT.decode(codec.ENGINE_INPUT.encode(inputs)))

    harness.request_table = RequestTable(send, Metrics("tiny"))
    handle = harness.open(seed=2**70)
    with pytest.raises(UserError, match="cannot be sent"):
        handle.take()
    assert harness.request_table.num_open == 0 and not harness.sent
    harness.open(seed=1)
    assert harness.request_table.num_open == 1


def test_fail_all_says_why_and_sends_nothing() -> None:
    harness = Harness()
    tickets = [harness.open(n=2), harness.open()]
    harness.request_table.fail_all("rank 1 failed", 503)
    for handle in tickets:
        with pytest.raises(UserError, match="rank 1 failed"):
            handle.take()
    assert len(harness.sent) == 3 and harness.request_table.num_open == 0


def test_waiting_wakes_for_what_the_reader_wants() -> None:
    async def run() -> list[str]:
        harness, seen = Harness(), []
        for streaming in (True, False):
            handle = harness.open(streaming=streaming)
            id = handle.sequences[0].request.id
            for message in (Delta(id, 0, tuple(CAT[:2])), Done(id, "length", 2)):
                harness.request_table.receive([message])
                try:
                    await asyncio.wait_for(handle.wait(), 0.01)
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
        harness.request_table.receive([message])
    harness.now = 2.0
    assert harness.value("prefix_cache_hits_total") == 0
    harness.request_table.receive(
        [Done(0, "length", 2, times=PhaseTimes(0.5, 1.0, 0.25)), Stats(1, 2, 3, 4, 0, 9, 20, 10, 30, 16)]
    )
    harness.request_table.receive([Stats(0, 0, 0, 4, 1, 9, 25, 12, 30, 16)])
    harness.request_table.receive([Stats(0, 0, 0, 4, 0, 1, 5, 1, 8, 0, epoch=1)])
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
        harness.request_table.receive(frame)
        ticket = random.choice(tickets)
        if random.random() < 0.02:
            harness.request_table.abort(ticket)
        if ticket.failure is None:
            for sequence, piece in ticket.take():
                got[sequence.request.id] += piece.text
                finals[sequence.request.id] += piece.finish is not None
    harness.request_table.fail_all("over", 503)
    assert harness.request_table.num_open == 0 and all(ticket.ended for ticket in tickets)
    assert all(count <= 1 for count in finals.values())
    assert all("the cat sat".startswith(text) for text in got.values())
    counted = [harness.value("request_success_total", finished_reason=r) for r in ("stop", "length", "abort", "error")]
    assert sum(value or 0 for value in counted) == len(sequences)
