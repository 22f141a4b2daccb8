"""When a process that died is started again. Pure: the time is an argument."""

RESET_S = 3.0
"""A process that has lived for this long is a new beginning."""
FREE_DEATHS = 3
"""So many early deaths in a row are answered at once."""
FIRST_DELAY_S, MAX_DELAY_S = 0.1, 5.0


class RestartBackoff:
    """The deaths of one process in a row, each within `RESET_S` of its start."""

    def __init__(self) -> None:
        self._early_deaths = 0

    def delay_s(self, lived_s: float) -> float:
        """Count a death; returns how long to wait before the next start: 0, 0, 0, then 0.1 s doubling to 5 s."""
        self._early_deaths = self._early_deaths + 1 if lived_s < RESET_S else 1
        if self._early_deaths <= FREE_DEATHS:
            return 0.0
        return min(FIRST_DELAY_S * 2.0 ** min(self._early_deaths - FREE_DEATHS - 1, 16), MAX_DELAY_S)
