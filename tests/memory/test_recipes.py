"""Recipes: what cannot work is refused where it is written, with what to write instead."""

from __future__ import annotations

import json
from typing import Any

import pytest

from everlong.errors import ConfigurationError, UnknownNameError
from everlong.memory.elicitation import GENERATORS
from everlong.memory.recipes import RECIPES, Recipe, make_recipe


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"generators": ()}, "at least one generator.*cloze.*questions"),
        ({"generators": ("cloze", "question")}, "unknown generator of pairs 'question'.*'questions'"),
        ({"segment_tokens": 31}, "segment_tokens=31 .*at least 32"),
        ({"segment_tokens": 64.0}, "segment_tokens=64.0 .*whole number"),
        ({"selection": "best"}, "selection='best'.*gain or random or all"),
        ({"targets": "warm"}, "targets='warm'.*soft or hard"),
        ({"carry": "merged"}, "carry='merged'.*carried or replay or separate"),
        ({"kind": "prefix"}, "kind='prefix'.*lora or cartridge"),
        ({"prefix": 1}, "prefix=1 .*at least 2"),
        ({"kind": "cartridge", "carry": "separate"}, "cartridges are not combined"),
        ({"top_k": 0}, "top_k=0 .*at least 1"),
        ({"top_k": True}, "top_k=True .*whole number"),
        ({"alpha": 0}, "alpha=0"),
        ({"rank": 12}, "rank=12 .*8, 16, 32, 64, 128"),
        ({"passes": 0}, "passes=0"),
        ({"batch_tokens": 15}, "batch_tokens=15 .*at least 16"),
        ({"coverage": -1}, "coverage=-1"),
        ({"anchors": -1}, "anchors=-1"),
        ({"readings": 1.5}, "readings=1.5"),
        ({"continuations": -1}, "continuations=-1"),
        ({"ewc": -1.0}, "ewc=-1.0.*not negative"),
        ({"ewc": float("inf")}, "ewc=inf"),
        ({"budget": 0}, "budget=0 .*None or .*at least 1"),
        ({"patience": 1.5}, "patience=1.5 .*None or"),
        ({"learning_rate": 0.0}, "learning_rate=0.0 .*between 0 and 1"),
        ({"learning_rate": float("nan")}, "learning_rate=nan"),
        ({"held_out": 0.6}, "held_out=0.6 .*between 0 and 0.5"),
        ({"held_out": -0.1}, "held_out=-0.1"),
        ({"replay": -1.0}, "replay=-1.0.*not negative"),
        ({"hidden_weight": -0.5}, "hidden_weight=-0.5.*not negative"),
        ({"replay": float("nan")}, "replay=nan"),
        ({"hidden_weight": float("inf")}, "hidden_weight=inf"),
        ({"least_gain": float("nan")}, "least_gain=nan"),
    ],
)
def test_what_cannot_work_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Recipe(**settings)
    with pytest.raises(ConfigurationError, match=message):
        make_recipe("lift", **settings)


def test_a_recipe_of_an_earlier_version_is_what_it_was() -> None:
    values = json.loads(json.dumps(Recipe(rank=32).values()))
    assert Recipe.restored(values) == Recipe(rank=32)
    del values["ewc"], values["readings"], values["continuations"]
    assert Recipe.restored(values) == Recipe(rank=32, ewc=0.0, readings=0, continuations=0)
    for wrong in ({"passes": 3}, {**values, "temperature": 1}):
        with pytest.raises((TypeError, KeyError)):
            Recipe.restored(wrong)


@pytest.mark.parametrize("name", list(RECIPES))
def test_recipes_go_by_name_and_through_json(name: str) -> None:
    recipe = make_recipe(name)
    assert recipe == RECIPES[name]
    values = json.loads(json.dumps(recipe.values()))
    assert Recipe(**{**values, "generators": tuple(values["generators"])}) == recipe
    assert all(generator in GENERATORS for generator in recipe.generators)


def test_the_first_one_is_infinite_icl() -> None:
    assert make_recipe() == Recipe() == RECIPES["infinite-icl"]


def test_a_recipe_may_be_changed() -> None:
    changed = make_recipe(Recipe(rank=8), passes=3)
    assert (changed.rank, changed.passes) == (8, 3)
    assert RECIPES["infinite-icl"].passes != 3


def test_what_is_not_known_is_answered_with_what_is_near() -> None:
    with pytest.raises(UnknownNameError, match="unknown recipe 'temp-laro'; did you mean 'temp-lora'"):
        make_recipe("temp-laro")
    with pytest.raises(UnknownNameError, match="unknown setting of a recipe 'pases'; did you mean 'passes'"):
        make_recipe(pases=3)
