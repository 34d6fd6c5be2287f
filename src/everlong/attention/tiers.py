"""Where keys and values go when they leave the window: nowhere, or a tier that can be recalled from."""

from __future__ import annotations

import torch
from torch import Tensor


class Growing:
    """A tensor of shape (batch, heads, length, d) that grows at its end; its buffer doubles."""

    def __init__(self) -> None:
        self._buffer: Tensor | None = None
        self.length = 0

    def append(self, new: Tensor) -> None:
        """Add `new`, shape (batch, heads, n, d)."""
        needed = self.length + new.shape[2]
        if self._buffer is None or self._buffer.shape[2] < needed:
            capacity = max(needed, 2 * self.length, 64)
            with torch.inference_mode(False):  # later forwards, in whatever mode, write into it
                grown = new.new_empty((*new.shape[:2], capacity, new.shape[3]))
            if self._buffer is not None:
                grown[:, :, : self.length] = self._buffer[:, :, : self.length]
            self._buffer = grown
        self._buffer[:, :, self.length : needed] = new.detach()
        self.length = needed

    def view(self) -> Tensor:
        """Return everything appended so far, shape (batch, heads, length, d), without a copy."""
        assert self._buffer is not None
        return self._buffer[:, :, : self.length]

    def pick_rows(self, rows: Tensor) -> None:
        """Keep the given rows of the batch, in that order (repeats allowed)."""
        if self._buffer is not None:
            self._buffer = self._buffer[rows.to(self._buffer.device)]

    def nbytes(self) -> int:
        """Bytes held, spare capacity included."""
        return 0 if self._buffer is None else self._buffer.nbytes


class RamTier:
    """Keeps the raw keys and the values of every token that left the window, in stream order."""

    def __init__(self) -> None:
        self.keys = Growing()
        self.values = Growing()

    def __len__(self) -> int:
        return self.keys.length

    def append(self, raw_keys: Tensor, values: Tensor) -> None:
        """Take over tokens that left the window, both of shape (batch, key-value heads, n, d)."""
        self.keys.append(raw_keys)
        self.values.append(values)

    def pick_rows(self, rows: Tensor) -> None:
        """Keep the given rows of the batch, in that order."""
        self.keys.pick_rows(rows)
        self.values.pick_rows(rows)

    def nbytes(self) -> int:
        """Bytes held."""
        return self.keys.nbytes() + self.values.nbytes()

    def state(self) -> dict[str, Tensor]:
        """Return what a saved session needs."""
        if not len(self):
            return {}
        return {"tier.keys": self.keys.view().contiguous(), "tier.values": self.values.view().contiguous()}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take over what :meth:`state` returned."""
        if "tier.keys" in tensors:
            self.append(tensors["tier.keys"], tensors["tier.values"])
