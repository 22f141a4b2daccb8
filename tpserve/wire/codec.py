"""Frames: a msgpack list of messages of one direction, bounded in size, decoded strictly into the types of that direction.

Owns the bounds and nothing else. Never guesses: a frame that is too large, malformed or of another direction's types is an
`EngineFailure` naming the channel. Nothing on any wire is pickled.
"""

from collections.abc import Sequence
from typing import Any, Generic, TypeVar

import msgspec

from tpserve.errors import EngineFailure
from tpserve.types.messages import CoordinatorMessage, EngineInput, EngineOutput, RankMessage
from tpserve.types.plan import StepPlan, StepResult

T = TypeVar("T")

MIB = 1 << 20


class FrameTooLarge(EngineFailure):
    """A frame is over the bound of its channel. Nothing of it was sent."""


class Codec(Generic[T]):
    """Encodes and decodes the frames of one direction. `kind` is the message type or union, `what` names it in errors."""

    def __init__(self, kind: Any, max_bytes: int, what: str) -> None:
        self.max_bytes = max_bytes
        self._what = what
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[list[T]] = msgspec.msgpack.Decoder(list[kind])

    def encode(self, messages: Sequence[T]) -> bytes:
        """One frame. FrameTooLarge if it is larger than the channel admits."""
        frame = self._encoder.encode(messages)
        self._check(len(frame))
        return frame

    def frames(self, messages: Sequence[T]) -> list[bytes]:
        """As few frames as hold the messages, in order. FrameTooLarge if one message alone is too large."""
        frame = self._encoder.encode(messages)
        if len(frame) <= self.max_bytes or len(messages) == 1:
            self._check(len(frame))
            return [frame]
        half = len(messages) // 2
        return self.frames(messages[:half]) + self.frames(messages[half:])

    def decode(self, frame: bytes) -> list[T]:
        """The messages of a frame from a peer that may be wrong about anything."""
        self._check(len(frame))
        try:
            return self._decoder.decode(frame)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise EngineFailure(f"malformed {self._what} frame of {len(frame)} bytes: {error}") from error

    def _check(self, size: int) -> None:
        if size > self.max_bytes:
            raise FrameTooLarge(f"a {self._what} frame of {size} bytes is over the bound of {self.max_bytes}")


ENGINE_INPUT: Codec[EngineInput] = Codec(EngineInput, 64 * MIB, "frontend-to-engine")
ENGINE_OUTPUT: Codec[EngineOutput] = Codec(EngineOutput, 128 * MIB, "engine-to-frontend")
RANK: Codec[RankMessage] = Codec(RankMessage, MIB, "rank-to-coordinator")
COORDINATOR: Codec[CoordinatorMessage] = Codec(CoordinatorMessage, MIB, "coordinator-to-rank")
PLAN: Codec[StepPlan] = Codec(StepPlan, 64 * MIB, "plan")
RESULT: Codec[StepResult] = Codec(StepResult, 128 * MIB, "result")
