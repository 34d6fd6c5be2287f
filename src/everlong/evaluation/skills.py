"""Skills shown by many examples: mappings that nobody has seen, and unseen inputs to try them on."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from string import ascii_lowercase
from typing import Literal, TypeAlias

from everlong.errors import ConfigurationError, UnknownNameError
from everlong.evaluation.invented import invented_names
from everlong.evaluation.probes import Probe
from everlong.registry import unknown_name

Kind: TypeAlias = Literal["labels", "cipher", "format"]

_CATEGORIES = {
    "animal": (
        *(
            "horse",
            "tiger",
            "mouse",
            "eagle",
            "shark",
            "sheep",
            "whale",
            "camel",
            "rabbit",
            "monkey",
            "spider",
        ),
        *("turtle", "wolf", "bear", "frog", "goose", "snake", "zebra", "otter", "donkey"),
    ),
    "food": (
        *("bread", "cheese", "apple", "soup", "rice", "butter", "onion", "honey", "carrot", "cake", "lemon"),
        *("grape", "pasta", "salad", "peach", "sugar", "potato", "melon", "garlic", "sausage"),
    ),
    "tool": (
        *("hammer", "saw", "drill", "chisel", "wrench", "shovel", "axe", "rake", "pliers", "ladder", "file"),
        *("spade", "anvil", "clamp", "plough", "sickle", "crowbar", "mallet", "trowel", "screwdriver"),
    ),
    "garment": (
        *("shirt", "coat", "glove", "scarf", "shoe", "skirt", "jacket", "hat", "belt", "sock", "dress"),
        *("boot", "vest", "apron", "sweater", "trousers", "blouse", "cloak", "sandal", "mitten"),
    ),
}


@dataclass(frozen=True)
class Skill:
    """A mapping as a text of examples, and probes on inputs that are not among them.

    Attributes
    ----------
    kind : str
        What is mapped to what.
    text : str
        The demonstrations.
    probes : tuple of Probe
        Of the form "skill".
    """

    kind: str
    text: str
    probes: tuple[Probe, ...]


def skill(seed: int, kind: Kind, demonstrations: int = 32, tests: int = 16) -> Skill:
    """Return a skill that has to be learned from examples.

    Parameters
    ----------
    seed : int
        Same seed, same skill.
    kind : {"labels", "cipher", "format"}
        "labels": things of four kinds get an invented name for their kind. "cipher": every letter of a short
        word is moved some places on in the alphabet. "format": three fields are put into another order,
        between marks, and every mark counts.
    demonstrations : int
        Examples in the text.
    tests : int
        Probes.

    Raises
    ------
    UnknownNameError
        There is no such kind.
    ConfigurationError
        There are not that many inputs, or a number is below 1.
    """
    if kind not in _KINDS:
        raise UnknownNameError(unknown_name("skill", kind, list(_KINDS)))
    if demonstrations < 1 or tests < 1:
        raise ConfigurationError(f"{demonstrations} demonstrations and {tests} tests: at least one of each")
    draw = random.Random(f"skill {kind} {seed}")
    inputs, apply = _KINDS[kind](draw)
    if demonstrations + tests > len(inputs):
        raise ConfigurationError(
            f"the skill {kind!r} has {len(inputs)} inputs, not {demonstrations} + {tests}; ask for fewer"
        )
    shown, tried = inputs[:demonstrations], inputs[demonstrations : demonstrations + tests]
    return Skill(
        kind,
        "\n\n".join(f"{_prompt(each)} {apply(each)}" for each in shown) + "\n",
        tuple(Probe(_prompt(each), (apply(each),), "skill", is_exact=kind == "format") for each in tried),
    )


def _prompt(given: str) -> str:
    return f"Input: {given}\nOutput:"


_Mapping: TypeAlias = tuple[list[str], Callable[[str], str]]


def _labels(draw: random.Random) -> _Mapping:
    label = dict(zip(_CATEGORIES, invented_names(draw, "label"), strict=False))
    of = {word: label[category] for category, words in _CATEGORIES.items() for word in words}
    return draw.sample(list(of), len(of)), of.__getitem__


def _cipher(draw: random.Random) -> _Mapping:
    places = draw.randint(1, 5)
    table = str.maketrans(ascii_lowercase, ascii_lowercase[places:] + ascii_lowercase[:places])
    words = [word for words in _CATEGORIES.values() for word in words if len(word) <= 6]
    return draw.sample(words, len(words)), lambda word: word.translate(table)


def _format(draw: random.Random) -> _Mapping:
    order = draw.sample(range(3), 3)
    left, right = draw.choice(("[]", "<>", "()", "{}"))
    mark = draw.choice(("|", "/", "~", "#"))
    things = [word for words in _CATEGORIES.values() for word in words]
    names = invented_names(draw, "person")
    inputs = [f"{next(names)}, {draw.randint(10, 99)}, {draw.choice(things)}" for _ in range(400)]

    def apply(given: str) -> str:
        fields = given.split(", ")
        first, second, third = (fields[i] for i in order)
        return f"{left}{first}{right} {second} {mark} {third}"

    return inputs, apply


_KINDS: dict[str, Callable[[random.Random], _Mapping]] = {
    "labels": _labels,
    "cipher": _cipher,
    "format": _format,
}
