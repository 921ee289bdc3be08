"""Writes the items of two small tasks for lm-eval: things that a language model knows, and sentences that it completes.

    python pipelines/data/ability_items.py knowledge > pipelines/data/abilities/knowledge.jsonl
    python pipelines/data/ability_items.py sentences > pipelines/data/abilities/sentences.jsonl

Both are made of hand-written parts, so that abilities can be measured without a hub. They tell whether training has
broken something, and are no benchmark of how able a model is.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from typing import NamedTuple

_CAPITALS = {
    "France": "Paris", "Germany": "Berlin", "Italy": "Rome", "Spain": "Madrid", "Japan": "Tokyo", "China": "Beijing",
    "Egypt": "Cairo", "Greece": "Athens", "Russia": "Moscow", "Portugal": "Lisbon", "Austria": "Vienna",
    "Cuba": "Havana", "Ireland": "Dublin", "Norway": "Oslo", "Sweden": "Stockholm", "Finland": "Helsinki",
    "Denmark": "Copenhagen", "Poland": "Warsaw", "Hungary": "Budapest", "Belgium": "Brussels", "Turkey": "Ankara",
    "Iran": "Tehran", "Iraq": "Baghdad", "Peru": "Lima", "Chile": "Santiago", "Kenya": "Nairobi", "Canada": "Ottawa",
    "Australia": "Canberra", "Thailand": "Bangkok", "Ukraine": "Kyiv", "Nepal": "Kathmandu", "Bulgaria": "Sofia",
}  # fmt: skip
_OPPOSITES = {
    "hot": "cold", "big": "small", "early": "late", "open": "closed", "empty": "full", "rich": "poor", "dark": "light",
    "young": "old", "fast": "slow", "wet": "dry", "hard": "soft", "high": "low", "strong": "weak", "loud": "quiet",
    "deep": "shallow", "thick": "thin", "sharp": "blunt", "true": "false", "cheap": "expensive", "sweet": "sour",
    "wide": "narrow", "alive": "dead", "heavy": "light", "clean": "dirty", "public": "private", "ancient": "modern",
    "rough": "smooth", "brave": "cowardly", "guilty": "innocent", "asleep": "awake", "left": "right", "north": "south",
}  # fmt: skip
_KINDS = {
    "bird": ["robin", "sparrow", "eagle", "crow", "swan"],
    "fish": ["salmon", "trout", "herring", "cod"],
    "tree": ["oak", "birch", "pine", "willow"],
    "metal": ["copper", "iron", "silver", "zinc"],
    "fruit": ["pear", "banana", "plum", "cherry"],
    "insect": ["beetle", "wasp", "mosquito", "grasshopper"],
    "musical instrument": ["violin", "trumpet", "flute", "drum"],
    "planet": ["Mars", "Jupiter", "Venus"],
}
_USES = {
    "cut paper": "scissors", "tell the time": "a watch", "open a locked door": "a key", "drive in a nail": "a hammer",
    "keep off the rain": "an umbrella", "look at the stars": "a telescope", "sweep the floor": "a broom",
    "write on a blackboard": "chalk", "measure a fever": "a thermometer", "dig a hole": "a spade",
    "sew on a button": "a needle", "boil water": "a kettle", "cross a river": "a bridge", "pay in a shop": "money",
    "brush your hair": "a comb", "climb onto the roof": "a ladder",
}  # fmt: skip
#: Beginnings, how they go on, and how they do not: in number, in tense, and in what a pronoun stands for.
_AGREEMENTS = [
    ("The keys to the cabinet", " are on the table.", " is on the table."),
    ("The author of these books", " lives in Rome.", " live in Rome."),
    ("The pictures on the wall", " were painted by a child.", " was painted by a child."),
    ("The child with the two dogs", " runs along the beach.", " run along the beach."),
    ("The windows of the old house", " need new paint.", " needs new paint."),
    ("One of the students", " has forgotten a bag.", " have forgotten a bag."),
    ("The letters from my aunt", " arrive on Mondays.", " arrives on Mondays."),
    ("The teacher of the younger pupils", " is ill today.", " are ill today."),
    ("Yesterday evening we", " went to the theatre.", " go to the theatre."),
    ("Last summer she", " travelled to Greece.", " travels to Greece."),
    ("Next year they", " will build a school.", " built a school."),
    ("Two hundred years ago people", " wrote with feathers.", " will write with feathers."),
    ("Every morning he", " drinks a cup of coffee.", " drink a cup of coffee."),
    ("By the time we came, the train", " had left.", " leaves."),
    ("The woman hurt", " herself.", " himself."),
    ("The king admired", " himself.", " herself."),
    ("The boys washed", " themselves.", " himself."),
    ("My grandmother said that", " she was tired.", " he was tired."),
    ("The actress forgot", " her lines.", " his lines."),
    ("My uncle sold", " his car.", " her car."),
    ("There", " are many birds in the garden.", " is many birds in the garden."),
    ("There", " is a mouse in the kitchen.", " are a mouse in the kitchen."),
    ("She is taller", " than her brother.", " as her brother."),
    ("He is as old", " as my father.", " than my father."),
    ("This is the best film that I", " have ever seen.", " am ever seeing."),
    ("They have lived here", " since 1990.", " until tomorrow."),
    ("If it rains, we", " will stay at home.", " stayed at home."),
    ("Nobody in the village", " knows the answer.", " know the answer."),
    ("Both of my sisters", " sing in a choir.", " sings in a choir."),
    ("Neither the cat nor the dog", " was hungry.", " were being hungry."),
    ("I have never seen", " anything like it.", " nothing like it."),
    ("He asked me where", " I lived.", " did I live."),
]


class Item(NamedTuple):
    """A question, what may follow it, and the place of what is right among that."""

    question: str
    choices: list[str]
    label: int


def knowledge() -> Iterator[Item]:
    """Capitals, opposites, kinds, uses and sums, with four choices each."""
    yield from _with_others({f"The capital of {country} is": name for country, name in _CAPITALS.items()})
    yield from _with_others({f"The opposite of {word} is": other for word, other in _OPPOSITES.items()})
    kinds = {f"{thing.capitalize()} is a kind of": kind for kind, things in _KINDS.items() for thing in things}
    yield from _with_others(kinds)
    yield from _with_others({f"To {purpose} you need": tool for purpose, tool in _USES.items()})
    for one in range(3, 19):
        other = 3 + one * 7 % 16
        total = one + other
        yield _item(f"{one} + {other} =", str(total), [str(total + step) for step in (1, -2, 10)])


def sentences() -> Iterator[Item]:
    """Beginnings of sentences with a right and a wrong end."""
    for beginning, right, wrong in _AGREEMENTS:
        yield _item(beginning, right.strip(), [wrong.strip()])


def _with_others(answers: dict[str, str]) -> Iterator[Item]:
    """Items whose wrong choices are the answers to other questions."""
    known = sorted(set(answers.values()))
    for question, answer in answers.items():
        by_question = sorted(known, key=lambda other: _mixed(question + other))
        yield _item(question, answer, [other for other in by_question if other != answer][:3])


def _item(question: str, answer: str, others: list[str]) -> Item:
    label = int(_mixed(question)[:8], 16) % (len(others) + 1)
    choices = [*others[:label], answer, *others[label:]]
    return Item(question, [f" {choice}" for choice in choices], label)


def _mixed(text: str) -> str:
    """A hash of a text, in hexadecimal digits: an order that says nothing."""
    return hashlib.sha256(text.encode()).hexdigest()


if __name__ == "__main__":
    for item in {"knowledge": knowledge, "sentences": sentences}[sys.argv[1]]():
        print(json.dumps(item._asdict()))
