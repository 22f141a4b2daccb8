"""When a step counts as hanging."""

from tpserve.engine.watchdog import NO_STEP, RECENT, StepWatchdog

LEAST_S = 60.0


def steps(watchdog: StepWatchdog, count: int, num_tokens: int, took_s: float, now: float) -> float:
    """Steps that take so long each; returns the time after them."""
    for step in range(count):
        watchdog.sent(step, num_tokens, now)
        now += took_s
        watchdog.applied(now)
    return now


def allowed_s(watchdog: StepWatchdog, num_tokens: int, now: float) -> float:
    """For a step that is sent now."""
    watchdog.sent(99, num_tokens, now)
    due = watchdog.deadline(now)
    assert due[0] == 99
    return due[1] - now


def test_without_plans_the_loop_has_to_come_back() -> None:
    assert StepWatchdog(600.0, LEAST_S).deadline(5.0) == (NO_STEP, 5.0 + LEAST_S)


def test_the_first_step_has_the_time_of_the_start() -> None:
    watchdog = StepWatchdog(600.0, LEAST_S)
    watchdog.sent(0, 16, 10.0)
    watchdog.sent(1, 1, 10.0)
    assert watchdog.deadline(10.0) == (0, 610.0)
    watchdog.applied(12.0)
    assert watchdog.deadline(12.0) == (1, 12.0 + LEAST_S), "the second counts from the end of the first"


def test_the_allowance_follows_the_slowest_recent_cost_a_token() -> None:
    watchdog = StepWatchdog(10_000.0, LEAST_S)
    now = steps(watchdog, 1, 100, 50.0, 0.0)  # half a second a token
    assert allowed_s(watchdog, 1000, now) == 10 * 0.5 * 1000


def test_a_step_of_one_token_never_gets_less_than_a_minute() -> None:
    watchdog = StepWatchdog(600.0, LEAST_S)
    assert allowed_s(watchdog, 1, steps(watchdog, 5, 1, 0.01, 0.0)) == LEAST_S


def test_one_slow_step_allows_no_days_and_is_forgotten() -> None:
    watchdog = StepWatchdog(600.0, LEAST_S)
    now = steps(watchdog, 40, 1, 0.02, 0.0)
    now = steps(watchdog, 1, 1, 5.0, now)  # a kernel was compiled
    watchdog.sent(99, 8192, now)
    assert watchdog.deadline(now) == (99, now + 600.0), "not ten times 5 s a token, which would be four days"
    watchdog.applied(now + 1.0)
    now = steps(watchdog, RECENT, 1, 0.02, now + 1.0)
    assert allowed_s(watchdog, 100, now) == LEAST_S


def test_steps_that_are_always_slow_may_take_longer_than_the_start() -> None:
    watchdog = StepWatchdog(600.0, LEAST_S)
    assert allowed_s(watchdog, 8192, steps(watchdog, 3, 8192, 100.0, 0.0)) == 1000.0
