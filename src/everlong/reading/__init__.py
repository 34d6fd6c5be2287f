"""Driving an attached model over a stream of text: sessions, and methods that read for one question."""

from everlong.reading.homer import Homer
from everlong.reading.infini_retri import InfiniRetri
from everlong.reading.lookahead import Lookahead
from everlong.reading.outside import READING_METHODS, ReadingMethod
from everlong.reading.parallel_windows import ParallelWindows
from everlong.reading.reports import Generation, Progress, ReadReport, Score, Stats
from everlong.reading.sampling import Sampling
from everlong.reading.session import Session

__all__ = [
    "READING_METHODS",
    "Generation",
    "Homer",
    "InfiniRetri",
    "Lookahead",
    "ParallelWindows",
    "Progress",
    "ReadReport",
    "ReadingMethod",
    "Sampling",
    "Score",
    "Session",
    "Stats",
]
