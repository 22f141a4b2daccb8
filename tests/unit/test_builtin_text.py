"""The generated world: the same for the same seed, closed in its words, and split by combination."""

import itertools
import re

import pytest

from tpserve.builtin import dialogues, stories, world
from tpserve.builtin.world import HELD_OUT_OF, PEOPLE, PLACES, Dice


def tales(seed: int, count: int, held_out: bool = False) -> list[str]:
    dice = Dice(seed, held_out)
    return [stories.tale(dice) for _ in range(count)]


def test_text_is_a_function_of_the_seed() -> None:
    assert tales(1, 20) == tales(1, 20) != tales(2, 20)
    assert tales(1, 20) != tales(1, 20, held_out=True)
    first, second, other = Dice(5), Dice(5), Dice(6)
    talk = [dialogues.dialogue(first) for _ in range(20)]
    assert talk == [dialogues.dialogue(second) for _ in range(20)] != [dialogues.dialogue(other) for _ in range(20)]


def test_a_combination_is_on_one_side_only() -> None:
    sizes = (len(PEOPLE), len(stories.PLOTS), len(world.THINGS))
    sides = [set(itertools.starmap(Dice(1, side).combination, [sizes] * 4000)) for side in (False, True)]
    assert sides[0].isdisjoint(sides[1])
    every = sizes[0] * sizes[1] * sizes[2]
    assert 0.5 < len(sides[1]) / (every / HELD_OUT_OF) <= 1.2, "most of the held-out combinations are met"


@pytest.mark.parametrize("held_out", [False, True])
def test_every_template_is_filled(held_out: bool) -> None:
    dice = Dice(3, held_out)
    texts = tales(3, 400, held_out)
    for _ in range(400):
        messages = dialogues.dialogue(dice)
        roles = [message["role"] for message in messages if message["role"] != "system"]
        assert roles == ["user", "assistant"] * (len(roles) // 2) != []
        texts += [message["content"] for message in messages]
    for text in texts:
        assert text and not re.search(r"[\[\]{}|]|  | [.,!?]|\ba [aeio]", text), text


def test_facts_fit_together() -> None:
    for facts in ("name", "job", "does", "pet_name", "food"):
        values = [getattr(person, facts) for person in PEOPLE]
        assert len(set(values)) == len(values), f"two people share a {facts}, so a question about it has two answers"
    assert {person.place for person in PEOPLE} == set(PLACES), "somebody works at every place, and every place exists"
    assert {person.pet for person in PEOPLE} <= {animal.kind for animal in world.ANIMALS}


def test_answers_follow_the_facts() -> None:
    dice, seen = Dice(9), 0
    for _ in range(3000):
        for user, assistant in itertools.pairwise(dialogues.dialogue(dice)):
            for person in PEOPLE:
                if user["content"] == f"Who {person.does}?":
                    assert assistant["content"].startswith(f"{person.name} {person.does}.")
                    seen += 1
    assert seen > 10


def test_brief_is_brief() -> None:
    dice = Dice(4)
    for _ in range(1500):
        system, *messages = dialogues.dialogue(dice)
        if system["content"] in dialogues.BRIEF_SYSTEMS:
            assert all(len(message["content"].split()) < 70 for message in messages)
