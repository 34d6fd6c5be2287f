"""The divergence that a student is trained on, one token and one word of the vocabulary at a time.

Slow and obvious on purpose: the fast implementation is held against this one, which shares no code with it.
"""

from __future__ import annotations

import torch
from torch import Tensor


def reference_divergence(teacher: list[dict[int, float]], logits: Tensor) -> Tensor:
    """Kullback-Leibler divergence from teacher to student, all words that the teacher does not tell as one.

    Parameters
    ----------
    teacher
        For each of n tokens, the probability of each word it tells.
    logits
        The student's, of shape (n, vocabulary).

    Returns
    -------
    Tensor
        Shape (n,), in nats, in float64; autograd goes through it.
    """
    found = []
    for told, row in zip(teacher, logits.double(), strict=True):
        student = row.exp() / row.exp().sum()
        loss, rest, others = row.new_zeros(()), 1.0, row.new_zeros(())
        for word in range(len(row)):
            if word in told:
                p = torch.tensor(told[word], dtype=torch.float64)
                loss = loss + p * (p / student[word]).log()
                rest -= told[word]
            else:
                others = others + student[word]
        if rest > 1e-6:
            loss = loss + rest * (torch.tensor(rest, dtype=torch.float64) / others).log()
        found.append(loss)
    return torch.stack(found)
