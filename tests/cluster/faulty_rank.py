"""A rank of torchrun with faults that no input can cause; each waits for a request whose prompt has a certain length.

torchrun ... faulty_rank.py FLAGS
"""

import logging
import sys

from tpserve.__main__ import main
from tpserve.config.env import rank_env
from tpserve.process.telemetry import Telemetry
from tpserve.scheduling.sequence import Sequence
from tpserve.types.messages import RankMessage
from tpserve.types.plan import StepPlan
from tpserve.types.request import Request
from tpserve.wire import codec

LOST_PLAN, UNREADABLE, BROKEN_THREAD = 19, 13, 17
"""Tokens of a prompt: rank 1 loses the plan that admits it; rank 0 cannot read the request; rank 1's control thread fails."""


def cannot_read(request: Request, *more: object) -> Sequence:
    if len(request.prompt) == 4 * UNREADABLE:
        raise ValueError("what nobody has thought of")
    return sequence_of(request, *more)  # type: ignore[arg-type]


def lose(frame: bytes) -> list[StepPlan]:
    plans = decode(frame)
    lengths = {new_sequence.prompt_len for plan in plans for new_sequence in plan.new_sequences}
    if BROKEN_THREAD in lengths:
        Telemetry.messages = broken  # type: ignore[method-assign]
    if LOST_PLAN in lengths and not lost:
        lost.append(plans[0].step)
        log.warning("rank 1 loses plan %d", plans[0].step)
        return []
    return plans


def broken(self: Telemetry) -> list[RankMessage]:
    raise RuntimeError("the counter is broken")


log = logging.getLogger("tpserve.faulty_rank")
lost: list[int] = []
sequence_of, decode = Sequence.of, codec.PLAN.decode
if __name__ == "__main__":
    if rank_env().rank == 0:
        Sequence.of = staticmethod(cannot_read)  # type: ignore[assignment,method-assign]
    else:
        codec.PLAN.decode = lose  # type: ignore[method-assign]
    sys.exit(main())
