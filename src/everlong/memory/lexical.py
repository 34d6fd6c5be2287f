"""Which of some texts a query is about, by the words they share: BM25."""

from __future__ import annotations

import heapq
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable

SATURATION = 1.2
"""BM25's k1: how soon it stops counting that a word occurs once more."""
LENGTH_WEIGHT = 0.75
"""BM25's b: how far long texts are marked down, from 0 (not at all) to 1."""

# Chinese characters and kana stand without spaces between words: each counts as one.
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+")


def words_of(text: str) -> list[str]:
    """Split a text into words, without regard to case and punctuation."""
    return _WORD.findall(text.casefold())


FUNCTION_WORDS = frozenset(
    words_of(
        "a about an and any are as at be been by can could did do does for from get had has have he her his "
        "how i if in is it its many may me most much must my of on or our s she should so some than that the "
        "their them then there they this to us was we were what when where which who whom whose why will "
        "with would you your"
    )
)
"""English words that do not say what a text is about, or a question, which is full of them."""


class LexicalIndex:
    """Texts that can be searched by their words.

    Parameters
    ----------
    documents : iterable of str
        The texts, numbered from 0 on.

    Notes
    -----
    BM25 as in Robertson and Zaragoza, *The Probabilistic Relevance Framework* (2009), with a weight of rare
    words that never becomes negative: log(1 + (N - n + 0.5) / (n + 0.5)) for a word in n of N documents.
    """

    def __init__(self, documents: Iterable[str]) -> None:
        self._lengths: list[int] = []
        self._postings: dict[str, list[tuple[int, int]]] = defaultdict(list)
        for index, document in enumerate(documents):
            counts = Counter(words_of(document))
            self._lengths.append(counts.total())
            for word, count in counts.items():
                self._postings[word].append((index, count))

    def __len__(self) -> int:
        return len(self._lengths)

    def search(self, query: str, k: int) -> list[tuple[int, float]]:
        """Return the `k` documents that fit a query best, each as its number and its score.

        The best comes first, of equally good ones the earlier. Documents that share no word with the query
        are left out.
        """
        scores: dict[int, float] = defaultdict(float)
        mean = sum(self._lengths) / max(len(self), 1)
        for word, times in Counter(words_of(query)).items():
            rarity = self._rarity(word)
            for index, count in self._postings.get(word, ()):
                length = 1 - LENGTH_WEIGHT + LENGTH_WEIGHT * self._lengths[index] / mean
                scores[index] += times * rarity * count * (SATURATION + 1) / (count + SATURATION * length)
        return heapq.nsmallest(k, scores.items(), key=lambda item: (-item[1], item[0]))

    def full_score(self, query: str) -> float:
        """Return what a document of mean length would score that has each word of a query once."""
        return sum(times * self._rarity(word) for word, times in Counter(words_of(query)).items())

    def _rarity(self, word: str) -> float:
        found = len(self._postings.get(word, ()))
        return math.log(1 + (len(self) - found + 0.5) / (found + 0.5))
