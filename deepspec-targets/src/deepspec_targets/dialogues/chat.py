"""Small talk: greetings, thanks, opinions, descriptions, weather, suggestions.

This file knows sentences that fit together in any order and chooses among them, so that there are always several good
ways to go on: sampling here has real entropy, which worked arithmetic has not. It knows no facts about the world.
"""

from collections.abc import Callable
from random import Random
from typing import Final

from deepspec_targets.dialogues.exercise import Exercise, Kind
from deepspec_targets.dialogues.words import CITIES, COLOURS, DAYS, FOODS, HOBBIES, NAMES, article, two

# What one can say of a thing: its parts, where it is found, what it is for.
OBJECTS: Final[dict[str, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]]] = {
    "bicycle": (
        ("two thin wheels", "a soft seat", "a small bell"),
        ("by the door", "in the yard"),
        ("a ride to town",),
    ),
    "lamp": (("a round foot", "a paper shade", "a long cord"), ("on the desk", "by the bed"), ("reading at night",)),
    "chair": (("four legs", "a straight back", "a soft seat"), ("at the table", "by the window"), ("a quiet break",)),
    "boat": (("a wooden mast", "a flat deck", "two oars"), ("on the lake", "by the shore"), ("a slow day on water",)),
    "house": (("a low roof", "wide windows", "a wooden door"), ("on a hill", "near the river"), ("a big family",)),
    "clock": (("two thin hands", "a round face", "a soft tick"), ("on the wall", "on the shelf"), ("being on time",)),
    "garden": (("a stone path", "tall grass", "a wooden fence"), ("behind the house", "near the river"), ("a picnic",)),
    "train": (("wide windows", "soft seats", "a loud horn"), ("at the station", "on the bridge"), ("a long trip",)),
}
SIZES: Final = ("small", "big", "old", "new", "simple", "pretty")
COLOUR_LIKE: Final = {
    "red": ("a ripe apple", "a fire at night"),
    "blue": ("the sea", "a clear sky"),
    "green": ("fresh grass", "a young leaf"),
    "yellow": ("the sun", "a lemon"),
    "white": ("fresh snow", "a cloud"),
    "black": ("the night", "a piece of coal"),
    "brown": ("warm bread", "dry earth"),
    "grey": ("the rain", "an old stone"),
}
WEATHER: Final[dict[str, tuple[str, ...]]] = {
    "rainy": (
        "Rain falls on the roofs.",
        "People hurry under umbrellas.",
        "The streets shine.",
        "Puddles grow slowly.",
    ),
    "sunny": ("The sky is clear.", "The light is warm.", "People sit outside.", "Every window is open."),
    "windy": ("The wind pulls at every coat.", "Leaves fly around.", "Hats are in danger.", "The flags are loud."),
    "snowy": ("Snow covers the cars.", "Every step is quiet.", "Children build a snowman.", "The air is cold."),
    "foggy": ("The fog hides the towers.", "Lamps glow softly.", "Sounds seem far away.", "Nobody drives fast."),
    "cloudy": ("Grey clouds hang low.", "The light is soft.", "It may rain later.", "The air is mild."),
}
TIMES: Final = ("morning", "afternoon", "evening", "night")
CHOICES: Final[tuple[dict[str, tuple[str, ...]], ...]] = (
    {
        "tea": ("it is calm and warm", "there are so many kinds"),
        "coffee": ("it wakes you up", "the smell is great"),
        "juice": ("it is fresh and sweet", "it is full of fruit"),
        "water": ("it is simple and clear", "it is always there"),
        "milk": ("it is soft and mild", "it goes with cookies"),
    },
    {
        "the sea": ("the waves never stop", "the air is salty and fresh"),
        "the mountains": ("the view is wide", "the air is clear"),
        "the forest": ("it is quiet there", "the shade is cool"),
        "the city": ("there is always something to do", "every street is different"),
        "the lake": ("the water is still", "you can swim and rest"),
    },
    {
        "cats": ("they are calm and clever", "they like a warm place"),
        "dogs": ("they are loyal", "they like long walks"),
        "birds": ("they sing in the morning", "they bring a room to life"),
        "fish": ("they are quiet", "they are nice to watch"),
    },
    {
        "books": ("you can read at your own pace", "they fit in a bag"),
        "films": ("you can watch them together", "the pictures stay with you"),
        "games": ("everyone can join", "you learn to lose"),
        "songs": ("they change your mood", "you can sing along"),
    },
)
MOMENTS: Final = (
    "in the morning",
    "on a rainy day",
    "after work",
    "with friends",
    "on a trip",
    "in winter",
    "in summer",
)
COMPANY: Final = ("my brother", "my sister", "my friends", "my family", "my parents", "a friend", "two children")
ACTIVITIES: Final = (
    ("a walk by the river", "the path is flat and easy"),
    ("a visit to the museum", "there is a lot to see"),
    ("a picnic in the park", "you only need a blanket and some bread"),
    ("a board game at home", "everyone can join"),
    ("a trip to the market", "you can taste fresh fruit"),
    ("a bicycle ride", "you see more of the town"),
    ("an evening with music", "it is good for the mood"),
    ("a film and some tea", "it is warm and cosy"),
)
DISHES: Final = ("a warm soup", "a big salad", "a simple stew", "a hot pan dish", "a baked dish", "a spicy curry")
TOPICS: Final = ("table", "letter", "list", "plan", "code", "trip", "report", "garden", "homework", "project")


def _greeting(rng: Random) -> Exercise:
    name, city, hobby = rng.choice(NAMES), rng.choice(CITIES), rng.choice(HOBBIES)
    about = rng.choice((f"from {city}", f"and I like {hobby}", f"from {city} and I like {hobby}"))
    prompt = rng.choice((f"Hello! I am {name} {about}.", f"Hi, my name is {name}. I am {about}.", f"Hey, {name} here."))
    if prompt.startswith("Hi,"):
        prompt = f"Hi, my name is {name}, {about}."
    elif prompt.startswith("Hey,"):
        prompt = f"Hey, {name} here, {about}."

    def answer(rng: Random) -> str:
        said = [rng.choice((f"Hello {name}!", f"Hi {name}!", f"Welcome, {name}!", f"Good to meet you, {name}!"))]
        if city in prompt:
            said.append(
                rng.choice((f"I hope {city} treats you well.", f"{city} sounds lovely.", f"How is {city} today?"))
            )
        if hobby in prompt:
            said.append(
                rng.choice(
                    (f"{hobby.capitalize()} is a fine thing to do.", f"I would love to hear more about {hobby}.")
                )
            )
        said.append(
            rng.choice(
                (
                    "What can I do for you?",
                    "How can I help you today?",
                    "Ask me anything you like.",
                    "Shall we start with a question?",
                    "I can help with numbers, tables and small programs.",
                )
            )
        )
        return " ".join(said)

    return Exercise(prompt, answer)


def _thanks(rng: Random) -> Exercise:
    topic, name, day = rng.choice(TOPICS), rng.choice(NAMES), rng.choice(DAYS)
    prompt = rng.choice(
        (
            f"Thank you for your help with the {topic}! {name}",
            f"Thanks, the {topic} is done. See you on {day}. {name}",
            f"The {topic} worked out well, thank you. Greetings from {name}",
            f"{name} says thanks for the {topic}. Bye until {day}!",
        )
    )

    def answer(rng: Random) -> str:
        said = [
            rng.choice((f"You are welcome, {name}!", f"My pleasure, {name}.", "Happy to help!", f"Any time, {name}!")),
            rng.choice(
                (
                    f"I am glad the {topic} went well.",
                    f"It was fun to work on the {topic} with you.",
                    f"The {topic} was a good idea.",
                    f"You did most of the work on the {topic} yourself.",
                )
            ),
        ]
        if day in prompt:
            said.append(rng.choice((f"See you on {day}!", f"Until {day}!", f"Have a good time until {day}.")))
        else:
            said.append(
                rng.choice(("Come back any time.", "Have a nice day!", "Take care!", "Let me know how it goes."))
            )
        return " ".join(said)

    return Exercise(prompt, answer)


def _opinion(rng: Random) -> Exercise:
    options = rng.choice(CHOICES)
    first, second = two(rng, tuple(options))
    moment = rng.choice(MOMENTS)
    prompt = rng.choice(
        (
            f"Do you prefer {first} or {second} {moment}?",
            f"What is better {moment}, {first} or {second}?",
            f"Which would you choose {moment}: {first} or {second}?",
            f"{first.capitalize()} or {second} {moment}, what do you think?",
            f"I cannot decide between {first} and {second} {moment}. Any thoughts?",
            f"Tell me {moment} if you would take {first} or {second}.",
        )
    )

    def answer(rng: Random) -> str:
        liked, other = (first, second) if rng.random() < 0.5 else (second, first)
        why, also = rng.choice(options[liked]), rng.choice(options[other])
        said = [
            rng.choice((f"I would choose {liked}, because {why}.", f"I lean towards {liked}: {why}.")),
            rng.choice(
                (f"Still, {other} can be a good choice, as {also}.", f"With {other}, on the other hand, {also}.")
            ),
            rng.choice(("What about you?", "It is a matter of taste.", f"But {moment}, both are fine.", "Try both!")),
        ]
        return " ".join(said)

    return Exercise(prompt, answer)


def _describe(rng: Random) -> Exercise:
    thing, size, colour = rng.choice(tuple(OBJECTS)), rng.choice(SIZES), rng.choice(COLOURS)
    whole = f"{size} {colour} {thing}"
    prompt = rng.choice(
        (
            f"Describe {article(whole)}.",
            f"Tell me about {article(whole)}.",
            f"Can you describe {article(whole)} in a few sentences?",
            f"What does {article(whole)} look like?",
            f"Write a few lines about {article(whole)}.",
        )
    )

    def answer(rng: Random) -> str:
        parts, places, uses = OBJECTS[thing]
        one, another = two(rng, parts)
        middle = [
            f"It has {one} and {another}.",
            rng.choice((f"You can find it {rng.choice(places)}.", f"It stands out {rng.choice(places)}.")),
            f"Its {colour} looks like {rng.choice(COLOUR_LIKE[colour])}.",
            f"It is just right for {rng.choice(uses)}.",
        ]
        said = [
            rng.choice((f"Picture {article(whole)}.", f"Imagine {article(whole)}.", f"Here is {article(whole)}.")),
            *rng.sample(middle, rng.randint(2, 4)),
        ]
        return " ".join(said)

    return Exercise(prompt, answer)


def _weather(rng: Random) -> Exercise:
    city, kind, time, day = rng.choice(CITIES), rng.choice(tuple(WEATHER)), rng.choice(TIMES), rng.choice(DAYS)
    prompt = rng.choice(
        (
            f"Describe a {kind} {time} in {city}.",
            f"Write two or three sentences about a {kind} {day} in {city}.",
            f"What is a {kind} {time} in {city} like?",
            f"Paint me a picture of {city} on a {kind} {day} {time}.",
        )
    )

    def answer(rng: Random) -> str:
        said = [
            rng.choice(
                (
                    f"It is a {kind} {time} in {city}.",
                    f"{city} wakes up to {article(kind)} day.",
                    f"In {city} it is {kind}.",
                )
            ),
            *rng.sample(WEATHER[kind], rng.randint(2, 3)),
            rng.choice(
                (
                    "It is a good time for tea.",
                    "Nobody is in a hurry.",
                    f"That is {city} at its best.",
                    "It will change soon.",
                )
            ),
        ]
        return " ".join(said)

    return Exercise(prompt, answer)


def _suggestion(rng: Random) -> Exercise:
    day, time, company = rng.choice(DAYS), rng.choice(TIMES[:3]), rng.choice(COMPANY)
    prompt = rng.choice(
        (
            f"What can I do on {day} {time} with {company}?",
            f"Suggest something for {day} {time} with {company}.",
            f"I am free on {day} {time} and will meet {company}. Any ideas?",
            f"Give me two ideas for a {day} {time} with {company}.",
        )
    )

    def answer(rng: Random) -> str:
        (one, why), (another, because) = rng.sample(ACTIVITIES, 2)
        if rng.random() < 0.5:
            opener = rng.choice((f"Here are two ideas for {day}:", "Two ideas:", f"For {day} {time} I would say:"))
            return f"{opener}\n\n1. {one.capitalize()}: {why}.\n2. {another.capitalize()}: {because}."
        opener = rng.choice((f"How about {one}?", f"I suggest {one}.", f"With {company} I would try {one}."))
        then = rng.choice((f"Or try {another}, as {because}.", f"If not, {another} is good too: {because}."))
        return f"{opener} {rng.choice(('I like it because', 'The good thing is:'))} {why}. {then}"

    return Exercise(prompt, answer)


def _dinner(rng: Random) -> Exercise:
    first, second = two(rng, FOODS)
    company = rng.choice(COMPANY)
    prompt = rng.choice(
        (
            f"What can I cook with {first} and {second} for {company}?",
            f"I have {first} and {second} at home. What should I make for {company}?",
            f"Suggest a dinner for {company} with {first} and {second}.",
        )
    )

    def answer(rng: Random) -> str:
        dish, other = two(rng, DISHES)
        said = [
            rng.choice((f"Make {dish} with {first} and {second}.", f"How about {dish} with {first} and {second}?")),
            rng.choice((f"Start with the {first}, then add the {second}.", f"Cook the {first} and {second} together.")),
            rng.choice(
                ("A little salt and pepper is enough.", "Add some oil and a clove of garlic.", "Let it cook slowly.")
            ),
            rng.choice((f"If you like, turn it into {other}.", f"I think {company} will like it.", "Enjoy your meal!")),
        ]
        return " ".join(said)

    return Exercise(prompt, answer)


TALK: Final[tuple[tuple[Callable[[Random], Exercise], float], ...]] = (
    (_greeting, 3),
    (_thanks, 2),
    (_opinion, 3),
    (_describe, 3),
    (_weather, 3),
    (_suggestion, 2),
    (_dinner, 3),
)


def draw(rng: Random) -> Exercise:
    """A line of small talk."""
    makers, weights = zip(*TALK, strict=True)
    maker: Callable[[Random], Exercise] = rng.choices(makers, weights=weights)[0]
    return maker(rng)


CHAT: Final = Kind("chat", 0.17, draw)
