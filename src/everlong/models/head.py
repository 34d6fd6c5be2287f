"""A model's head by itself: logits only where they are wanted, surprisal over blocks of the vocabulary."""

from __future__ import annotations

from copy import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from everlong.errors import UnsupportedModelError
from everlong.models.anatomy import decoder_of

_BLOCK = 2**22  # logits computed at a time
_PROBE = (3, 1, 4, 1, 5)


class Head:
    """A model's head as a function of hidden states.

    Parameters
    ----------
    model : nn.Module
        A causal language model, attached or not.

    Raises
    ------
    UnsupportedModelError
        The head does more than a linear map, a factor and a soft-cap.
    """

    def __init__(self, model: nn.Module) -> None:
        inner: Any = model
        if hasattr(inner, "get_base_model") and hasattr(inner, "peft_config"):
            inner = inner.get_base_model()
        linear = inner.get_output_embeddings()
        config = inner.config.get_text_config()
        self.weight: Tensor = linear.weight
        self.bias: Tensor | None = getattr(linear, "bias", None)
        self.factor = float(getattr(config, "logit_scale", None) or 1.0)
        self.factor /= float(getattr(config, "logits_scaling", None) or 1.0)
        self.softcap: float | None = getattr(config, "final_logit_softcapping", None)
        self._check(model)

    def of_first(self, words: int) -> Head:
        """Return the head of the first words of the vocabulary alone, which knows of no others."""
        head = copy(self)
        head.weight = self.weight[:words]
        head.bias = None if self.bias is None else self.bias[:words]
        return head

    @torch.inference_mode()
    def surprisal(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Return the surprisal of each target in nats.

        Parameters
        ----------
        hidden : Tensor
            The decoder's output, shape (n, d).
        targets : Tensor
            The token that follows each, shape (n,).

        Returns
        -------
        Tensor
            float32, shape (n,).
        """
        size = max(1, _BLOCK // max(1, len(hidden)))
        total = hidden.new_full((len(hidden),), -torch.inf, dtype=torch.float32)
        chosen = torch.zeros_like(total)
        for begin in range(0, len(self.weight), size):
            logits = self.block(hidden, begin, begin + size)
            total = torch.logaddexp(total, logits.logsumexp(-1))
            inside = (targets >= begin) & (targets < begin + size)
            at = (targets - begin).clamp(0, logits.shape[1] - 1)
            chosen = torch.where(inside, logits.gather(1, at[:, None])[:, 0], chosen)
        return total - chosen

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits after each hidden state, float32, shape (n, vocabulary)."""
        return self.block(hidden, 0, len(self.weight))

    def block(self, hidden: Tensor, begin: int, stop: int) -> Tensor:
        """Return the logits of a block of the vocabulary, float32, shape (n, stop - begin)."""
        bias = None if self.bias is None else self.bias[begin:stop]
        return self._scaled(F.linear(hidden, self.weight[begin:stop], bias))

    def _scaled(self, logits: Tensor) -> Tensor:
        logits = logits.float() if self.factor == 1 else logits.float() * self.factor
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap

    def at(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """Return the logits of `tokens`, shape (n, k), after each hidden state: float32, same shape."""
        logits = torch.einsum("nd,nkd->nk", hidden, self.weight[tokens])
        if self.bias is not None:
            logits = logits + self.bias[tokens]
        return self._scaled(logits)

    def slope(self, logits: Tensor) -> Tensor | None:
        """Return what of a change before the soft-cap is left in `logits`, same shape; None: all of it."""
        return None if self.softcap is None else 1 - (logits / self.softcap).square()

    @torch.inference_mode()
    def _check(self, model: Any) -> None:
        """Compare with the model's own logits on a few tokens."""
        ids = torch.tensor([_PROBE], device=self.weight.device) % len(self.weight)
        theirs = model(input_ids=ids, use_cache=False).logits[0].float()
        hidden = decoder_of(model)(input_ids=ids, use_cache=False).last_hidden_state[0]
        ours = self.logits(hidden)
        tolerance = 1e-3 if self.weight.dtype == torch.float32 else 3e-2
        if ours.shape != theirs.shape or (ours - theirs).abs().max() > tolerance * theirs.abs().max():
            raise UnsupportedModelError(
                f"{type(model).__name__}: its head does more than a linear map, a factor and a soft-cap, "
                "so it cannot be computed by itself; please open an issue with the model's name"
            )
