"""When a step counts as hanging."""

from tpserve.engine.pace import LEAST_S, Pace


def test_nothing_is_due_without_plans() -> None:
    assert Pace(600.0).due is None


def test_the_first_step_has_the_time_of_the_start() -> None:
    pace = Pace(600.0)
    pace.sent(0, 16, 10.0)
    pace.sent(1, 1, 10.0)
    assert pace.due == (0, 610.0)
    pace.applied(12.0)
    assert pace.due == (1, 12.0 + LEAST_S), "the second counts from the end of the first"


def test_the_allowance_follows_the_slowest_cost_a_token() -> None:
    pace = Pace(600.0)
    pace.sent(0, 100, 0.0)
    pace.applied(50.0)  # half a second a token
    pace.sent(1, 2048, 60.0)
    assert pace.due == (1, 60.0 + 10 * 0.5 * 2048)
    pace.applied(70.0)
    pace.sent(2, 1, 80.0)
    assert pace.due == (2, 80.0 + LEAST_S)
