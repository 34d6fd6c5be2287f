"""Recipes: how a memory is made. InfiniteICL's steps, and its relatives as settings of one loop."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, get_args

from everlong.errors import ConfigurationError
from everlong.memory import open_ended, questions  # noqa: F401  (they register their generators)
from everlong.memory.compatible import RANKS
from everlong.memory.elicitation import GENERATORS
from everlong.memory.record import Kind
from everlong.registry import Registry, unknown_name

Carry = Literal["carried", "replay", "separate"]
Selection = Literal["gain", "random", "all"]
Targets = Literal["soft", "hard"]


@dataclass(frozen=True)
class Recipe:
    """The settings of one way to turn text into an adapter.

    Attributes
    ----------
    generators : tuple of str
        What makes pairs: names in :data:`~everlong.memory.elicitation.GENERATORS`.
    segment_tokens : int
        Tokens that are read, asked about and learned at a time.
    selection : {"gain", "random", "all"}
        Which pairs are learned: those that the text makes likelier; as many tokens of any; all.
    least_gain : float
        What the text must add to a pair's mean log-likelihood, in nats per token.
    budget : int or None
        Tokens of responses learned per segment at most; None: no limit.
    coverage : int
        Pairs that each sentence keeps if it has as many with a gain above zero, however small.
    targets : {"soft", "hard"}
        Whether the teacher's distribution is learned, or the response as it stands, which recalled more of
        invented facts (docs/memory.md).
    top_k : int
        Next tokens whose probability the teacher tells; the others are one event.
    hidden_weight : float
        Of the distance between last hidden states in the loss. With hard targets it concerns what holds the
        student to the base model, and not the lessons.
    carry : {"carried", "replay", "separate"}
        One adapter goes through all segments; or that, while earlier pairs are rehearsed; or each segment
        has its own, combined in the end.
    replay : float
        Tokens of earlier lessons rehearsed in each pass, as a share of the segment's own; others in the
        next ("replay").
    anchors : int
        Unrelated texts, drawn from the base model, on which the student is held to it in each pass; others
        in the next.
    ewc : float
        Weight of elastic weight consolidation: of what the adapter changes, judged by its weights, in texts
        that the base model writes by itself, in nats per token. Each adapter alone, if each segment has its
        own; a cartridge has no such weights.
    continuations : int
        Texts that the base model writes having read the segment, on which the student is held in each pass
        to what that then expects; others in the next.
    readings : int
        Pairs about the segment with their names and numbers exchanged, asked in each pass behind a passage
        that tells so; others in the next. They keep the student reading.
    kind : {"lora", "cartridge"}
        What is trained: an adapter of the linear layers, or the keys and values of a prefix.
    prefix : int
        Tokens of a cartridge, fewer where the first segment has fewer.
    rank : int
        Of a LoRA adapter: 8, 16, 32, 64 or 128.
    alpha : int
        LoRA's alpha.
    learning_rate : float
        The largest.
    passes : int
        Through the lessons of a segment, at most.
    batch_tokens : int
        Tokens of a step.
    held_out : float
        Share of pairs that only tell when to stop.
    patience : int or None
        Passes without improvement on them after which to stop.
    """

    generators: tuple[str, ...] = ("cloze", "questions")
    segment_tokens: int = 512
    selection: Selection = "gain"
    least_gain: float = 0.05
    budget: int | None = None
    coverage: int = 1
    targets: Targets = "hard"
    top_k: int = 64
    hidden_weight: float = 0.0
    carry: Carry = "replay"
    replay: float = 1.0
    anchors: int = 16
    ewc: float = 16.0
    continuations: int = 4
    readings: int = 12
    kind: Kind = "lora"
    prefix: int = 64
    rank: int = 16
    alpha: int = 16
    learning_rate: float = 1e-3
    passes: int = 5
    batch_tokens: int = 256
    held_out: float = 0.0
    patience: int | None = None

    def __post_init__(self) -> None:
        if not self.generators:
            raise ConfigurationError(f"a recipe needs at least one generator: {', '.join(GENERATORS)}")
        for name in self.generators:
            GENERATORS[name]
        if self.rank not in RANKS:
            raise ConfigurationError(
                f"rank={self.rank} would not load everywhere: use one of {', '.join(map(str, RANKS))}"
            )
        choices = {"selection": Selection, "carry": Carry, "targets": Targets, "kind": Kind}
        for name, known in choices.items():
            if getattr(self, name) not in get_args(known):
                raise ConfigurationError(
                    f"{name}={getattr(self, name)!r} is not known: use {' or '.join(get_args(known))}"
                )
        for name, least in (
            *(("segment_tokens", 32), ("top_k", 1), ("alpha", 1), ("passes", 1), ("batch_tokens", 16)),
            *(("coverage", 0), ("anchors", 0), ("continuations", 0), ("readings", 0), ("prefix", 2)),
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ConfigurationError(f"{name}={value!r} must be a whole number of at least {least}")
        for name in ("budget", "patience"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ConfigurationError(f"{name}={value!r} must be None or a whole number of at least 1")
        if self.kind == "cartridge" and self.carry == "separate":
            raise ConfigurationError(
                "cartridges are not combined, as carry='separate' would: use carry='replay' or 'carried'"
            )
        if not 0 < self.learning_rate < 1:
            raise ConfigurationError(f"learning_rate={self.learning_rate!r} must lie between 0 and 1")
        if not 0 <= self.held_out <= 0.5:
            raise ConfigurationError(f"held_out={self.held_out!r} must lie between 0 and 0.5")
        for name in ("replay", "hidden_weight", "ewc"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value < math.inf:
                raise ConfigurationError(f"{name}={value!r} must be a number, finite and not negative")
        if math.isnan(self.least_gain):
            raise ConfigurationError(f"least_gain={self.least_gain!r} must be a number")

    def values(self) -> dict[str, Any]:
        """Return the settings, as JSON takes them."""
        return asdict(self)

    @classmethod
    def restored(cls, values: dict[str, Any]) -> Recipe:
        """Return a recipe from its :meth:`values`, which an earlier version may have written.

        Raises
        ------
        TypeError
            These are not the settings of a recipe.
        """
        settings = {**_BEFORE_IT_WAS_SET, **values, "generators": tuple(values["generators"])}
        if settings.keys() != {item.name for item in fields(cls)}:
            raise TypeError("these are not the settings of a recipe")
        return cls(**settings)


_BEFORE_IT_WAS_SET: dict[str, Any] = {"readings": 0, "ewc": 0.0, "continuations": 0}
"""What settings that were added later would have been in earlier recipes."""


RECIPES: Registry[Recipe] = Registry("recipe")
"""All recipes, by name."""

for _name, _recipe in {
    "infinite-icl": Recipe(),
    "temp-lora": Recipe(
        generators=("text",),
        segment_tokens=1024,
        selection="all",
        targets="hard",
        carry="carried",
        anchors=0,
        ewc=0.0,
        continuations=0,
        readings=0,
        rank=64,
        alpha=64,
        learning_rate=5e-5,
        passes=2,
        batch_tokens=1024,
    ),
    "lift": Recipe(
        generators=("questions", "text"),
        selection="all",
        targets="hard",
        carry="carried",
        anchors=0,
        ewc=0.0,
        continuations=0,
        readings=0,
        rank=128,
        alpha=256,
        learning_rate=3e-4,
        passes=1,
    ),
    "cartridge": Recipe(kind="cartridge", learning_rate=2e-2, anchors=24, ewc=0.0),
    "context-distillation": Recipe(
        generators=("continuation",),
        selection="all",
        targets="soft",
        carry="carried",
        anchors=0,
        ewc=0.0,
        continuations=0,
        readings=0,
    ),
}.items():
    RECIPES.register(_name)(_recipe)


def make_recipe(recipe: Recipe | str | None = None, /, **changes: Any) -> Recipe:
    """Return a recipe by name, with changes.

    Raises
    ------
    UnknownNameError
        There is no such recipe or setting.
    ConfigurationError
        A value cannot work.
    """
    known = recipe if isinstance(recipe, Recipe) else RECIPES[recipe or "infinite-icl"]
    settings = list(known.values())
    for name in changes:
        if name not in settings:
            raise unknown_name("setting of a recipe", name, settings)
    return replace(known, **{name: _typed(name, value) for name, value in changes.items()})


def _typed(name: str, value: Any) -> Any:
    """Return a setting's value, from text if need be: ``"4"``, ``"none"``, ``"cloze,questions"``."""
    default = getattr(Recipe, name, None)
    if name == "generators":
        return tuple(part.strip() for part in value.split(",")) if isinstance(value, str) else tuple(value)
    if not isinstance(value, str) or isinstance(default, str):
        return value
    if value.lower() == "none":
        return None
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    raise ConfigurationError(f"{name}={value!r} must be a number")
