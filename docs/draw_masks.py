"""Draws docs/figures/masks.png: which query sees which key, and at which distance, under each policy.

Nothing here knows what a policy does. A model of one layer is built whose output shows its attention:
every token's value is a unit vector of its own, so the layer's output is the row of attention weights,
and the rotation turns so slowly that a weight gives away the distance it was computed with. The model is
attached with `everlong.attach`, as any model would be, and the weights that come out are drawn.

Run from the repository's root: ``python docs/draw_masks.py [folder]``.
"""

from __future__ import annotations

import math
import sys
from itertools import pairwise
from pathlib import Path

import matplotlib
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from everlong.attention import (
    H2O,
    DualChunk,
    FullAttention,
    InfiniPot,
    InfiniteHiP,
    InfLLM,
    LMInfinite,
    Policy,
    PyramidKV,
    Quest,
    ReAttention,
    Recall,
    SelfExtend,
    SirLLM,
    SnapKV,
    StreamingLLM,
    attach,
)

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.colors import BoundaryNorm, ListedColormap  # noqa: E402

TOKENS, WINDOW, SINKS = 40, 14, 3
READ = 26  # tokens after which reading ends, where a policy asks

PANELS: dict[str, Policy] = {
    "FullAttention()": FullAttention(),
    "LMInfinite(sinks=0)\na window without sinks": LMInfinite(window=WINDOW, sinks=0),
    f"LMInfinite(sinks={SINKS}, ceiling=None)\nsinks, but no ceiling": LMInfinite(
        window=WINDOW, sinks=SINKS, ceiling=None
    ),
    f"LMInfinite(sinks={SINKS})": LMInfinite(window=WINDOW, sinks=SINKS),
    f"LMInfinite(sinks={SINKS}, top_k=2)": LMInfinite(window=WINDOW, sinks=SINKS, top_k=2, top_k_layers=0),
    f"InfLLM(sinks={SINKS}, block=2, group=4)": InfLLM(
        window=WINDOW, sinks=SINKS, recalled=4, block=2, representatives=1, group=4
    ),
    f"Recall(sinks={SINKS}, block=2, group=4)": Recall(
        window=WINDOW, sinks=SINKS, recalled=4, block=2, group=4
    ),
    f"Quest(sinks={SINKS}, block=2, group=4)": Quest(
        window=WINDOW, sinks=SINKS, recalled=4, block=2, group=4
    ),
    f"InfiniteHiP(sinks={SINKS},\nblock=2, group=4)": InfiniteHiP(
        window=WINDOW, sinks=SINKS, recalled=4, coarse=8, medium=4, block=2, group=4
    ),
    f"ReAttention(sinks={SINKS},\nradius=1, group=4)": ReAttention(
        window=WINDOW, sinks=SINKS, recalled=6, votes=1, radius=1, group=4
    ),
    f"StreamingLLM(sinks={SINKS})": StreamingLLM(window=WINDOW, sinks=SINKS),
    "SelfExtend(neighbours=6, group_size=4)": SelfExtend(neighbours=6, group_size=4),
    f"DualChunk(chunk=10, positions={WINDOW})": DualChunk(chunk=10, positions=WINDOW),
    "SnapKV(budget=14)": SnapKV(budget=WINDOW, observed=4, pooled=3),
    "PyramidKV(budget=14)\nof its only layer": PyramidKV(budget=WINDOW, observed=4, pooled=1),
    "H2O(recent=7)": H2O(window=WINDOW, recent=7, group=1),
    f"SirLLM(sinks={SINKS}, recent=5)": SirLLM(window=WINDOW, sinks=SINKS, recent=5, group=1),
    f"InfiniPot(sinks={SINKS}, compressed=9)": InfiniPot(
        window=WINDOW, sinks=SINKS, compressed=9, recent=2, group=1
    ),
}
"""What is drawn: a panel's title and its policy."""

_SLOPE = 1 / 64  # radians a token: half a turn is 201 tokens, so that distances below that are told apart


def glass_model(tokens: int = TOKENS) -> tuple[LlamaForCausalLM, Tensor]:
    """Build a model of one layer and one head through which attention can be seen.

    Returns
    -------
    model : LlamaForCausalLM
        Its vocabulary is the numbers below `tokens`; the layer's output for the input 0, 1, 2, ... is the
        attention matrix.
    content : Tensor
        Shape (tokens, tokens): what the logits hold beside the distance, so that top_k has a choice.
    """
    size = 2 * tokens
    config = LlamaConfig(
        vocab_size=tokens,
        hidden_size=tokens,
        intermediate_size=4,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=size,
        max_position_embeddings=tokens,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config).double()
    layer = model.model.layers[0]
    generator = torch.Generator().manual_seed(4)
    asked, offered = torch.randn(2, tokens, tokens - 1, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.eye(tokens))
        unit = layer.input_layernorm(torch.eye(tokens, dtype=torch.float64)).diagonal()[:, None]
        # Dimensions 0 and `tokens` form the one pair that turns; all queries and keys point along it.
        queries = torch.zeros(tokens, size, dtype=torch.float64)
        keys, values = queries.clone(), queries.clone()
        queries[:, 0] = keys[:, 0] = math.sqrt(math.sqrt(size))
        queries[:, 1:tokens] = asked
        keys[:, 1:tokens] = offered
        values[:, :tokens] = torch.eye(tokens)
        for projection, table in (("q_proj", queries), ("k_proj", keys), ("v_proj", values)):
            getattr(layer.self_attn, projection).weight.copy_((table / unit).T)
        turning = torch.zeros(tokens)
        turning[0] = _SLOPE
        model.model.rotary_emb.inv_freq.copy_(turning)
    return model, (asked @ offered.T) / math.sqrt(size)


@torch.no_grad()
def seen_distances(policy: Policy, chunks: int = 1, tokens: int = TOKENS) -> Tensor:
    """Return the distance at which each query (row) sees each key (column); NaN: it does not see it.

    Parameters
    ----------
    policy : Policy
        What the model is attached to.
    chunks : int
        Tokens per forward.
    tokens : int
        Length of the input.
    """
    model, content = glass_model(tokens)
    rows: list[Tensor] = []
    with attach(model, policy) as handle:
        watch = model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(
            lambda _, inputs: rows.append(inputs[0][0, :, :tokens])
        )
        cache = handle.new_cache()
        surprisal = torch.rand(1, tokens, generator=torch.Generator().manual_seed(4))
        ends = [*range(chunks, tokens, chunks), tokens]
        if policy.needs_end_of_prefill:
            ends = sorted({*ends, READ})
        for begin, end in pairwise([0, *ends]):
            if begin == READ:
                cache.end_of_prefill()
            ids = torch.arange(begin, end)[None]
            handle.decoder(input_ids=ids, use_cache=True, **{handle.cache_argument: cache})
            cache.after_forward(ids, surprisal[:, begin:end])
        watch.remove()
    weights = torch.cat(rows)
    logits = weights.log() - content  # up to a number per row: the logit of a token that sees itself is 1
    logits = logits - logits.diagonal()[:, None] + 1
    distances = torch.arccos(logits.clamp(-1, 1)) / _SLOPE
    return torch.where(weights > 1e-12, distances.round(), torch.nan)


def draw(folder: Path) -> Path:
    """Draw all panels into `folder` and return the file's path."""
    trained = plt.get_cmap("viridis_r")(torch.linspace(0.05, 0.95, WINDOW).numpy())
    unseen = plt.get_cmap("Reds")(torch.linspace(0.45, 0.9, TOKENS - WINDOW).numpy())
    colours = ListedColormap([*trained, *unseen]).with_extremes(bad="white")
    norm = BoundaryNorm([at - 0.5 for at in range(TOKENS + 1)], TOKENS)
    rows = -(-len(PANELS) // 3)
    figure, grid = plt.subplots(rows, 3, figsize=(11, 11 * rows / 3), layout="constrained")
    for axes in grid.flat[len(PANELS) :]:
        axes.set_visible(False)
    for axes, (title, policy) in zip(grid.flat, PANELS.items(), strict=False):
        chunks = 1 if policy.needs_surprisal else TOKENS  # which is told after each
        image = axes.imshow(seen_distances(policy, chunks).numpy(), cmap=colours, norm=norm)
        axes.set_title(title, fontsize=10, family="monospace")
        axes.set_xlabel("key")
        axes.set_ylabel("query")
        axes.set_xticks(range(0, TOKENS, 10))
        axes.set_yticks(range(0, TOKENS, 10))
        axes.set_xticks([at - 0.5 for at in range(TOKENS)], minor=True)
        axes.set_yticks([at - 0.5 for at in range(TOKENS)], minor=True)
        axes.grid(which="minor", color="white", linewidth=0.4)
        axes.tick_params(which="both", length=0)
    ticks = [0, WINDOW // 2, WINDOW - 1, TOKENS - 1]
    bar = figure.colorbar(image, ax=grid, shrink=0.7, pad=0.02, ticks=ticks)
    bar.ax.tick_params(which="minor", length=0)
    bar.set_label(f"distance at which the key is seen (red: {WINDOW} and more, never seen in training)")
    path = folder / "masks.png"
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)
    return path


if __name__ == "__main__":
    print(draw(Path(sys.argv[1] if len(sys.argv) > 1 else "docs/figures")))
