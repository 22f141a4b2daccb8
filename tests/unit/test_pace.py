"""When a step counts as hanging."""

from tpserve.engine.pace import LEAST_S, RECENT, Pace


def steps(pace: Pace, count: int, num_tokens: int, took_s: float, now: float) -> float:
    """Steps that take so long each; returns the time after them."""
    for step in range(count):
        pace.sent(step, num_tokens, now)
        now += took_s
        pace.applied(now)
    return now


def allowed_s(pace: Pace, num_tokens: int, now: float) -> float:
    """For a step that is sent now."""
    pace.sent(99, num_tokens, now)
    due = pace.due
    assert due is not None and due[0] == 99
    return due[1] - now


def test_nothing_is_due_without_plans() -> None:
    assert Pace(600.0).due is None


def test_the_first_step_has_the_time_of_the_start() -> None:
    pace = Pace(600.0)
    pace.sent(0, 16, 10.0)
    pace.sent(1, 1, 10.0)
    assert pace.due == (0, 610.0)
    pace.applied(12.0)
    assert pace.due == (1, 12.0 + LEAST_S), "the second counts from the end of the first"


def test_the_allowance_follows_the_slowest_recent_cost_a_token() -> None:
    pace = Pace(10_000.0)
    now = steps(pace, 1, 100, 50.0, 0.0)  # half a second a token
    assert allowed_s(pace, 1000, now) == 10 * 0.5 * 1000


def test_a_step_of_one_token_never_gets_less_than_a_minute() -> None:
    pace = Pace(600.0)
    assert allowed_s(pace, 1, steps(pace, 5, 1, 0.01, 0.0)) == LEAST_S


def test_one_slow_step_allows_no_days_and_is_forgotten() -> None:
    pace = Pace(600.0)
    now = steps(pace, 40, 1, 0.02, 0.0)
    now = steps(pace, 1, 1, 5.0, now)  # a kernel was compiled
    pace.sent(99, 8192, now)
    assert pace.due == (99, now + 600.0), "not ten times 5 s a token, which would be four days"
    pace.applied(now + 1.0)
    now = steps(pace, RECENT, 1, 0.02, now + 1.0)
    assert allowed_s(pace, 100, now) == LEAST_S


def test_steps_that_are_always_slow_may_take_longer_than_the_start() -> None:
    pace = Pace(600.0)
    assert allowed_s(pace, 8192, steps(pace, 3, 8192, 100.0, 0.0)) == 1000.0
