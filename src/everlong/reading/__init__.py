"""Sessions: driving an attached model over a stream of text."""

from everlong.reading.reports import Generation, Progress, ReadReport, Score, Stats
from everlong.reading.sampling import Sampling
from everlong.reading.session import Session

__all__ = ["Generation", "Progress", "ReadReport", "Sampling", "Score", "Session", "Stats"]
