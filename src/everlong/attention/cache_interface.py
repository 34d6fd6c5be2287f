"""What transformers asks of a cache, answered for caches whose keys an attention policy puts away."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache

from everlong.errors import StateError, UnsupportedUseError

HALF_DONE = (
    "an earlier forward on this cache ended in an error, some layers ahead of others: "
    "start a new stream, or go on from a copy made before (fork, or a saved state)"
)


class PolicyCache(Cache):
    """The base of an attached model's caches: it hands keys and values on to the attention function.

    Attributes
    ----------
    owner : str
        The attachment it belongs to.
    folded : int
        How many of its tokens stand beside others, at the same positions: by so much less than it has seen
        stands the next token.
    """

    folded: int = 0

    def __init__(self, owner: str) -> None:
        super().__init__(layers=[])
        self.owner = owner
        self._in_forward = False

    def abandon(self) -> None:
        """Leave a forward, however it ended."""
        self._in_forward = False

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Hand keys and values on: the attention function puts them away, together with their queries."""
        if not self._in_forward:
            raise StateError(
                "this cache belongs to a model attached by Everlong, "
                "which has been detached, or is another one"
            )
        return key_states, value_states

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """No limit."""
        return -1

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Length and offset of a mask over everything seen."""
        return self.get_seq_length() + query_length, 0

    @property
    def is_linear(self) -> list[bool]:
        """Per layer: none holds a state of linear attention."""
        return [False] * len(self)

    @property
    def is_sliding(self) -> list[bool]:
        """Per layer: none is a sliding window of transformers' own."""
        return [False] * len(self)

    @property
    def is_dummy(self) -> list[bool]:
        """Per layer: all hold keys."""
        return [False] * len(self)

    @property
    def is_croppable(self) -> bool:
        """A ring cannot be cropped: use :meth:`StreamCache.provisional`."""
        return False

    def crop(self, *args: Any, **kwargs: Any) -> None:
        """Refuse: what left the ring cannot come back."""
        raise UnsupportedUseError(
            "a stream's cache cannot be cropped (assisted decoding needs that): "
            "use cache.provisional() and rollback()"
        )
