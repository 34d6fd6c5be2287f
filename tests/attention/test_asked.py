"""What a question attends to is what the stock model's own weights say."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from everlong.attention import attach
from everlong.attention.asked import AskedAttention, received
from tests import tiny
from tests.reference.outside import question_attention

LENGTH, BEGIN, STOP = 40, 30, 38


@pytest.mark.parametrize("family", tiny.FAMILIES)
@torch.no_grad()
def test_in_every_family_and_however_it_is_read(family):
    model = tiny.build(family)
    model.set_attn_implementation("eager")
    ids = tiny.random_ids(1, LENGTH)
    with attach(model, AskedAttention()) as handle:
        layer = max(handle.layers.full)
        notes = []
        for edges in ((0, LENGTH), (0, 7, BEGIN + 3, LENGTH), range(LENGTH + 1)):
            cache = handle.new_cache(AskedAttention(layer=layer, begin=BEGIN, stop=STOP))
            for begin, end in pairwise(edges):
                model(ids[:, begin:end], **tiny.cached(cache), use_cache=True)
            notes.append(received(cache)[0])
    expected = torch.tensor(question_attention(model, ids[0].tolist(), BEGIN, STOP, layer))
    for note in notes:
        assert note.shape == (BEGIN,)
        assert torch.allclose(note, expected, atol=1e-4)


@torch.no_grad()
def test_padding_receives_nothing():
    model = tiny.build("llama")
    model.set_attn_implementation("eager")
    ids, mask = tiny.left_padded([LENGTH, LENGTH - 9])
    with attach(model, AskedAttention(layer=1, begin=BEGIN, stop=STOP)) as handle:
        cache = handle.new_cache()
        model(ids, attention_mask=mask, **tiny.cached(cache), use_cache=True)
    for row, pad in enumerate((0, 9)):
        expected = question_attention(model, ids[row, pad:].tolist(), BEGIN - pad, STOP - pad, 1)
        assert torch.allclose(received(cache)[row, pad:], torch.tensor(expected), atol=1e-4)
        assert not received(cache)[row, :pad].any()


@torch.no_grad()
def test_a_long_question_is_looked_at_a_few_tokens_at_a_time():
    model = tiny.build("llama", max_position_embeddings=512)
    model.set_attn_implementation("eager")
    ids, begin = tiny.random_ids(1, 260), 40
    with attach(model, AskedAttention(layer=1, begin=begin, stop=250)) as handle:
        cache = handle.new_cache()
        model(ids, **tiny.cached(cache), use_cache=True)
    expected = torch.tensor(question_attention(model, ids[0].tolist(), begin, 250, 1))
    assert torch.allclose(received(cache)[0], expected, atol=1e-3)


@torch.no_grad()
def test_another_layer_or_another_question_would_be_noticed():
    model = tiny.build("llama")
    model.set_attn_implementation("eager")
    ids = tiny.random_ids(1, LENGTH)
    with attach(model, AskedAttention(layer=1, begin=BEGIN, stop=STOP)) as handle:
        cache = handle.new_cache()
        model(ids, **tiny.cached(cache), use_cache=True)
    for layer, stop in ((0, STOP), (1, STOP + 1)):
        other = torch.tensor(question_attention(model, ids[0].tolist(), BEGIN, stop, layer))
        assert not torch.allclose(received(cache)[0], other, atol=1e-2)


@torch.no_grad()
def test_the_logits_are_those_of_full_attention():
    model = tiny.build("qwen3")
    ids = tiny.random_ids(1, LENGTH)
    expected = model(ids).logits
    with attach(model, AskedAttention(layer=1, begin=BEGIN, stop=STOP)):
        assert torch.allclose(model(ids).logits, expected, atol=1e-4)
