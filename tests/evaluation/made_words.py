"""Words for tasks where the package that has English ones may be missing."""

from __future__ import annotations

import itertools

import pytest

from everlong.evaluation import words

_SYLLABLES = ("ba", "de", "fi", "go", "lu", "ma", "ne", "pi", "ro", "su")


@pytest.fixture
def made_words(monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    """A thousand words of three syllables, in place of English ones."""
    made = tuple("".join(each) for each in itertools.product(_SYLLABLES, repeat=3))
    monkeypatch.setattr(words, "word_list", lambda *kinds: made)
    return made
