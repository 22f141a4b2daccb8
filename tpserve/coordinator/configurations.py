"""Which configuration the ranks shall have: the flags that differ from those of the start. Pure; decides nothing about epochs.

current      what every Hello must have; a rank that comes with another number gets Reconfigure
before       while no epoch has run with the current one: what comes back, under a new number, when it fails
"""

from msgspec import Struct

from tpserve.types.messages import Reconfigure


class Configuration(Struct, frozen=True):
    """`number`: 0 for the flags of the start. `changes`: the flags that differ from those, a JSON object by field name."""

    number: int = 0
    changes: bytes = b"{}"


class Configurations:
    """See the module."""

    def __init__(self, current: Configuration) -> None:
        self.current = current
        self._before: Configuration | None = None

    @property
    def on_trial(self) -> bool:
        """Whether no epoch has run with the current configuration, and another one would come back."""
        return self._before is not None

    @property
    def next_start(self) -> Configuration:
        """What a coordinator after this one begins with, if this one is killed now: nothing that is on trial."""
        return self.current if self._before is None else Configuration(self.current.number + 1, self._before.changes)

    def begin(self, changes: bytes) -> None:
        """Try other flags."""
        self._before = self.current
        self.current = Configuration(self.current.number + 1, changes)

    def accept(self) -> None:
        """An epoch runs with the current configuration."""
        self._before = None

    def take_back(self) -> None:
        """It has failed: the one before is the current one. Its number is new, since no rank may mistake it for an old order."""
        self.current, self._before = self.next_start, None

    def order(self, reason: str) -> Reconfigure:
        """What a rank with another configuration is told."""
        fallback = None if self._before is None else self._before.changes
        return Reconfigure(self.current.number, self.current.changes, fallback, reason)
