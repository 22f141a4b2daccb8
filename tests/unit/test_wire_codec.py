"""Frames carry every message of their direction unchanged, and nothing else."""

import contextlib

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tpserve.errors import EngineFailure
from tpserve.types.messages import (
    Abort,
    Add,
    Delta,
    Done,
    Drain,
    Fault,
    Heartbeat,
    Hello,
    MemoryLedger,
    Ready,
    Run,
    Start,
    Stats,
    Stop,
    Truncate,
)
from tpserve.types.packed import pack
from tpserve.types.plan import Chunk, NewSequence, StepPlan, StepResult, TokenLogprobs
from tpserve.types.request import Request
from tpserve.types.sampling import EngineSamplingParams
from tpserve.wire import codec

PARAMS = EngineSamplingParams(temperature=0.5, max_tokens=7, stop_token_ids=(3,), logprobs=2)
SAMPLES = {
    codec.ENGINE_INPUT: [Add(Request(1, pack([1, 2]), PARAMS, 2**64 - 1)), Abort(1), Truncate(1, 5)],
    codec.ENGINE_OUTPUT: [
        Delta(1, 0, (4, 5), (TokenLogprobs(-0.5, (4, 9), (-0.5, -1.5)),) * 2),
        Done(1, "stop", 2, stop_id=3),
        Stats(1, 2, 3, 4, 5, 6, 7, 8),
    ],
    codec.RANK: [
        Hello(0, 17, 99, "host", {"store": "127.0.0.1:1"}, {"version": "0"}),
        Ready(0, 1, MemoryLedger(1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12), {"vocab_size": 320}),
        Heartbeat(0, 1, "loading", 50, 3),
        Fault(1, 1, "user", "no such file"),
        Drain(1),
    ],
    codec.COORDINATOR: [Start(1, {"store": "h:1"}), Run(1), Drain(), Stop(0, "")],
    codec.PLAN: [StepPlan.of(1, 0, [Chunk(0, 0, 2, True)], [NewSequence(0, pack([1, 2]), 2, PARAMS, 1, 0, (pack([0]),))])],
    codec.RESULT: [StepResult(1, 0, pack([5]))],
}


@pytest.mark.parametrize("direction", SAMPLES, ids=lambda c: c._name)
def test_round_trip(direction: codec.Codec) -> None:
    messages = SAMPLES[direction]
    assert direction.decode(direction.encode(messages)) == messages


@pytest.mark.parametrize("direction", SAMPLES, ids=lambda c: c._name)
def test_another_directions_frame_is_refused(direction: codec.Codec) -> None:
    for other, messages in SAMPLES.items():
        if other is not direction:
            for message in messages:
                if isinstance(message, Drain):  # the one word both directions know
                    continue
                with pytest.raises(EngineFailure):
                    direction.decode(other.encode([message]))


def test_a_frame_over_the_bound_is_refused_on_both_sides() -> None:
    small: codec.Codec = codec.Codec(Stop, 64, "small")
    with pytest.raises(EngineFailure, match="64"):
        small.encode([Stop(1, "x" * 100)])
    with pytest.raises(EngineFailure, match="64"):
        small.decode(msgspec.msgpack.encode([Stop(1, "x" * 100)]))


def test_messages_too_many_for_one_frame_go_in_several() -> None:
    small: codec.Codec = codec.Codec(Stop, 64, "small")
    messages = [Stop(code, "x" * 10) for code in range(9)]
    frames = small.frames(messages)
    assert len(frames) > 1 and [message for frame in frames for message in small.decode(frame)] == messages
    assert small.frames(messages[:2]) == [small.encode(messages[:2])]
    with pytest.raises(codec.FrameTooLarge):
        small.frames([*messages, Stop(1, "x" * 100)])


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_damaged_frames_never_raise_anything_else(data: st.DataObject) -> None:
    direction = data.draw(st.sampled_from(list(SAMPLES)))
    frame = bytearray(direction.encode(SAMPLES[direction]))
    for _ in range(data.draw(st.integers(1, 4))):
        frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(EngineFailure):
        direction.decode(bytes(frame[: data.draw(st.integers(0, len(frame)))]))
