"""The loss between two next-token distributions, and its gradient, over blocks of the vocabulary.

A vocabulary of 262,144 words makes logits what costs memory and time. Neither the teacher's nor the
student's are ever held whole: a block of them is computed, used while it lies in the processor's cache, and
dropped. The student's softmax is accumulated over blocks, as flash attention does over keys, and so is what
its gradient needs of the head's weights: of those words whose logit the loss would move, in any row, by more
than single precision tells from 1. Most of a vocabulary is below that (Wijmans et al. 2024, arXiv 2411.09009,
filter at bfloat16's precision).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from everlong.models.head import Head

_BLOCK = 2**21  # logits computed at a time
_LEAST = torch.finfo(torch.float32).eps  # by a logit, of the loss's gradient; and what is left of a chance


@torch.no_grad()
def likeliest(head: Head, hidden: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the likeliest next tokens after each hidden state.

    Parameters
    ----------
    head : Head
        The model's.
    hidden : Tensor (n, d)
        The decoder's output.
    k : int
        How many.

    Returns
    -------
    Tensor (n, k), Tensor (n, k), Tensor (n,)
        Tokens, their log-probabilities in nats, and the logits' log-sum-exp.
    """
    best = hidden.new_empty((len(hidden), 0), dtype=torch.float32)
    tokens = torch.empty((len(hidden), 0), dtype=torch.long, device=hidden.device)
    total = hidden.new_full((len(hidden),), -torch.inf, dtype=torch.float32)
    for begin, logits in _blocks(head, hidden):
        total = torch.logaddexp(total, logits.logsumexp(-1))
        values, at = logits.topk(min(k, logits.shape[1]))
        best, tokens = torch.cat([best, values], 1), torch.cat([tokens, at + begin], 1)
        best, order = best.topk(min(k, best.shape[1]))
        tokens = tokens.gather(1, order)
    return tokens, best - total[:, None], total


@torch.no_grad()
def divergence(
    head: Head, hidden: Tensor, tokens: Tensor, log_probs: Tensor, *, gradient: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Kullback-Leibler divergence from the teacher's next-token distribution to the student's.

    The teacher's is known by its likeliest tokens; all others are one event, on both sides:
    Σ p log p/q over those known, and (1-Σp) log (1-Σp)/(1-Σq).

    Parameters
    ----------
    head : Head
        The student's; it is not trained.
    hidden : Tensor (n, d)
        The student's last hidden states.
    tokens : Tensor (n, k)
        The teacher's likeliest tokens, each once in a row.
    log_probs : Tensor (n, k)
        Their log-probabilities; minus infinity: none.
    gradient : bool
        Whether the gradient is wanted.

    Returns
    -------
    Tensor (n,), Tensor (n, d) or None
        The divergence in nats, at least 0; its gradient in `hidden`.
    """
    probs = log_probs.exp()
    is_known = log_probs > -torch.inf
    rest = (1 - probs.sum(-1)).clamp(min=0)
    rows = len(hidden)
    total = hidden.new_full((rows,), -torch.inf, dtype=torch.float32)  # log Σ exp(logit), of tokens so far
    others = torch.zeros_like(total)  # probability among these of those the teacher does not tell
    known = torch.zeros_like(log_probs)  # the student's logits of those it does
    pull = torch.zeros_like(hidden, dtype=torch.float32) if gradient else None  # Σ of those ∂logit/∂hidden
    for begin, logits in _blocks(head, hidden):
        inside = (tokens >= begin) & (tokens < begin + logits.shape[1])
        at = (tokens - begin).clamp(0, logits.shape[1] - 1)
        known = torch.where(inside, logits.gather(1, at), known)
        before, total = total, torch.logaddexp(total, logits.logsumexp(-1))
        shrunk = (before - total).exp()
        slope = head.slope(logits)
        chances = logits.sub_(total[:, None]).exp_()
        nought = torch.where(inside & is_known, 0.0, torch.inf)
        chances.scatter_reduce_(1, at, nought, "amin")  # what the teacher tells is counted apart
        others = others * shrunk + chances.sum(-1)
        if pull is not None:
            if slope is not None:
                chances *= slope
            most = (chances * (rest / others.clamp(min=_LEAST)).clamp(min=1)[:, None]).amax(0)
            counting = (most > _LEAST).nonzero()[:, 0]
            weight = head.weight[begin : begin + len(most)]
            if 2 * len(counting) < len(most):
                chances, weight = chances.index_select(1, counting), weight.index_select(0, counting)
            pull *= shrunk[:, None]
            pull += chances.to(weight.dtype) @ weight
    slopes = head.slope(known)
    share = known - total[:, None]  # the student's log-probabilities
    others = others.clamp(min=_LEAST)  # what is left of its probability
    parts = torch.where(is_known, probs * (log_probs.masked_fill(~is_known, 0.0) - share), 0.0)
    loss = parts.sum(-1) + torch.special.xlogy(rest, rest) - rest * others.log()
    if pull is None:
        return loss, None
    # By a logit: q - p where p is known, q (1 - rest/others) elsewhere.
    common = 1 - rest / others
    own = torch.where(is_known, share.exp() - probs, 0.0)
    if slopes is not None:
        own = own * slopes
    found = pull * common[:, None] * head.factor
    found += torch.einsum("nk,nkd->nd", own, head.weight[tokens].float()) * head.factor
    return loss, found.to(hidden.dtype)


def _blocks(head: Head, hidden: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield where each block of the vocabulary begins, and its logits, float32."""
    size = max(256, _BLOCK // max(1, len(hidden)))
    for begin in range(0, len(head.weight), size):
        yield begin, head.block(hidden, begin, begin + size)
