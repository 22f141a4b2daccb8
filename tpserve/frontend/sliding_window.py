"""How much came within the last minute or day. Pure: time comes as an argument, in seconds of a monotonic clock."""

from array import array
from bisect import bisect_left


class SlidingWindow:
    """Sums what came within the last `length_s`, in `num_slots` slots of time and the one that is being filled.

    A slot counts until the window has left its end: what was let through is never more in any `length_s`, and what came counts
    for up to one slot longer.
    """

    def __init__(self, length_s: float, num_slots: int) -> None:
        self.length_s = length_s
        self._slot_s = length_s / num_slots
        self._amounts = [0] * (num_slots + 1)
        """Slot n is at n modulo their number."""
        self._newest = 0
        self._total = 0

    def add(self, at_s: float, amount: int, now_s: float) -> None:
        """`amount` has come at `at_s`, which is not after `now_s`."""
        self.used(now_s)
        number = int(at_s // self._slot_s)
        if number > self._newest - len(self._amounts):
            self._amounts[number % len(self._amounts)] += amount
            self._total += amount

    def add_each(self, times_s: "array[float]", begin: int, now_s: float) -> None:
        """One has come at each of `times_s[begin:]`, which are sorted. Costs a look a slot, not a time."""
        index = max(begin, bisect_left(times_s, now_s - self.length_s - self._slot_s))
        while index < len(times_s):
            end = bisect_left(times_s, (times_s[index] // self._slot_s + 1) * self._slot_s, index + 1)
            self.add(times_s[index], end - index, now_s)
            index = end

    def used(self, now_s: float) -> int:
        """The sum."""
        newest = int(now_s // self._slot_s)
        for number in range(max(self._newest, newest - len(self._amounts)) + 1, newest + 1):
            self._total -= self._amounts[number % len(self._amounts)]
            self._amounts[number % len(self._amounts)] = 0
        self._newest = max(self._newest, newest)
        return self._total

    def frees_s(self, now_s: float, amount: int) -> float:
        """Seconds until the sum is smaller by `amount`, if nothing comes; until it is 0 for a larger amount."""
        left = min(amount, self.used(now_s))
        for number in range(self._newest - len(self._amounts) + 1, self._newest + 1):
            left -= (count := self._amounts[number % len(self._amounts)])
            if count and left <= 0:
                return (number + len(self._amounts)) * self._slot_s - now_s
        return 0.0
