"""When a rank's control thread ends its process."""

import pytest

from tpserve.process.exit_rules import AGENT, BLOCKED_S, CONNECT_S, ENDED_CODE, FRONTEND, GONE_S, GRACE_S, ExitNow, ExitRules
from tpserve.process.orders import Orders
from tpserve.types.messages import RESTART_CODE, Leave, Stop


@pytest.fixture
def orders():
    it = Orders()
    yield it
    it.close()


def rules_of(orders: Orders, returns_s: float | None) -> ExitRules:
    rules = ExitRules(3, "tcp://a:1", orders, 0.0, ENDED_CODE, returns_s)
    rules.note_connection(True, 0.0)
    return rules


@pytest.mark.parametrize(("ordered", "code"), [(0, 0), (1, ENDED_CODE), (2, 2), (RESTART_CODE, RESTART_CODE)])
def test_after_stop_the_main_thread_has_its_time(orders: Orders, ordered: int, code: int) -> None:
    rules = rules_of(orders, None)
    orders.apply(Stop(ordered, ""))
    rules.note_over(1.0)
    assert rules.due(AGENT, 1.4) is None and rules.due(AGENT, 1.1 + GRACE_S) == ExitNow(code)


def test_who_is_stuck_in_an_epoch_that_is_over_starts_again(orders: Orders) -> None:
    rules = rules_of(orders, 120.0)
    orders.apply(Leave(1, "rank 1 is gone"))
    rules.note_over(1.0)
    assert rules.due("", 0.9 + BLOCKED_S) is None
    due = rules.due("", 1.1 + BLOCKED_S)
    assert due is not None and due.code == RESTART_CODE


def test_without_a_coordinator_a_rank_ends_or_waits_for_the_next_one(orders: Orders) -> None:
    rules = rules_of(orders, None)
    rules.note_connection(False, 1.0)
    assert rules.due("", 1.0 + GONE_S) is None and rules.due("", 1.1 + GONE_S) is not None
    rules = rules_of(orders, 120.0)
    rules.note_connection(False, 1.0)
    assert rules.due("", 1.1 + GONE_S) is None and orders.leave is not None, "its epoch is over, it is not"


def test_a_new_incarnation_waits_for_the_next_frontend_only_so_long(orders: Orders) -> None:
    rules = ExitRules(3, "tcp://a:1", orders, 0.0, 1, 120.0)
    assert rules.due("", 1.0 + CONNECT_S) is None and rules.due("", 121.0) is not None


def test_the_end_of_the_agent_is_the_end_and_that_of_the_frontend_may_not_be(orders: Orders) -> None:
    assert rules_of(orders, 120.0).due(FRONTEND, 1.0) is None
    due = rules_of(orders, 120.0).due(AGENT, 1.0)
    assert due is not None and due.failed and due.code == 1
