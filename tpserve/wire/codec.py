"""Encode and decode frames. A frame is a msgpack list of messages of one direction.

Owns the size bound and the message types of each direction. Never guesses: a frame that is too large, malformed or of another
direction raises an `EngineFailure` that names the channel. Nothing is ever pickled.
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
    """A frame is larger than its channel allows. Nothing was sent."""


class Codec(Generic[T]):
    """Encodes and decodes the frames of one direction."""

    def __init__(self, message_type: Any, max_bytes: int, name: str) -> None:
        """`message_type`: a message struct or a union of them. `name`: names the direction in errors."""
        self.max_bytes = max_bytes
        self._name = name
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[list[T]] = msgspec.msgpack.Decoder(list[message_type])

    def encode(self, messages: Sequence[T]) -> bytes:
        """Encode all messages as one frame. Raises FrameTooLarge."""
        frame = self._encoder.encode(messages)
        self._check(len(frame))
        return frame

    def frames(self, messages: Sequence[T]) -> list[bytes]:
        """Encode messages as one frame, or as several when one is too large. Raises FrameTooLarge for a single message."""
        frame = self._encoder.encode(messages)
        if len(frame) <= self.max_bytes or len(messages) == 1:
            self._check(len(frame))
            return [frame]
        half = len(messages) // 2
        return self.frames(messages[:half]) + self.frames(messages[half:])

    def decode(self, frame: bytes) -> list[T]:
        """Decode a frame from an untrusted peer. Raises EngineFailure when it is too large or malformed."""
        self._check(len(frame))
        try:
            return self._decoder.decode(frame)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise EngineFailure(f"malformed {self._name} frame of {len(frame)} bytes: {error}") from error

    def _check(self, size: int) -> None:
        if size > self.max_bytes:
            raise FrameTooLarge(f"a {self._name} frame of {size} bytes is over the bound of {self.max_bytes}")


ENGINE_INPUT: Codec[EngineInput] = Codec(EngineInput, 64 * MIB, "frontend-to-engine")
ENGINE_OUTPUT: Codec[EngineOutput] = Codec(EngineOutput, 128 * MIB, "engine-to-frontend")
RANK: Codec[RankMessage] = Codec(RankMessage, MIB, "rank-to-coordinator")
COORDINATOR: Codec[CoordinatorMessage] = Codec(CoordinatorMessage, MIB, "coordinator-to-rank")
PLAN: Codec[StepPlan] = Codec(StepPlan, 64 * MIB, "plan")
RESULT: Codec[StepResult] = Codec(StepResult, 128 * MIB, "result")
