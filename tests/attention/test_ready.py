"""Recalled spans that stay are copied together where they lie together."""

from everlong.attention.ready import _joined


def test_spans_held_one_behind_the_other_are_one_piece_in_the_order_that_is_wanted():
    places = {(0, 4): 0, (4, 8): 4, (20, 24): 8, (40, 44): 12}
    assert _joined([(0, 4), (4, 8), (20, 24), (40, 44)], places) == [slice(0, 16)]
    assert _joined([(0, 4), (8, 12), (20, 24), (40, 44)], places) == [slice(0, 4), (8, 12), slice(8, 16)]
    assert _joined([(4, 8), (0, 4), (40, 44)], places) == [slice(4, 8), slice(0, 4), slice(12, 16)]
    assert _joined([(1, 3)], places) == [(1, 3)] and _joined([], places) == []
