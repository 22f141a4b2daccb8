"""The states of an epoch and what leads from one to the next."""

from enum import Enum
from typing import Literal


class EpochState(Enum):
    """See the docstring of `Coordinator`'s module."""

    FORMING = "forming"
    STARTING = "starting"
    RUN = "run"
    DRAINING = "draining"
    STOPPED = "stopped"


EpochEvent = Literal["all_joined", "all_ready", "drain", "drained", "fault", "fatal"]

NEXT_STATE: dict[tuple[EpochState, EpochEvent], EpochState] = {
    (EpochState.FORMING, "all_joined"): EpochState.STARTING,
    (EpochState.STARTING, "all_ready"): EpochState.RUN,
    (EpochState.STARTING, "fault"): EpochState.FORMING,
    (EpochState.RUN, "fault"): EpochState.FORMING,
    (EpochState.RUN, "drain"): EpochState.DRAINING,
    (EpochState.DRAINING, "fault"): EpochState.FORMING,
    (EpochState.DRAINING, "drained"): EpochState.STOPPED,
    (EpochState.FORMING, "drained"): EpochState.STOPPED,
    (EpochState.STARTING, "drained"): EpochState.STOPPED,
    **{(state, "fatal"): EpochState.STOPPED for state in EpochState},
}
