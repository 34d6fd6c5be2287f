"""The transfer set on disk."""

import pytest

from everlong.errors import InputError
from everlong.memory.pairs import Pair, read_pairs, write_pairs

PAIRS = [
    Pair("Who keeps the bees?", " Orla — née Finch", "questions", 2, (0, 3), 1.25),
    Pair("", "a\nb\u2028c", "continuation"),
]


def test_pairs_come_back_as_they_were(tmp_path):
    write_pairs(tmp_path / "pairs.jsonl", PAIRS)
    assert list(read_pairs(tmp_path / "pairs.jsonl")) == PAIRS


@pytest.mark.parametrize("line", ["{", "[]", '{"query": "a"}', '{"query": "a", "extra": 1}', "3"])
def test_a_line_that_is_no_pair_is_named(line, tmp_path):
    path = tmp_path / "pairs.jsonl"
    write_pairs(path, PAIRS[:1])
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(InputError, match="line 2: not a pair"):
        list(read_pairs(path))
