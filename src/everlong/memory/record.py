"""What is written down about a memory beside its weights: ``memory.json``."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, get_args

from everlong.errors import ConfigurationError, MemoryStoreError
from everlong.models.files import SCRATCH_SUFFIX, write_atomically

FORMAT = 1
"""Version of the files of a memory."""
RECORD_FILE = "memory.json"
LONGEST_NAME = 100
AUTO = "auto"
"""Stands for memories that are chosen for each question, and so names none."""

Kind = Literal["lora", "cartridge"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_RESERVED = {"con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in range(1, 10))}


def check_name(name: str) -> str:
    """Return `name` if it can name a memory: a folder on every system, and nothing but that.

    Raises
    ------
    ConfigurationError
        If it cannot; the message says what a name is made of.
    """
    if (
        not isinstance(name, str)
        or not _NAME.fullmatch(name)
        or len(name) > LONGEST_NAME
        or name.endswith((".", SCRATCH_SUFFIX))
        or name.split(".")[0].lower() in _RESERVED
        or name.lower() == AUTO
    ):
        raise ConfigurationError(
            f"{name!r} cannot name a memory: take up to {LONGEST_NAME} letters (a to z), digits, '.', '_' "
            f"and '-', beginning with a letter or digit, not ending in '.' or {SCRATCH_SUFFIX!r}; none "
            f"that Windows keeps for itself, such as 'con', and not {AUTO!r}, which lets one be chosen"
        )
    return name


@dataclass(frozen=True)
class Source:
    """The text a memory was learned from.

    Attributes
    ----------
    sha256 : str
        Of its UTF-8 bytes, in hexadecimal.
    characters, tokens : int
        Its length.
    """

    sha256: str
    characters: int
    tokens: int

    def __post_init__(self) -> None:
        _require_types(self, "source")

    @classmethod
    def of(cls, text: str, tokens: int) -> Source:
        """Describe `text`, which the model reads as so many tokens."""
        return cls(hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest(), len(text), tokens)


@dataclass(frozen=True)
class Recipe:
    """How a memory was made: the registered name of a recipe, and the values it was run with."""

    name: str
    values: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _require_types(self, "recipe")


@dataclass(frozen=True)
class MemoryRecord:
    """What is known about a memory.

    Attributes
    ----------
    name : str
        The memory's name, and that of its folder.
    base_model : str
        What the base model was loaded as. vLLM compares it with the model it was started with.
    base_hash : str
        Fingerprint of the base model's weights (:func:`everlong.models.fingerprint.weights_hash`).
    source : Source
        What was learned.
    segments : int
        In how many pieces it was learned.
    recipe : Recipe
        How it was learned.
    rank : int or None
        Of a LoRA; None for a cartridge.
    kind : {"lora", "cartridge"}
        What the weights are.
    recall : dict of str to float, or None
        Shares of questions answered, by the name of what was measured; None: not measured.
    measured : dict or None
        What was measured while it was learned: ``worth``, what the text is worth by kind of pair
        (:meth:`everlong.memory.gate.Worth.values`), ``sentences``, and how many of them are ``uncovered``;
        None: nothing was.
    seconds : float
        Time that learning took.
    created : str
        Date and time in ISO 8601, UTC.
    format : int
        Version of the folder's files.
    """

    name: str
    base_model: str
    base_hash: str
    source: Source
    segments: int
    recipe: Recipe
    rank: int | None
    kind: Kind = "lora"
    recall: dict[str, float] | None = None
    measured: dict[str, Any] | None = None
    seconds: float = 0.0
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    format: int = FORMAT

    def __post_init__(self) -> None:
        check_name(self.name)
        _require_types(self, f"memory {self.name!r}")
        if not all(isinstance(share, (int, float)) for share in (self.recall or {}).values()):
            raise ConfigurationError(f"memory {self.name!r}: recall takes numbers, not {self.recall!r}")
        if self.kind not in get_args(Kind):
            raise ConfigurationError(
                f"memory {self.name!r}: kind is one of {', '.join(get_args(Kind))}, not {self.kind!r}"
            )
        if (self.rank is None) != (self.kind == "cartridge"):
            raise ConfigurationError(f"memory {self.name!r}: a {self.kind} cannot have rank {self.rank}")
        try:  # as they will be when they are read again
            plain = json.loads(json.dumps([self.recipe.values, self.recall, self.measured], allow_nan=False))
        except (TypeError, ValueError) as error:
            raise ConfigurationError(
                f"memory {self.name!r}: the recipe's values, the recall and what was measured must be JSON: "
                f"{error}"
            ) from error
        object.__setattr__(self, "recipe", replace(self.recipe, values=plain[0]))
        object.__setattr__(self, "recall", plain[1])
        object.__setattr__(self, "measured", plain[2])


_TYPES: dict[str, dict[str, type | tuple[type, ...]]] = {
    "Source": {"sha256": str, "characters": int, "tokens": int},
    "Recipe": {"name": str, "values": dict},
    "MemoryRecord": {
        **dict.fromkeys(("base_model", "base_hash", "created", "kind"), str),
        **dict.fromkeys(("segments", "format"), int),
        "rank": (int, type(None)),
        "seconds": (int, float),
        "source": Source,
        "recipe": Recipe,
        **dict.fromkeys(("recall", "measured"), (dict, type(None))),
    },
}


def _require_types(values: Source | Recipe | MemoryRecord, what: str) -> None:
    for name, kind in _TYPES[type(values).__name__].items():
        value = getattr(values, name)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ConfigurationError(f"{what}: {name} cannot be {value!r}")


def write_record(folder: Path, record: MemoryRecord) -> None:
    """Write ``memory.json`` into a folder, whole or not at all."""
    text = json.dumps(asdict(record), indent=2, ensure_ascii=False, allow_nan=False)
    write_atomically(folder / RECORD_FILE, text + "\n")


def read_record(folder: Path) -> MemoryRecord:
    """Read the ``memory.json`` of a folder; the memory's name is the folder's.

    Raises
    ------
    MemoryStoreError
        It is missing, not such a file, or from a later version.
    """
    path = folder / RECORD_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["format"] > FORMAT:
            raise MemoryStoreError(
                f"{path} has format {values['format']}, this Everlong reads {FORMAT}: upgrade it"
            )
        values.setdefault("measured", None)  # the first records have none
        _require_keys(values, MemoryRecord)
        _require_keys(values["source"], Source)
        _require_keys(values["recipe"], Recipe)
        nested = {"source": Source(**values["source"]), "recipe": Recipe(**values["recipe"])}
        return MemoryRecord(**{**values, **nested, "name": folder.name})
    except OSError as error:
        if isinstance(error, MemoryStoreError):
            raise
        raise MemoryStoreError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise MemoryStoreError(f"{path} does not describe a memory: {error}") from error


def _require_keys(values: Any, kind: type) -> None:
    wanted = {item.name for item in fields(kind)}
    if not isinstance(values, dict) or set(values) != wanted:
        raise ValueError(f"it takes exactly {', '.join(sorted(wanted))}")
