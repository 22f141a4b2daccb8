"""Which request killed the engine: played with a request that kills it at a given token."""

import random

import pytest

from tpserve.coordinator.actions import Cause
from tpserve.engine_client.quarantine import PROOF, Quarantine


class World:
    """Sequences that get a token a step, one of which ends the epoch instead of getting its `at`-th token."""

    def __init__(self, size: int, poison: int, at: int, cause: Cause) -> None:
        self.quarantine, self.tokens = Quarantine(), dict.fromkeys(range(size), 0)
        self.poison, self.at, self.cause = poison, at, cause
        self.sent: set[int] = set()
        self.deaths = 0
        self.condemned: list[int] = []

    def end(self, id: int) -> None:
        del self.tokens[id]
        self.sent.discard(id)
        self.sent.update(self.quarantine.end(id))

    def die(self, cause: Cause) -> None:
        self.deaths += 1
        self.sent.clear()
        for id in self.quarantine.judge(cause):
            self.condemned.append(id)
            self.end(id)
        self.sent.update(self.quarantine.resend())

    def step(self) -> None:
        if self.poison in self.sent and self.tokens[self.poison] >= self.at:
            self.die(self.cause)
            return
        for id in sorted(self.sent):
            self.tokens[id] += 1
            self.sent.update(self.quarantine.prove(id))

    def run(self, steps: int = 1000) -> None:
        for _ in range(steps):
            self.step()


def test_without_faults_everything_is_sent_at_once() -> None:
    quarantine = Quarantine()
    assert quarantine.admit([0, 1]) == [0, 1] and quarantine.admit([2]) == [2]
    assert quarantine.prove(1) == [] and quarantine.end(0) == []


def test_a_death_from_outside_sends_everything_again_at_once() -> None:
    quarantine = Quarantine()
    quarantine.admit([0, 1, 2])
    quarantine.prove(0)
    assert quarantine.judge("outside") == [] and quarantine.resend() == [0, 1, 2]


@pytest.mark.parametrize("cause", ["error", "unclear"])
def test_a_new_request_that_kills_is_found_at_the_second_death(cause: Cause) -> None:
    world = World(101, 100, 0, cause)
    world.sent.update(world.quarantine.admit(range(100)))
    world.run(5)
    world.sent.update(world.quarantine.admit([100]))
    world.run()
    assert world.condemned == [100] and world.deaths == 2 and len(world.tokens) == 100
    assert min(world.tokens.values()) > 100, "the others go on"


@pytest.mark.parametrize(("cause", "most"), [("error", 2), ("unclear", 9)])
@pytest.mark.parametrize("poison", [0, 50, 100])
def test_one_of_a_crowd_that_kills_later_is_found(cause: Cause, most: int, poison: int) -> None:
    world = World(101, poison, 7, cause)
    world.sent.update(world.quarantine.admit(range(101)))
    world.run()
    assert world.condemned == [poison] and world.deaths <= most and len(world.tokens) == 100


def test_a_request_that_the_kernel_kills_a_rank_for_is_found_at_last() -> None:
    world = World(20, 3, 0, "outside")
    world.sent.update(world.quarantine.admit(range(20)))
    world.run()
    assert world.condemned == [3] and world.deaths < 20 and len(world.tokens) == 19


def test_stray_signals_condemn_nobody() -> None:
    """Crashes at random moments, also while a suspect is alone: each goes on in the end."""
    for seed in range(30):
        world, rng = World(64, -1, 0, "unclear"), random.Random(seed)
        world.sent.update(world.quarantine.admit(range(64)))
        for _ in range(400):
            world.step()
            if rng.random() < 0.05:
                world.die(rng.choice(["unclear", "outside"]))
        world.run(100)
        assert not world.condemned and len(world.tokens) == 64 and min(world.tokens.values()) > 100


def test_those_that_come_or_leave_meanwhile() -> None:
    quarantine = Quarantine()
    quarantine.admit([0, 1, 2])
    quarantine.prove(0)
    quarantine.judge("error")
    assert quarantine.resend() == [0] and quarantine.admit([3]) == [], "the suspects come first"
    assert quarantine.end(1) == [] and quarantine.prove(0) == [2]
    assert quarantine.end(2) == [3], "a suspect whose client has left is waited for no longer"


def test_a_suspect_that_gets_a_token_is_not_yet_proven() -> None:
    """Its last tokens may not have arrived before it killed: it draws them again, and then kills while another one begins."""
    quarantine = Quarantine()
    quarantine.admit([1, 2])
    assert quarantine.judge("error") == [] and quarantine.resend() == [1]
    assert [quarantine.prove(1) for _ in range(PROOF)] == [[], [], [2]]
