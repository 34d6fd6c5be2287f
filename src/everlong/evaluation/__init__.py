"""Measurement: one file a task, and a report that shows methods side by side."""

from everlong.evaluation.comparison import (
    Comparison,
    Method,
    MethodResult,
    Plan,
    compare_methods,
    make_methods,
)
from everlong.evaluation.perplexity import Bucket, Reading, bucketed, read_stream
from everlong.evaluation.statistics import Interval, mean_interval
from everlong.evaluation.streams import PolicyStream, StockStream, Stream, open_stream

__all__ = [
    "Bucket",
    "Comparison",
    "Interval",
    "Method",
    "MethodResult",
    "Plan",
    "PolicyStream",
    "Reading",
    "StockStream",
    "Stream",
    "bucketed",
    "compare_methods",
    "make_methods",
    "mean_interval",
    "open_stream",
    "read_stream",
]
