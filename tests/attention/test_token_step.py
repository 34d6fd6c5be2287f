"""A query and a key that lie one behind the other are rotated as one."""

import pytest
import torch

from everlong.attention import token_step
from everlong.attention.positions import Rotation
from everlong.attention.token_step import turned
from everlong.models.rotary import Frequencies

ROWS, HEADS, KV_HEADS, SIZE = 3, 4, 2, 8


def _heads(projected):
    """Split one product's output as a layer does that multiplies with several weights at once."""
    sizes = [HEADS * SIZE, KV_HEADS * SIZE, KV_HEADS * SIZE]
    return [part.view(len(part), -1, 1, SIZE) for part in projected.split(sizes, -1)]


@pytest.mark.parametrize("layout", ["halves", "interleaved"])
@pytest.mark.parametrize("scaling", [1.0, 1.3])
@pytest.mark.parametrize("rotated", [SIZE, SIZE // 2, 0])
@pytest.mark.parametrize("rows", [1, ROWS])
def test_as_one_or_apart_gives_the_same(rows, rotated, scaling, layout, monkeypatch):
    frequencies = Frequencies(0.5 ** torch.arange(rotated // 2).double(), scaling) if rotated else None
    rotation = Rotation(frequencies, layout)
    query, key, value = _heads(torch.randn(rows, (HEADS + 2 * KV_HEADS) * SIZE))
    angles = rotation.angles(7, query)
    calls = []
    monkeypatch.setattr(Rotation, "turned", _noting(Rotation.turned, calls))
    together = turned(query, key, rotation, angles)
    assert len(calls) == 1
    apart = turned(query.clone(), key.clone(), rotation, angles)
    assert len(calls) == 3
    for ours, theirs in zip(together, apart, strict=True):
        assert torch.equal(ours, theirs)


def _noting(function, calls):
    def noted(*arguments):
        calls.append(arguments)
        return function(*arguments)

    return noted


@pytest.mark.parametrize(
    "second",
    [
        lambda query, key, value: value,
        lambda query, key, value: key.clone(),
        lambda query, key, value: key[..., :4],
        lambda query, key, value: query,
        lambda query, key, value: key.transpose(1, 3),
    ],
    ids=["not the next", "elsewhere", "narrower", "the same", "another way round"],
)
def test_what_does_not_lie_one_behind_the_other_is_not_taken_as_one(second):
    parts = _heads(torch.randn(ROWS, (HEADS + 2 * KV_HEADS) * SIZE))
    assert token_step._as_one(parts[0], second(*parts)) is None
