"""What the coordinator orders: its methods return these, and its owner carries them out in order."""

from typing import Literal

from msgspec import Struct

from tpserve.coordinator.configurations import Configuration
from tpserve.coordinator.roster import Peer
from tpserve.types.messages import CoordinatorMessage, ExpertLoad, LogLines

Cause = Literal["outside", "unclear", "error"]
"""What ended an epoch. outside: a process was killed or cut off. unclear: it crashed, or a step did not end. error: a rank
reported an error, or exited by itself."""


class SendMessage(Struct, frozen=True):
    """Deliver `message` to `peer`. Delivery may fail silently, since ranks repeat what needs an answer."""

    peer: Peer
    message: CoordinatorMessage


class EpochStarting(Struct, frozen=True):
    """Start of `epoch` is about to be sent. The number must be kept where the next coordinator finds it."""

    epoch: int


class EpochReady(Struct, frozen=True):
    """Plans of `epoch` may flow. `cause`: the worst of the faults since the last epoch that ran."""

    epoch: int
    cause: Cause = "outside"


class RankLost(Struct, frozen=True):
    """This incarnation is silent and no longer counts: kill its process if it runs on this host."""

    peer: Peer


class EpochLost(Struct, frozen=True):
    """A fault ended the epoch, and the ranks form the next one. Open requests wait. `planned`: no fault, but a reload."""

    epoch: int
    reason: str
    planned: bool = False


class Reloaded(Struct, frozen=True):
    """An epoch is about to run with another configuration. EpochReady follows."""

    configuration: Configuration


class ReloadFailed(Struct, frozen=True):
    """The ranks could not start with another configuration, for this `reason`: the one before comes back, under a new number."""

    configuration: Configuration
    reason: str


class EpochFailed(Struct, frozen=True):
    """A fault ended the service: open requests get `reason`, and the process exits with `code` (1 engine, 2 user).

    `advice` is what an operator can do.
    """

    code: int
    reason: str
    advice: str = ""


class EpochFinished(Struct, frozen=True):
    """The service ended on request: exit code 0."""


Action = (
    SendMessage
    | EpochStarting
    | EpochReady
    | RankLost
    | EpochLost
    | Reloaded
    | ReloadFailed
    | EpochFailed
    | EpochFinished
    | ExpertLoad
    | LogLines
)
