"""H2O: the heavy hitters, which attention went to most, and the latest tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from everlong.attention.choosing import StreamChoosingPolicy
from everlong.attention.kept_view import KeptView
from everlong.attention.parts import Part, Partial
from everlong.attention.policy import POLICIES
from everlong.attention.received import Weighing, weigh
from everlong.attention.view import LayerView, Queries


@POLICIES.register("h2o")
@dataclass(frozen=True)
class H2O(StreamChoosingPolicy):
    """H2O: Heavy-Hitter Oracle (Zhang et al., NeurIPS 2023, arXiv 2306.14048).

    What is kept: in each layer, row and key-value head, the latest `recent` tokens, and of those before them
    the ones that received most attention: the softmax weights of all queries so far, added up, in float32,
    over the query heads that share the key. What a query sees: what its head kept. At which positions: their
    true ones. What is forgotten: before each token is written, that which received least, for good; in
    prefill, before each group of queries, as many as it needs room for.

    True positions have a price: what is kept for long stands farther and farther away, in the end farther
    than anything the model was trained on. Within the training length H2O saves memory; it does not lengthen
    the context.

    Parameters
    ----------
    sinks : int
        First tokens kept whatever they receive; 0 in the paper, where they receive enough.
    window : int, optional
        W, all keys a query sees, itself included; the model's training length by default.
    recent : int, optional
        Latest tokens kept whatever they receive; by default half of the window, as in the paper.
    group : int, optional
        Queries that attend between two choices in prefill; while writing each alone. By default 64, or half
        of `recent` where that is less. Read in which pieces, it is the same if these end on groups.
    """

    sinks: int = 0
    window: int | None = None
    recent: int | None = None
    group: int | None = None

    def parts(self, queries: Queries, view: LayerView) -> list[Part | Partial]:
        """Attend to what was kept, and note what each token receives."""
        assert isinstance(view, KeptView)
        stage = self.staged(queries, view)
        visible = self.visible(view, stage)
        if visible is None:
            own = torch.arange(stage.stop - stage.first, device=stage.keys.device)[:, None]
            slot = torch.arange(stage.count, device=stage.keys.device)
            visible = (slot < stage.count - len(own) + 1 + own)[None, None]
            if len(own) == 1:  # one token may have taken the slot of another
                visible = torch.ones_like(visible)
        call = view.call
        how = Weighing(call.scaling, call.softcap, call.sink_logits)
        partial, received = weigh(queries.placed, stage.keys, stage.values, visible, how)
        assert partial is not None
        if view.is_own:
            view.add_score(stage, received.float())
        return [partial]

    def worth(self, slots: Tensor, can_go: Tensor, view: KeptView) -> Tensor:
        """Return the attention that tokens received."""
        return view.score.gather(2, slots)
