"""The facts that the built-in model learns: Tidewick, a harbour village, its people, places, animals and feasts.

Owns the facts and the random choices. Never writes sentences (`stories` and `dialogues` do). Invariants:

    everything is a function of the seed
    a combination (for example hero, plot, thing) occurs either in training or on the held-out side, never on both
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import TypeVar

T = TypeVar("T")

VILLAGE = "Tidewick"
MODEL = "Wick"
HELD_OUT_OF = 11
"""One of so many combinations is held out of training."""

ARTICLE = re.compile(r"\ba(?= [aeio])")
ALTERNATIVES = re.compile(r"\[([^\[\]]*)\]")


class Dice:
    """Seeded choices on one side of the split."""

    def __init__(self, seed: int, held_out: bool = False) -> None:
        self._random = Random(f"{VILLAGE} {seed} {held_out}")
        self._held_out = held_out

    def pick(self, items: Sequence[T]) -> T:
        """One of the items."""
        return items[int(self._random.random() * len(items))]

    def chance(self, probability: float) -> bool:
        """True with this probability."""
        return self._random.random() < probability

    def number(self, low: int, high: int) -> int:
        """A whole number in [low, high]."""
        return low + int(self._random.random() * (high - low + 1))

    def distinct(self, items: Sequence[T], count: int) -> list[T]:
        """`count` different items in random order."""
        return self._random.sample(items, count)

    def combination(self, *sizes: int) -> tuple[int, ...]:
        """One index for each size; the combination belongs to this side of the split."""
        while True:
            drawn = tuple(int(self._random.random() * size) for size in sizes)
            if (sum((2 * i + 1) * index for i, index in enumerate(drawn)) % HELD_OUT_OF == 0) == self._held_out:
                return drawn

    def write(self, template: str, names: Mapping[str, str]) -> str:
        """Fill a template: `[one|another]` is a choice and may be nested, `{name}` is a name. "a" becomes "an"."""
        while "[" in template:
            template = ALTERNATIVES.sub(lambda match: self.pick(match[1].split("|")), template)
        return ARTICLE.sub("an", template.format_map(names))


@dataclass(frozen=True)
class Person:
    """An inhabitant of the village."""

    name: str
    she: bool
    job: str
    does: str
    """Completes "Who ...?"."""
    place: str
    pet: str
    """Kind of animal."""
    pet_name: str
    pet_look: str
    food: str
    door: str
    morning: str
    """Completes "In the morning she ..."."""

    def names(self, prefix: str) -> dict[str, str]:
        """The names that templates may use for this person, each with `prefix`."""
        subject, possessive, object_ = ("she", "her", "her") if self.she else ("he", "his", "him")
        words = {
            "": self.name, "_job": self.job, "_does": self.does, "_food": self.food, "_door": self.door,
            "_at": PLACES[self.place].at, "_place": f"the {self.place}", "_morning": self.morning,
            "_pet": self.pet, "_pet_name": self.pet_name, "_pet_look": self.pet_look,
            "_he": subject, "_He": subject.title(), "_his": possessive, "_His": possessive.title(), "_him": object_,
        }  # fmt: skip
        return {prefix + suffix: word for suffix, word in words.items()}


@dataclass(frozen=True)
class Place:
    """A place in the village."""

    at: str
    """With its preposition: "at the bakery"."""
    where: str
    """Completes "It stands ..."."""
    look: str
    """Completes "It is ..."."""
    inside: str
    """Completes "There you find ..."."""


@dataclass(frozen=True)
class Animal:
    """A kind of animal; `a`: with its article."""

    kind: str
    a: str
    says: str
    eats: str
    likes: str
    """Completes "It likes to ..."."""


@dataclass(frozen=True)
class Feast:
    """A feast of the year."""

    name: str
    season: str
    what: str
    """Completes "On that day the people ..."."""


PEOPLE = (
    Person("Ada", True, "lighthouse keeper", "keeps the lighthouse", "lighthouse", "cat", "Pepper", "grey",
           "barley soup", "white", "climbs the ninety steps and cleans the big lamp"),
    Person("Bram", False, "fisherman", "catches the fish", "harbour", "dog", "Biscuit", "brown",
           "fried herring", "blue", "rows out to sea and pulls in his nets"),
    Person("Clara", True, "baker", "bakes the bread", "bakery", "cat", "Crumb", "white",
           "honey cake", "yellow", "lights the oven and kneads the dough"),
    Person("Dorin", False, "boat builder", "builds the boats", "boatyard", "goose", "Admiral", "fat",
           "pea soup", "green", "sharpens his tools and sands the planks"),
    Person("Elsa", True, "teacher", "teaches the children", "school", "rabbit", "Clover", "soft",
           "apple pie", "red", "rings the school bell and writes the date on the board"),
    Person("Finn", False, "ferryman", "rows the ferry", "ferry landing", "dog", "Otto", "lazy",
           "smoked eel", "pink", "dries the benches of the ferry and waits for the first guests"),
    Person("Greta", True, "gardener", "grows the apples", "orchard", "hedgehog", "Thimble", "tiny",
           "plum jam", "green", "waters the young trees and counts the apples"),
    Person("Hugo", False, "blacksmith", "makes the horseshoes", "forge", "horse", "Cinder", "black",
           "roasted potatoes", "black", "stirs the fire and hammers the hot iron"),
    Person("Ines", True, "doctor", "helps the sick", "sickroom", "owl", "Doctor Feather", "sleepy",
           "mint tea with lemon", "white", "washes her hands and looks after the sick"),
    Person("Jonas", False, "shepherd", "looks after the sheep", "meadow", "dog", "Moss", "clever",
           "goat cheese", "brown", "leads the sheep up to the fresh grass"),
    Person("Kira", True, "weaver", "weaves the cloth", "weaving room", "cat", "Thread", "striped",
           "carrot stew", "purple", "dyes the wool and sits down at the loom"),
    Person("Lars", False, "miller", "grinds the flour", "windmill", "donkey", "Pudding", "slow",
           "pancakes", "yellow", "looks at the wind and turns the sails"),
    Person("Mina", True, "beekeeper", "keeps the bees", "orchard", "duck", "Paddle", "yellow",
           "strawberries with cream", "red", "opens the hives and says good morning to the bees"),
    Person("Nico", False, "bell ringer", "rings the evening bell", "bell tower", "crow", "Inky", "clever",
           "cheese bread", "blue", "oils the ropes and feeds the crows"),
    Person("Olga", True, "shopkeeper", "sells the candles", "shop", "parrot", "Captain", "green",
           "onion bread", "pink", "sweeps the floor and fills the shelves"),
    Person("Piet", False, "clockmaker", "repairs the clocks", "clock shop", "mouse", "Tick", "small",
           "walnut biscuits", "brown", "winds all the clocks and listens to them"),
    Person("Rosa", True, "innkeeper", "cooks at the inn", "inn", "hen", "Lady Pearl", "proud",
           "mushroom pie", "purple", "airs the rooms and puts the kettle on the stove"),
    Person("Tom", False, "postman", "brings the letters", "post office", "pony", "Stamp", "spotted",
           "bread and butter", "red", "sorts the letters and loads the cart"),
)  # fmt: skip

PLACES = {
    "lighthouse": Place("at the lighthouse", "on the cliff above the sea", "tall and white, with ninety steps",
                        "a big lamp, a brass telescope and a warm kitchen"),
    "harbour": Place("at the harbour", "at the end of the main street", "full of small boats and loud gulls",
                     "nets, baskets of fish and an old stone wall"),
    "bakery": Place("at the bakery", "next to the market square", "small and warm, and it smells of bread",
                    "a big oven, sacks of flour and fresh rolls"),
    "boatyard": Place("in the boatyard", "behind the harbour", "wide and noisy, and it smells of tar",
                      "planks, ropes and half a boat"),
    "school": Place("at the school", "beside the old oak", "a yellow house with one room",
                    "twelve little chairs, a map and a bell"),
    "ferry landing": Place("at the ferry landing", "where the river meets the sea", "a wooden pier with a green lamp",
                           "the ferry, a bench and a box of ropes"),
    "orchard": Place("in the orchard", "on the sunny side of the hill", "green, quiet and full of bees",
                     "apple trees, plum trees and a ladder"),
    "forge": Place("at the forge", "on the road to the river", "dark and hot, with a red fire",
                   "a hammer, an anvil and many horseshoes"),
    "sickroom": Place("in the sickroom", "above the shop", "clean and bright, with a window to the sea",
                      "two beds, a shelf of bottles and a jar of mint"),
    "meadow": Place("on the meadow", "on top of the hill", "wide, windy and full of flowers",
                    "forty sheep, a stone hut and a cold spring"),
    "weaving room": Place("in the weaving room", "above the bakery", "bright and full of colours",
                          "a loom, baskets of wool and a soft chair"),
    "windmill": Place("at the windmill", "on the low hill behind the village", "round and old, with four white sails",
                      "two heavy stones, sacks of corn and a lot of dust"),
    "bell tower": Place("in the bell tower", "in the middle of the village", "narrow and high, with a blue roof",
                        "a big bell, long ropes and a nest of crows"),
    "shop": Place("in the shop", "on the market square", "crowded and cosy, with a bell on the door",
                  "candles, buttons, soap and sweets"),
    "clock shop": Place("in the clock shop", "in a narrow lane", "tiny and never silent",
                        "a hundred clocks, small wheels and a magnifying glass"),
    "inn": Place("at the inn", "across from the harbour", "merry and warm, with round windows",
                 "long tables, a fireplace and five rooms for guests"),
    "post office": Place("at the post office", "beside the bell tower", "small and tidy, with a red door",
                         "letters, parcels and a pot of glue"),
}  # fmt: skip

ANIMALS = (
    Animal("cat", "a cat", "meow", "fish and cream", "sleep in the sun"),
    Animal("dog", "a dog", "woof", "bones and old bread", "run along the beach"),
    Animal("goose", "a goose", "honk", "grass and corn", "march through the village"),
    Animal("rabbit", "a rabbit", "thump", "carrots and clover", "hide under the table"),
    Animal("hedgehog", "a hedgehog", "sniff", "beetles and pears", "walk about at night"),
    Animal("horse", "a horse", "neigh", "hay and apples", "gallop over the meadow"),
    Animal("owl", "an owl", "hoo hoo", "moths and mice", "sit still and listen"),
    Animal("donkey", "a donkey", "hee-haw", "hay and thistles", "stand still when it should walk"),
    Animal("duck", "a duck", "quack", "water plants and crumbs", "swim in the pond"),
    Animal("crow", "a crow", "caw", "nuts and cheese", "collect shiny things"),
    Animal("parrot", "a parrot", "good morning", "seeds and grapes", "repeat every word"),
    Animal("mouse", "a mouse", "squeak", "cheese and crumbs", "live behind the clock"),
    Animal("hen", "a hen", "cluck", "corn and worms", "scratch in the yard"),
    Animal("pony", "a pony", "neigh", "oats and carrots", "pull the little cart"),
    Animal("sheep", "a sheep", "baa", "grass and herbs", "stay close together"),
    Animal("gull", "a gull", "kee kee", "fish and stolen bread", "sail on the wind"),
    Animal("seal", "a seal", "arf", "fish and crabs", "lie on the warm rocks"),
    Animal("fox", "a fox", "yip", "berries and eggs", "walk softly at the edge of the wood"),
)

FEASTS = (
    Feast("the Herring Fair", "spring", "fry herrings at the harbour and dance on the pier"),
    Feast("the Boat Race", "summer", "race small boats around the rocks and eat strawberry ice"),
    Feast("Lantern Night", "autumn", "carry paper lanterns up to the lighthouse and sing"),
    Feast("the Snow Supper", "winter", "sit together at one long table and eat hot soup"),
)

DAYS = {
    "Monday": "the washing hangs in every garden",
    "Tuesday": "the ferry brings the guests from the islands",
    "Wednesday": "there is a market on the square",
    "Thursday": "Kira shows the children how to weave",
    "Friday": "Bram sells fish at the harbour",
    "Saturday": "there is music and dancing at the inn",
    "Sunday": "everybody sleeps long and eats cake",
}

THINGS = (
    "a silver key", "a red scarf", "a blue kite", "a brass button", "a wooden whistle", "a small lantern", "a green umbrella",
    "a paper boat", "a golden ring", "a woollen hat", "a little drum", "a glass marble", "an old map", "a leather bag",
    "a tin spoon", "a white shell", "a straw basket", "a pocket watch", "a wooden flute", "a picture book",
)  # fmt: skip

COLOURS = ("white", "blue", "yellow", "green", "red", "pink", "black", "brown", "purple", "grey")


def person_with(pet: str) -> list[Person]:
    """Who has a pet of this kind."""
    return [person for person in PEOPLE if person.pet == pet]


def at_work(place: str) -> list[Person]:
    """Who works at a place."""
    return [person for person in PEOPLE if person.place == place]
