"""Tokens that continue a stream in several ways at once: a tree, run in one forward and judged afterwards."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from everlong.errors import ConfigurationError


class Branches:
    """Which token of a forward follows which.

    Parameters
    ----------
    parents : sequence of int
        Of each token, the number of the one it follows; -1: it follows the stream. Parents come first.

    Attributes
    ----------
    parents : list of int
        As given.
    depths : Tensor
        Tokens of its branch before each one, shape (n,).
    sees : Tensor
        Boolean, shape (n, n): token i sees token j, itself or one of those before it on its branch.
    height : int
        Tokens of the longest branch.
    """

    def __init__(self, parents: Sequence[int]) -> None:
        if not parents or any(not -1 <= parent < number for number, parent in enumerate(parents)):
            raise ConfigurationError(f"a token follows the stream (-1) or an earlier token: {list(parents)}")
        self.parents = list(parents)
        depths: list[int] = []
        self.sees = torch.eye(len(parents), dtype=torch.bool)
        for number, parent in enumerate(parents):
            depths.append(depths[parent] + 1 if parent >= 0 else 0)
            if parent >= 0:
                self.sees[number] |= self.sees[parent]
        self.depths = torch.tensor(depths)
        self.height = max(depths) + 1

    def __len__(self) -> int:
        return len(self.depths)
