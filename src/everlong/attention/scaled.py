"""Scaled positions: full attention whose rotary table is stretched beyond the training length.

transformers knows these scalings as a model's configuration. Here they are policies: the table is the one
that transformers makes, and the model's own configuration stays as it is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from everlong.attention.layer_memory import LayerMemory
from everlong.attention.policy import POLICIES, require_count
from everlong.attention.window import WindowPolicy
from everlong.errors import ConfigurationError
from everlong.models.rotary import Rotary


@dataclass(frozen=True)
class ScaledPositions(WindowPolicy):
    """All tokens are kept and seen, at scaled positions. Subclasses name the scaling, and have a `factor`.

    A model whose configuration scales its positions already is refused. Layers with a local window of the
    model's own keep their own table.
    """

    forgets: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _require_factor(self, "factor", at_least=1)

    def shape(self) -> tuple[int, int | None]:
        """No sinks, everything local."""
        return 0, None


@POLICIES.register("linear")
@dataclass(frozen=True)
class LinearScaling(ScaledPositions):
    """Position interpolation (Chen et al. 2023, arXiv 2306.15595): transformers' ``rope_type="linear"``.

    What is kept: every key. What a query sees: every key before it. At which positions: its distance divided
    by `factor`. What is forgotten: nothing.

    Parameters
    ----------
    factor : float
        Positions are divided by it, from the first token on. The authors train for it; without that it costs
        quality at every length.
    """

    factor: float = 4.0

    def rotary(self, rotary: Rotary) -> Rotary:
        """Return the table whose frequencies are divided."""
        return rotary.scaled("linear", {"factor": self.factor})


@POLICIES.register("ntk")
@dataclass(frozen=True)
class NTKScaling(ScaledPositions):
    """Dynamic NTK scaling (bloc97 and emozilla 2023): transformers' ``rope_type="dynamic"``.

    What is kept: every key, unrotated too where the table changes. What a query sees: every key before it.
    At which positions: its true distance, the frequencies made lower as the input outgrows the training
    length L: the base is multiplied by ``(factor * n / L - (factor - 1)) ** (d / (d - 2))`` for n tokens and
    d rotated dimensions. What is forgotten: nothing.

    The table is that of the tokens read so far, and all keys follow it. So a text that is read in pieces is
    not quite the same as one read at once, where the first tokens know already how long it is.

    Parameters
    ----------
    factor : float
        How much faster the base grows than the input.
    length : int, optional
        The n to make one table for, however many tokens are read; with it pieces make no difference, and no
        key is ever rotated anew. None: the tokens read so far.
    """

    factor: float = 1.0
    length: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require_count("NTKScaling", "length", self.length, least=1, optional=True)

    def memory(self, layer: int, start: int) -> LayerMemory:
        """Return an empty memory, which keeps raw keys where they are rotated again and again."""
        return LayerMemory(0, None, keep_raw=self.length is None, start=start)

    def rotary(self, rotary: Rotary) -> Rotary:
        """Return the table of a larger base."""
        return rotary.scaled("dynamic", {"factor": self.factor}, self.length)


@POLICIES.register("yarn")
@dataclass(frozen=True)
class YaRN(ScaledPositions):
    """YaRN: Efficient Context Window Extension (Peng et al., ICLR 2024, arXiv 2309.00071), as transformers'.

    What is kept: every key. What a query sees: every key before it. At which positions: dimensions that turn
    often within the training length as they are, those that hardly turn with their positions divided by
    `factor`, and logits sharpened by ``(0.1 ln factor + 1) ** 2``. What is forgotten: nothing.

    Parameters
    ----------
    factor : float
        How many training lengths there is room for.
    beta_fast, beta_slow : float
        Turns within the training length above which a dimension stays, and below which it is divided.
    """

    factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("beta_fast", "beta_slow"):
            _require_factor(self, name, at_least=0)
        if self.beta_slow <= 0 or self.beta_fast <= self.beta_slow:
            raise ConfigurationError(
                f"YaRN: beta_fast={self.beta_fast} must be above beta_slow={self.beta_slow}, and that above 0"
            )

    def rotary(self, rotary: Rotary) -> Rotary:
        """Return the table that is divided in part."""
        betas = {"beta_fast": self.beta_fast, "beta_slow": self.beta_slow}
        return rotary.scaled("yarn", {"factor": self.factor, **betas})


def _require_factor(policy: ScaledPositions, name: str, *, at_least: int) -> None:
    value = getattr(policy, name)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or value < at_least:
        raise ConfigurationError(
            f"{type(policy).__name__}: {name} must be a number of at least {at_least}, not {value!r}"
        )
