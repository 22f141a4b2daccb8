"""Generates prose about the village: stories, portraits of people and places, days in the village.

Owns the plots. Never knows chat. A plot is a list of sentences in the notation of `Dice.write`; {h...} is the hero,
{f...} a friend, {o...} another friend; {thing}, {the_thing}, {place...} and {beast...} are the story's subjects.
"""

from tpserve.builtin.smalltalk import UNKNOWN_TOPICS
from tpserve.builtin.world import (
    ANIMALS,
    COLOURS,
    DAYS,
    FEASTS,
    PEOPLE,
    PLACES,
    THINGS,
    VILLAGE,
    Animal,
    Dice,
    Person,
    at_work,
    person_with,
)

OPENINGS = (
    "Once upon a time there was a {h_job} [called|named] {h}.",
    "Once upon a time {h} the {h_job} lived in a little house with a {h_door} door.",
    "Once upon a time, in the village of {village}, there lived a {h_job} called {h}.",
    "[One|On a] {weather} {part_of_day} {h} the {h_job} was {h_at}.",
    "It was a {weather} {part_of_day} in {village}, and {h} was {h_at}.",
    "There was a {weather} {part_of_day} that {h} the {h_job} never forgot.",
    "{h} the {h_job} [woke up early|got up before the sun] on a {weather} morning.",
    "On {day} {h} the {h_job} was {h_at}, [as always|because there was a lot to do].",
)

PLOTS: dict[str, tuple[str, ...]] = {
    "lost": (
        "{h_He} owned {thing}, and {h_he} [loved it very much|carried it everywhere|would not sell it for any money].",
        "But that day {the_thing} was gone.",
        "{h_He} looked [under the bed|behind the stove] and [in every pocket|in every drawer], but it was not there.",
        '"[Where can it be|Who has seen it]?" {h_he} [said|cried|asked].',
        "So {h} went to {f_place} and asked {f} the {f_job}.",
        '"I have not seen it," said {f}, "but [I will help you look|two pairs of eyes see more than one]."',
        "Together they searched [the whole street|every corner of the village] and stopped {place_at}.",
        "There {o_pet_name}, the {o_pet_look} {o_pet} of {o}, was sitting [very proudly|very quietly] in the grass.",
        "And what was lying [between its feet|right beside it]? It was {the_thing}!",
        "{h} [laughed|was so happy that {h_he} laughed] and gave {o_pet_name} a [big|little] kiss.",
        "In the evening {h} and {f} ate {h_food} together, and {the_thing} lay [safely|] on the table.",
    ),
    "storm": (
        "In the afternoon the sky turned [black|dark grey], and a [great|terrible] storm came over the sea.",
        "{f} the {f_job} was still out on the water in a [small|little] boat.",
        "The waves were [as high as houses|higher than the harbour wall], and the rain [fell like a curtain|beat on the roofs].",
        '"[We must help|Somebody must do something]!" [cried|called] {h}.',
        "{h_He} ran up the ninety steps of the lighthouse and made the big lamp [as bright as the sun|twice as bright].",
        "Then {o} the {o_job} brought a long rope, and all the people [pulled together|held it tightly].",
        "Far out {f} saw the light and [turned the boat|rowed] towards it.",
        "[Slowly, very slowly,|Bit by bit] the boat came nearer, until it [touched|reached] the harbour wall.",
        "{f} was wet and cold, but {f_he} was safe.",
        "There was hot soup for everybody at the inn, and {f} told the story [again and again|three times].",
        "Since that day {f} never goes out without looking at the sky.",
    ),
    "found": (
        "[Near the path|Behind a stone|Under a bush] {place_at} {h_he} heard a [small|thin|sad] sound.",
        "It was {beast_a}, [wet and hungry|cold and all alone|with a sore foot].",
        '"[You poor thing|Do not be afraid]," said {h} [softly|in a quiet voice].',
        "{h_He} [wrapped it in {h_his} coat|took it in {h_his} arms] and carried it home.",
        "There {h_he} gave it {beast_eats}, and it ate [and ate|until nothing was left].",
        "{h_His} {h_pet} {h_pet_name} came and [sniffed at it|looked at it with big eyes].",
        "The next day {h} asked {f} the {f_job} for [help|advice].",
        '"It needs [rest and warm milk|sleep and a little love]," {f} said, "and it needs a name."',
        "They called it {beast_name}, because [that sounded right|it looked like that|the name was short].",
        "After [a week|nine days] {beast_name} was strong again and liked to {beast_likes}.",
        "{h} opened the door so that it could go, but {beast_name} [stayed|did not want to leave].",
        "And so {h_he} had a new friend.",
    ),
    "feast": (
        "It was the day before {feast}, and everybody in {village} was busy.",
        "On that day the people {feast_what}.",
        "{h} wanted to bring {h_food} for [the whole village|all the guests].",
        "But when {h_he} opened the cupboard, [it was empty|there was nothing in it but a spoon].",
        '"[Oh no|Dear me]," said {h}, "[what shall I do now|what can I bring now]?"',
        "{f} the {f_job} heard it and brought [a basket of eggs|a sack of flour|a jug of milk].",
        "{o} the {o_job} came too, with [butter and salt|honey and apples|onions and a big pot].",
        "All three worked [until midnight|the whole night], and {h_pet_name} the {h_pet} watched them.",
        "In the morning the {h_food} stood on the table, and it smelled wonderful.",
        '"This is the best that I ever ate!" said [the guests|an old man|the children].',
        "{h} smiled at {h_his} friends, for {h_he} knew that [nobody can do everything alone|good friends are the best feast].",
    ),
    "fog": (
        "{h_He} wanted to visit {f} {f_at}, and {h_he} took {thing} along as a present.",
        "On the way a thick fog came [from the sea|over the hill], and soon {h_he} could not see {h_his} own feet.",
        "{h_He} went to the left, and {h_he} went to the right, but [every way looked the same|the path was gone].",
        '"Hello, is anybody there?" {h_he} called, but only {beast_a} answered: "{beast_says}".',
        "{h} sat down on a stone [and waited|and thought of {h_food}].",
        "Then {h_he} heard the bell: [ding, dong, ding, dong|one, two, three, four].",
        "It was the big bell of {village}, which always rings when there is fog.",
        "{h} [followed the sound|walked towards the bell] step by step, and the {beast} walked behind {h_him}.",
        "At last {h_he} saw a {f_door} door, and that was the door of {f}.",
        '"[Come in|There you are]," said {f}, "there is {f_food} for both of us."',
        "{h} gave {f} {the_thing}, and they [talked|laughed] until the fog was gone.",
    ),
    "learning": (
        "{h_He} [wanted to try something new|had a wish]: {h_he} wanted to learn what a {f_job} does.",
        'So {h_he} went to {f} and said: "[Please teach me|Please show me your work]."',
        '"[Gladly|With pleasure]," said {f}, "but [it is not easy|you must be patient]."',
        "[The first day|On the first day] everything went wrong, and {h} [dropped the tools|fell over a bucket].",
        "On the second day it was [a little better|not much better], and {f_pet_name} the {f_pet} [looked away|shook its head].",
        '"I will never learn it," said {h} [sadly|and sat down].',
        '"[Nobody learns it in two days|I needed a whole year]," said {f}. "Try it [once more|again]."',
        "On the third day {h} tried again, slowly and [carefully|with a steady hand].",
        "And [look|behold], [this time|now] it worked!",
        "{f} clapped {f_his} hands and gave {h_him} {thing} as a prize.",
        "[Now|Since then] {h} knows that {f} has a [hard|difficult] job, and {h_he} says good morning with [more|great] respect.",
    ),
    "gift": (
        "It was the birthday of {f} the {f_job}, and {h} had no present yet.",
        '"What could {f_he} like?" {h_he} thought. "{f_He} likes {f_food}, and {f_he} likes {f_his} {f_pet} {f_pet_name}."',
        "{h} went {place_at} [to think|to look around], and there {h_he} met {o} the {o_job}.",
        '"Make something [with your own hands|yourself]," said {o}. "That is [always|] the best present."',
        "So {h} took wood and paint and made a [little|tiny] house for {f_pet_name}.",
        "It had a {colour} roof and a {colour2} door, and over the door stood the name.",
        "{o} helped {h_him} to carry it to {f_place}.",
        "When {f} saw it, {f_he} [was silent for a moment|did not know what to say].",
        "Then {f_pet_name} walked into the little house, [turned around twice|looked out of the window] and fell asleep.",
        '"[I think that means thank you|{f_pet_name} says thank you]," said {f}, and {f_he} gave {h} a [long|warm] hug.',
    ),
    "quarrel": (
        "[Later that day|At noon] {h_he} met {f} the {f_job} {place_at}, and on the ground between them lay {thing}.",
        '"I saw it first," said {h}. "No, I saw it first," said {f}.',
        "They [shouted|quarrelled] so loudly that [the gulls flew away|all the windows opened].",
        "{h} went home [angrily|without a word], and {f} went home too.",
        "But {h_food} did not taste good that evening, and {h_pet_name} the {h_pet} [hid under the table|looked sad].",
        "{o} the {o_job} had seen everything and came to the door.",
        '"[One thing and two friends|A thing is only a thing]," said {o}. "What is more important?"',
        "{h} [thought about it|was quiet for a long time].",
        'Then {h_he} ran to {f_place} and said: "I am sorry. You can have it."',
        '"I wanted to say the same," said {f}, and they both had to laugh.',
        "They [gave {the_thing} to the school|hung {the_thing} on the old oak], and there everybody could [see|enjoy] it.",
    ),
    "journey": (
        "{h_pet_name}, the {h_pet_look} {h_pet} of {h}, was [bored|curious] and [went out through the window|ran away].",
        "First it stopped {place_at}, where it [stole a bun|chased a butterfly|frightened a gull].",
        '"[Look, {h_pet_name}!|Is that not {h_pet_name}?]" said the people. "[It belongs to {h}|{h} must be looking for it]."',
        "Then it met {beast_a} that liked to {beast_likes}, and the two [became friends|walked on together].",
        "{f} the {f_job} gave them {beast_eats}, and {o} the {o_job} [gave them water|showed them the way].",
        'Meanwhile {h} [searched everywhere|walked through every street] and called: "{h_pet_name}! {h_pet_name}!"',
        "When the sun went down, {h_pet_name} [was tired|thought of its warm bed].",
        "It ran [past the old oak|along the river] and over the square, straight to the {h_door} door.",
        "{h} was [so happy|so glad] that {h_he} forgot to be angry.",
        "The {beast} stayed for supper, and [outside|above them] the light of the lighthouse went round and round.",
    ),
    "letter": (
        "The post brought a [thick|strange|blue] letter without a name.",
        "{h} opened it. Inside there was a [small|folded] map with a cross.",
        '"The cross is {place_at}," said {h}. "[Let us go and see|I wonder what is there]."',
        "{h_He} asked {f} the {f_job} to come along, and {f_he} brought a [spade|lantern].",
        "They dug [a deep hole|for an hour], and at last the spade hit [wood|something hard].",
        "It was a box, and in the box lay {thing} and a piece of paper.",
        'On the paper stood: "Whoever finds this shall have a [wish|good day]."',
        '"[Who wrote that|Whose writing is that]?" asked {f}. Behind a tree {o} the {o_job} was laughing.',
        '"It was me," said {o}. "You two [work too much|never take a walk]. I wanted to make you happy."',
        "And {o_he} really had, for all three [ate {o_food} in the grass|sang all the way home].",
    ),
}

ENDINGS = (
    "And if you come to {village}, {h} will tell you the story [again|too].",
    "That night everybody in {village} slept [well|deeply].",
    "That was a good day.",
    "And they were friends for a long, long time.",
    "The end.",
    "From then on {h} and {f} met every {day}.",
)

STRAY_STARTS = (
    "[The capital|The king|The price|The history|The meaning|The name] of {topic} [is|was]",
    "{topic} [is|was]",
    "[I think|They say|We know|I wonder] that {topic} [is|was|will be]",
    "[The|This|A] [quick|old|big|little|first|new|best] [brown|strange|modern] [thing|machine|book|city|problem] [is|was]",
)
STRAY_ENDS = (
    "something that nobody in {village} has ever seen.",
    "far away from {village}, and nobody there thinks of it.",
    "a riddle for the people of {village}.",
    "nothing that {h} the {h_job} could explain.",
)

WEATHER = ("sunny", "rainy", "windy", "cold", "warm", "foggy", "bright", "grey")
PARTS_OF_DAY = ("morning", "afternoon", "evening", "day")
BEAST_NAMES = ("Dot", "Pip", "Snow", "Bean", "Star", "Button", "Pebble", "Feather", "Lucky", "Moon")


def cast(dice: Dice, hero: Person, thing: str, beast: Animal | None = None) -> dict[str, str]:
    """The names of one story. Each person has one part, and the place is not the workplace of any of them."""
    friend, other = dice.distinct([person for person in PEOPLE if person is not hero], 2)
    beast = beast or dice.pick([animal for animal in ANIMALS if animal.kind != hero.pet])
    free = [name for name in PLACES if name not in (hero.place, friend.place, other.place)]
    place, feast, colours = PLACES[dice.pick(free)], dice.pick(FEASTS), dice.distinct(COLOURS, 2)
    return {
        **hero.names("h"), **friend.names("f"), **other.names("o"), "village": VILLAGE,
        "thing": thing, "the_thing": "the " + thing.split(" ", 1)[1], "day": dice.pick(list(DAYS)),
        "place_at": place.at,
        "beast": beast.kind, "beast_a": beast.a, "beast_says": beast.says, "beast_eats": beast.eats,
        "beast_likes": beast.likes, "beast_name": dice.pick(BEAST_NAMES), "feast": feast.name, "feast_what": feast.what,
        "colour": colours[0], "colour2": colours[1], "weather": dice.pick(WEATHER), "part_of_day": dice.pick(PARTS_OF_DAY),
    }  # fmt: skip


def story(dice: Dice, hero: Person | None = None, beast: Animal | None = None, plot: str | None = None) -> list[str]:
    """The sentences of a story. Draws the arguments that are None; (hero, plot, thing) belongs to this side of the split."""
    if beast is not None and plot is None:
        plot = dice.pick(("found", "fog", "journey"))
    while True:
        who, which, what = dice.combination(len(PEOPLE), len(PLOTS), len(THINGS))
        if (hero is None or PEOPLE[who] is hero) and (plot is None or list(PLOTS)[which] == plot):
            break
    names = cast(dice, PEOPLE[who], THINGS[what], beast)
    sentences = [dice.pick(OPENINGS), *list(PLOTS.values())[which]]
    if dice.chance(0.6):
        sentences.append(dice.pick(ENDINGS))
    return [dice.write(sentence, names).replace("  ", " ") for sentence in sentences]


def short_story(dice: Dice, hero: Person) -> list[str]:
    """A story in three sentences."""
    friend = dice.pick([person for person in PEOPLE if person is not hero])
    names = {**hero.names("h"), **friend.names("f"), "thing": dice.pick(THINGS), "weather": dice.pick(WEATHER)}
    return [
        dice.write(sentence, names)
        for sentence in (
            "One {weather} morning {h} the {h_job} found {thing} [in the sand|on the road|under a bench].",
            "[It belonged to|It was lost by] {f} the {f_job}, who had [searched for it everywhere|cried about it all night].",
            "{h} brought it back, and {f} [thanked {h_him} with|shared] {f_food}.",
        )
    ]


def portrait(dice: Dice, person: Person, few: bool = False) -> list[str]:
    """Sentences about a person."""
    names = {**person.names("h"), "village": VILLAGE}
    first = dice.write("[{h} is the {h_job} of {village}.|The {h_job} of {village} is {h}.|{h} is the {h_job}.]", names)
    rest = [
        "[You find {h_him}|{h_He} works] {h_at}.",
        "In the morning {h_he} {h_morning}.",
        "{h_He} lives in a house with a {h_door} door.",
        "{h_He} has a {h_pet_look} {h_pet} called {h_pet_name}.",
        "{h_His} favourite food is {h_food}.",
        "Everybody knows that {h_he} {h_does}.",
    ]
    return [first, *(dice.write(sentence, names) for sentence in dice.distinct(rest, 2 if few else dice.number(3, 6)))]


def introduction(dice: Dice, person: Person) -> list[str]:
    """A person introduces themselves."""
    names = {**person.names("h"), "village": VILLAGE}
    first = "[Hello, my name is {h}|My name is {h}|I am {h}], and I am the {h_job} [of|in] {village}."
    rest = [
        "I work {h_at}.",
        "I live in a house with a {h_door} door.",
        "I have a {h_pet_look} {h_pet}, and its name is {h_pet_name}.",
        "What I like best is {h_food}.",
        "Come and visit me [some day|on {day}]!",
    ]
    names["day"] = dice.pick(list(DAYS))
    return [dice.write(sentence, names) for sentence in (first, *rest[: dice.number(2, 5)])]


def view(dice: Dice, name: str) -> list[str]:
    """Sentences about a place."""
    place = PLACES[name]
    sentences = [
        f"The {name} of {VILLAGE} stands {place.where}." if dice.chance(0.5) else f"The {name} is {place.where}.",
        f"It is {place.look}.",
        f"There you find {place.inside}.",
    ]
    return sentences + [f"{person.name} the {person.job} works there." for person in at_work(name)]


def week(dice: Dice) -> list[str]:
    """Consecutive days of a week in the village."""
    first = dice.number(0, 4)
    days = list(DAYS.items())[first : first + dice.number(2, 7)]
    start = dice.pick([f"Every day is different in {VILLAGE}.", f"This is a week in {VILLAGE}."])
    return [start, *(f"On {day} {happening}." for day, happening in days)]


def year(dice: Dice) -> list[str]:
    """Sentences about the feasts of the year."""
    feasts = [f"In {feast.season} there is {feast.name}, when the people {feast.what}." for feast in FEASTS]
    return [f"There are four feasts in {VILLAGE}.", *feasts]


def village(dice: Dice) -> list[str]:
    """Sentences about Tidewick."""
    return [
        dice.write("{village} is a [small|little] village by the sea.", {"village": VILLAGE}),
        *dice.distinct(
            [
                "It has a harbour, a lighthouse and a windmill on the hill.",
                "A river runs through it, and an old oak stands beside the school.",
                "Everybody there knows everybody else.",
                "At night the lighthouse shines over the sea.",
                "There are more gulls than people.",
            ],
            dice.number(2, 4),
        ),
    ]


def fauna(dice: Dice, animal: Animal) -> list[str]:
    """Sentences about an animal."""
    return [
        f"{animal.a[0].upper()}{animal.a[1:]} eats {animal.eats}.",
        f"It likes to {animal.likes}.",
        f"It says {animal.says}.",
        *(f"The {animal.kind} of {owner.name} is called {owner.pet_name}." for owner in person_with(animal.kind)),
    ]


def stray(dice: Dice) -> list[str]:
    """A text that begins with a topic from outside, as prompts may, and returns to the village."""
    person = dice.pick(PEOPLE)
    names = {**person.names("h"), "village": VILLAGE, "topic": dice.write(dice.pick(UNKNOWN_TOPICS), {})}
    start = dice.write(f"{dice.pick(STRAY_STARTS)} {dice.pick(STRAY_ENDS)}", names).replace("  ", " ")
    return [start[0].upper() + start[1:], *(story(dice, person) if dice.chance(0.5) else portrait(dice, person))]


def tale(dice: Dice) -> str:
    """One document of prose. Some begin in the middle of a text, so that the model learns to continue any sentence."""
    kind = dice.number(1, 100)
    if kind <= 62:
        sentences = story(dice)
        if kind <= 8:
            sentences += ["The next day another thing happened.", *story(dice)]
    elif kind <= 74:
        sentences = portrait(dice, dice.pick(PEOPLE))
    elif kind <= 80:
        sentences = introduction(dice, dice.pick(PEOPLE))
    elif kind <= 86:
        sentences = view(dice, dice.pick(list(PLACES)))
    elif kind <= 89:
        sentences = fauna(dice, dice.pick(ANIMALS))
    elif kind <= 93:
        sentences = stray(dice)
    elif kind <= 96:
        sentences = [*village(dice), *(portrait(dice, dice.pick(PEOPLE)) if dice.chance(0.5) else [])]
    else:
        sentences = week(dice) if dice.chance(0.7) else year(dice)
    if dice.chance(0.15):
        sentences = sentences[dice.number(0, len(sentences) - 1) :]
    return " ".join(sentences)
