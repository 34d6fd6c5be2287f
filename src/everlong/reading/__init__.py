"""Sessions: driving an attached model over a stream of text."""

from everlong.reading.lookahead import Lookahead
from everlong.reading.reports import Generation, Progress, ReadReport, Score, Stats
from everlong.reading.sampling import Sampling
from everlong.reading.session import Session

__all__ = ["Generation", "Lookahead", "Progress", "ReadReport", "Sampling", "Score", "Session", "Stats"]
