"""What can be told of an invented person, in which words, and how it is asked for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Relation:
    """What can be true of a person.

    Attributes
    ----------
    name : str
        Of the relation.
    said : tuple of str
        Ways to say it after the person's name; "{}" stands for the value.
    asked : str
        A question for the value; "{}" stands for the person.
    reversed : str
        A question for the person; "{}" stands for the value.
    values : tuple of str
        What it can be; empty: values are invented.
    """

    name: str
    said: tuple[str, ...]
    asked: str
    reversed: str
    values: tuple[str, ...] = ()


_MONTHS = (
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
)
# In an order that looks like none: the last ones of every list are for examples.
_DATES = tuple(f"{at % 28 + 1} {_MONTHS[at // 28]}" for at in (101 * i % 336 for i in range(336)))
_CODES = tuple(str(1000 + 7919 * i % 9000) for i in range(9000))

# Values that a model would guess without reading (teacher, dog, piano, blue) are left out.
RELATIONS = (
    Relation(
        "profession",
        ("works as a {}", "is a {}"),
        "What is {}'s job?",
        "Who earns a living as a {}?",
        (
            *("potter", "cooper", "tanner", "weaver", "miller", "saddler", "glazier", "mason"),
            *("roofer", "fisher", "hatter", "tinker", "dyer", "barber", "locksmith", "chandler"),
            *("thatcher", "printer", "gardener", "beekeeper"),
        ),
    ),
    Relation(
        "home",
        ("lives in {}", "has a house in {}"),
        "Where is {}'s home?",
        "Whose home is in {}?",
    ),
    Relation(
        "pet",
        ("keeps a {}", "owns a {}"),
        "What is {}'s pet?",
        "Whose pet is a {}?",
        (
            *("goat", "parrot", "ferret", "tortoise", "hamster", "falcon", "donkey", "llama"),
            *("rabbit", "peacock", "lizard", "raven", "monkey", "turkey", "hedgehog", "camel"),
            *("pigeon", "badger", "gecko", "swan"),
        ),
    ),
    Relation(
        "instrument",
        ("plays the {}", "practises the {}"),
        "What is {}'s instrument?",
        "Whose instrument is the {}?",
        (
            *("harp", "flute", "trumpet", "cello", "banjo", "lute", "tuba", "fiddle", "bassoon"),
            *("zither", "drum", "clarinet", "mandolin", "lyre", "trombone", "cornet"),
        ),
    ),
    Relation(
        "food",
        ("likes to eat {}", "loves {}"),
        "What is {}'s favourite food?",
        "Whose favourite food is {}?",
        (
            *("plums", "lentils", "figs", "cheese", "radishes", "walnuts", "mussels", "pancakes"),
            *("leeks", "cherries", "noodles", "turnips", "peaches", "olives", "beans"),
            "sausages",
        ),
    ),
    Relation(
        "colour",
        ("paints everything {}", "dresses in {}"),
        "What is {}'s favourite colour?",
        "Whose favourite colour is {}?",
        (
            *("green", "purple", "yellow", "grey", "pink", "brown", "turquoise"),
            *("white", "silver", "golden", "violet", "beige", "maroon"),
        ),
    ),
    Relation(
        "birthday",
        ("was born on {}", "came into the world on {}"),
        "When is {}'s birthday?",
        "Whose birthday is {}?",
        _DATES,
    ),
    Relation(
        "code",
        ("uses the code {}", "types the code {}"),
        "What is {}'s number?",
        "Whose number is {}?",
        _CODES,
    ),
)
"""What documents tell. A question never has the words of the sentence, its person or value aside."""
