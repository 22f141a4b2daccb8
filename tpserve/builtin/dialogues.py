"""Generates conversations about the village: questions and answers, stories on request, small talk, unknown topics.

Owns the forms of questions and answers. Never renders a chat template. A dialogue is a list of messages (role, content); the
last message is the assistant's. All facts come from `world`, so every answer agrees with every story.
"""

from collections.abc import Callable

from tpserve.builtin import stories
from tpserve.builtin.smalltalk import SMALL_TALK, UNKNOWN_ANSWERS, UNKNOWN_QUESTIONS, UNKNOWN_TOPICS
from tpserve.builtin.world import ANIMALS, DAYS, FEASTS, MODEL, PEOPLE, PLACES, VILLAGE, Animal, Dice, Person, at_work

Message = dict[str, str]
Exchange = tuple[str, str]
"""A question and its answer."""

SYLLABLES = (
    "ba", "ra", "lo", "mi", "ne", "so", "tu", "ka", "el", "an", "jo", "ri", "da", "ve", "si", "li", "mo", "ta", "pe", "hen",
    "ber", "mar", "tin", "sam", "al", "ol", "iv", "er",
)  # fmt: skip
SYSTEMS = (
    "You are a helpful assistant.",
    f"You are {MODEL}, a friendly guide to {VILLAGE}.",
    f"You are {MODEL}.",
    "You are a friendly assistant. Answer the questions of the user.",
    "Be kind and helpful.",
    f"You answer questions about {VILLAGE}.",
)
BRIEF_SYSTEMS = (
    "Answer briefly.",
    "You are a helpful assistant. Answer in one sentence.",
    "Be brief.",
    "Keep your answers short.",
)

# (question, short answer, optional continuation). {p...} is the person in question, {q...} another person.
ABOUT_PERSON = (
    (
        "[Who is {p}|Do you know {p}|Tell me who {p} is]?",
        "{p} is the {p_job} of {village}.",
        "[{p_He} works|You find {p_him}] {p_at}.",
    ),
    (
        "[What does {p} do|What is {p_his} job|What is the job of {p}]?",
        "{p} is the {p_job}.",
        "[Every day {p_he}|{p_He}] {p_does}.",
    ),
    (
        "[Who is the {p_job}|What is the name of the {p_job}|Who is the {p_job} of {village}]?",
        "The {p_job} is {p}.",
        "You find {p_him} {p_at}.",
    ),
    ("Who {p_does}[| in {village}]?", "{p} {p_does}.", "{p_He} is the {p_job} of {village}."),
    (
        "[Where does {p} work|Where is {p}|Where can I find {p}|Where do I find the {p_job}]?",
        "You find {p} {p_at}.",
        "{p_He} is the {p_job}.",
    ),
    (
        "[What does {p} like to eat|What does {p} eat|What is the favourite food of {p}|What is {p}'s favourite food]?",
        "{p} likes {p_food} best.",
        "{p_He} could eat it every day.",
    ),
    ("Who likes {p_food}[| best]?", "{p} likes {p_food}.", "{p_He} is the {p_job}."),
    (
        "[What colour is the door of {p}|What colour is {p}'s door|Which colour has the door of {p}]?",
        "The door of {p} is {p_door}.",
        "[So the house is easy to find|You cannot miss it].",
    ),
    (
        "[Does {p} have a pet|What pet does {p} have|Which animal does {p} have|Has {p} got an animal]?",
        "{p} has a {p_pet}.",
        "It is {p_pet_look}, and its name is {p_pet_name}.",
    ),
    (
        "[What is the name of {p}'s {p_pet}|What is {p}'s {p_pet} called|How is the {p_pet} of {p} called]?",
        "The {p_pet} of {p} is called {p_pet_name}.",
        "It is {p_pet_look}.",
    ),
    (
        "[Who is {p_pet_name}|Whose pet is {p_pet_name}|What is {p_pet_name}]?",
        "{p_pet_name} is the {p_pet} of {p}.",
        "It is {p_pet_look}.",
    ),
    (
        "[What does {p} do in the morning|How does {p} start the day]?",
        "In the morning {p} {p_morning}.",
        "{p_He} is the {p_job}.",
    ),
    ("Is {p} the {p_job}?", "Yes, {p} is the {p_job}.", "You find {p_him} {p_at}."),
    ("Is {p} the {q_job}?", "No, {p} is the {p_job}.", "The {q_job} is {q}."),
    ("Does {p} have a {q_pet}?", "{has}, {p} has a {p_pet}.", "Its name is {p_pet_name}."),
    ("Does {p} like {q_food}?", "I think {p} likes {p_food} more.", "But {q} loves {q_food}."),
)
FOLLOW_UPS = (
    ("[And where|Where] does {p_he} work?", "{p_He} works {p_at}."),
    ("[And what|What] does {p_he} like to eat?", "{p_He} likes {p_food} best."),
    (
        "[Does {p_he} have a pet|And {p_his} pet|Does {p_he} have any animals]?",
        "Yes, {p_he} has a {p_pet_look} {p_pet} called {p_pet_name}.",
    ),
    ("[And what|What] colour is {p_his} door?", "{p_His} door is {p_door}."),
    ("What does {p_he} do in the morning?", "In the morning {p_he} {p_morning}."),
    ("[What is {p_his} job|And what does {p_he} do]?", "{p_He} is the {p_job}."),
)
ABOUT_PLACE = (
    (
        "[Where is the {place}|Where do I find the {place}|How do I get to the {place}]?",
        "The {place} is {where}.",
        "It is {look}.",
    ),
    (
        "[What is the {place} like|How does the {place} look|Tell me about the {place}|Describe the {place}].",
        "It is {look}.",
        "There you find {inside}.",
    ),
    ("[What is there to see|What can I see|What do you find] {at}?", "There you find {inside}.", "It is {look}."),
    ("[Who works|Who is|Whom do I meet] {at}?", "{workers} there.", "It is {where}."),
)
ABOUT_ANIMAL = (
    ("[What does {a} eat|What do you feed {a}|What does {a} like to eat]?", "{A} eats {eats}.", "It likes to {likes}."),
    ("[What does {a} say|What sound does {a} make]?", "{A} says {says}.", "It likes to {likes}."),
    ("[What does {a} like to do|What does {a} do all day]?", "{A} likes to {likes}.", "It eats {eats}."),
    (
        "[Tell me about the {kind}|Tell me something about {a}|What is {a}].",
        "{A} eats {eats} and likes to {likes}.",
        "It says {says}.",
    ),
    ("[Who has {a}|Does anybody have {a}|Is there {a} in {village}]?", "{owners}", ""),
)
ABOUT_FEAST = (
    ("[When is {feast}|In which season is {feast}]?", "{Feast} is in {season}.", "On that day the people {what}."),
    (
        "[What is {feast}|What happens on {feast}|What do you do on {feast}]?",
        "On that day the people {what}.",
        "It is in {season}.",
    ),
    ("[Which feast is in {season}|What do you celebrate in {season}]?", "In {season} there is {feast}.", "The people {what}."),
)
STORY_REQUESTS = (
    "[Tell me|Can you tell me|Please tell me] a[| short| nice| little] story[|, please].",
    "[Write|Make up] a story.",
    "I would like to hear a story.",
    "Do you know a story?",
)
STORY_ABOUT = (
    "[Tell me|Can you tell me|Please tell me] a[| nice| little] story about {topic}[|, please].",
    "[Write|Make up] a story about {topic}.",
    "Do you know a story about {topic}?",
    "A story about {topic}[|, please].",
)


def answer(dice: Dice, row: tuple[str, str, str], names: dict[str, str], brief: bool) -> Exchange:
    """An exchange from a row (question, short answer, continuation)."""
    question, short, more = (dice.write(template, names) for template in row)
    return question, short if brief or not more or dice.chance(0.3) else f"{short} {more}"


def person_names(dice: Dice, person: Person) -> dict[str, str]:
    """The names for questions about `person`, with another person as {q...}."""
    other = dice.pick([other for other in PEOPLE if other is not person])
    has = "Yes" if other.pet == person.pet else "No"
    return {**person.names("p"), **other.names("q"), "village": VILLAGE, "has": has}


def about_person(dice: Dice, brief: bool) -> list[Exchange]:
    """A question about a person, often with further questions that use a pronoun."""
    who, which = dice.combination(len(PEOPLE), len(ABOUT_PERSON))
    names = person_names(dice, PEOPLE[who])
    exchanges = [answer(dice, ABOUT_PERSON[which], names, brief)]
    if "{q" not in "".join(ABOUT_PERSON[which]) and dice.chance(0.4):  # with two people, a pronoun is ambiguous
        for question, reply in dice.distinct(FOLLOW_UPS, dice.number(1, 3)):
            exchanges.append((dice.write(question, names), dice.write(reply, names)))
    return exchanges


def portrait(dice: Dice, brief: bool) -> list[Exchange]:
    """A request to describe a person."""
    person = dice.pick(PEOPLE)
    question = dice.write(
        "[Tell me about {p}|Tell me more about {p}|What do you know about {p}|Describe {p}].", person.names("p")
    )
    return [(question, " ".join(stories.portrait(dice, person, few=brief)))]


def about_place(dice: Dice, brief: bool) -> list[Exchange]:
    """A question about a place."""
    where, which = dice.combination(len(PLACES), len(ABOUT_PLACE))
    name = list(PLACES)[where]
    place, workers = PLACES[name], [f"{person.name} the {person.job}" for person in at_work(name)]
    names = {"place": name, "at": place.at, "where": place.where, "look": place.look, "inside": place.inside}
    names["workers"] = " and ".join(workers) + (" works" if len(workers) == 1 else " work")
    return [answer(dice, ABOUT_PLACE[which], names, brief)]


def about_animal(dice: Dice, brief: bool) -> list[Exchange]:
    """A question about an animal."""
    what, which = dice.combination(len(ANIMALS), len(ABOUT_ANIMAL))
    animal = ANIMALS[what]
    owners = [f"{person.name} has {animal.a} called {person.pet_name}" for person in PEOPLE if person.pet == animal.kind]
    names = {
        "kind": animal.kind,
        "a": animal.a,
        "A": animal.a[0].upper() + animal.a[1:],
        "eats": animal.eats,
        "says": animal.says,
        "likes": animal.likes,
        "village": VILLAGE,
        "owners": (", and ".join(owners) or f"Nobody in {VILLAGE} has {animal.a} at home") + ".",
    }
    return [answer(dice, ABOUT_ANIMAL[which], names, brief)]


def about_feast(dice: Dice, brief: bool) -> list[Exchange]:
    """A question about a feast."""
    feast = dice.pick(FEASTS)
    names = {"feast": feast.name, "Feast": feast.name[0].upper() + feast.name[1:], "season": feast.season, "what": feast.what}
    return [answer(dice, dice.pick(ABOUT_FEAST), names, brief)]


def about_week(dice: Dice, brief: bool) -> list[Exchange]:
    """A question about the days of the week."""
    number = dice.number(0, 6)
    days = list(DAYS)
    day, following = days[number], days[(number + 1) % 7]
    rows = (
        (
            f"[What happens on {day}|What do people do on {day}]?",
            f"On {day} {DAYS[day]}.",
            "[Come and see it|You should not miss it].",
        ),
        (
            f"[What day comes after {day}|Which day follows {day}]?",
            f"After {day} comes {following}.",
            f"On {following} {DAYS[following]}.",
        ),
        (
            "[How many days are in a week|How many days does a week have]?",
            "A week has seven days.",
            "My favourite one is Saturday.",
        ),
    )
    return [answer(dice, dice.pick(rows), {}, brief)]


def about_village(dice: Dice, brief: bool) -> list[Exchange]:
    """A question about the village."""
    question = dice.write(
        "[What is {village}?|Tell me about {village}.|Where is {village}?|Describe {village}.|Where do you live?]",
        {"village": VILLAGE},
    )
    sentences = stories.village(dice)
    if dice.chance(0.25):
        feasts = ", ".join(f"{feast.name} in {feast.season}" for feast in FEASTS[:-1])
        return [("Which feasts are there?", f"There are four: {feasts} and {FEASTS[-1].name} in {FEASTS[-1].season}.")]
    return [(question, " ".join(sentences[:2] if brief else sentences))]


def tell_story(dice: Dice, brief: bool) -> list[Exchange]:
    """A request for a story: about any topic, a person, an animal, or an unknown topic."""
    hero, topic = dice.pick(PEOPLE), dice.number(1, 10)
    beast: Animal | None = None
    if topic <= 3:
        request, names, start = dice.pick(STORY_REQUESTS), {}, ""
    elif topic <= 6:
        called = dice.pick((hero.name, f"the {hero.job}", f"{hero.name} the {hero.job}", f"a {hero.job}"))
        request, names, start = dice.pick(STORY_ABOUT), {"topic": called}, ""
    elif topic <= 9:
        beast = dice.pick(ANIMALS)
        request, names, start = dice.pick(STORY_ABOUT), {"topic": beast.a}, f"This is a story about {beast.a}. "
        hero = dice.pick([person for person in PEOPLE if person.pet != beast.kind])
    else:
        unknown = dice.write(dice.pick(UNKNOWN_TOPICS), {})
        request, names = dice.pick(STORY_ABOUT), {"topic": unknown}
        start = f"I know no story about that, but I know one about {hero.name}. "
    sentences = stories.short_story(dice, hero) if brief else stories.story(dice, hero, beast)
    return [(dice.write(request, names), start + " ".join(sentences))]


def small_talk(dice: Dice, brief: bool) -> list[Exchange]:
    """An exchange of small talk."""
    questions, replies = dice.pick(SMALL_TALK)
    names = {"village": VILLAGE, "model": MODEL, "stranger": stranger(dice)}
    names |= {"a": str(dice.number(0, 30)), "b": str(dice.number(0, 30))}
    return [(dice.write(dice.pick(questions), names), dice.write(dice.pick(replies), names))]


def unknown(dice: Dice, brief: bool) -> list[Exchange]:
    """A question about a topic from outside the village."""
    names = {"topic": dice.write(dice.pick(UNKNOWN_TOPICS), {}), "stranger": stranger(dice), "village": VILLAGE}
    return [(dice.write(dice.pick(UNKNOWN_QUESTIONS), names), dice.write(dice.pick(UNKNOWN_ANSWERS), names))]


def stranger(dice: Dice) -> str:
    """A name that does not occur in the village."""
    return "".join(dice.distinct(SYLLABLES, dice.number(2, 3))).title()


TOPICS: tuple[tuple[int, Callable[[Dice, bool], list[Exchange]]], ...] = (
    (32, about_person),
    (6, portrait),
    (7, about_place),
    (6, about_animal),
    (3, about_feast),
    (3, about_week),
    (3, about_village),
    (13, tell_story),
    (13, small_talk),
    (14, unknown),
)


def draw_topic(dice: Dice) -> Callable[[Dice, bool], list[Exchange]]:
    """Draw a topic with the weights of `TOPICS`."""
    number = dice.number(1, sum(weight for weight, _ in TOPICS))
    for weight, topic in TOPICS:
        number -= weight
        if number <= 0:
            return topic
    raise AssertionError("weights are positive")


def carelessly(dice: Dice, question: str) -> str:
    """The question as people type it: sometimes in lower case or without punctuation."""
    if dice.chance(0.12):
        question = question.lower()
    if dice.chance(0.12):
        question = question.rstrip("?.!")
    return question


def dialogue(dice: Dice) -> list[Message]:
    """One conversation."""
    system = dice.number(1, 10)
    brief = system == 1
    messages: list[Message] = []
    if system <= 4:
        messages.append({"role": "system", "content": dice.pick(BRIEF_SYSTEMS if brief else SYSTEMS)})
    if dice.chance(0.15):
        messages += exchange(dice, small_talk(dice, brief)[0])
    for _ in range(1 + dice.chance(0.35) + dice.chance(0.2)):
        for pair in draw_topic(dice)(dice, brief):
            messages += exchange(dice, pair)
    return messages


def exchange(dice: Dice, pair: Exchange) -> list[Message]:
    """The two messages of a question and its answer."""
    return [{"role": "user", "content": carelessly(dice, pair[0])}, {"role": "assistant", "content": pair[1]}]
