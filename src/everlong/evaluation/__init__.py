"""Measurement: one file a task, and a report that shows methods side by side."""

from everlong.evaluation.comparison import (
    Comparison,
    Method,
    MethodResult,
    Plan,
    compare_methods,
    make_methods,
)
from everlong.evaluation.finding import FindingPlan, Found, FoundShare, find, shares
from everlong.evaluation.long_inputs import Way, make_ways, with_baselines
from everlong.evaluation.needles import Needle, Passkey, SentenceInText
from everlong.evaluation.perplexity import Bucket, Reading, bucketed, read_stream
from everlong.evaluation.ruler_needles import NeedleAmongIds, NeedleAmongNeedles, OneNeedle
from everlong.evaluation.statistics import Interval, mean_interval
from everlong.evaluation.streams import PolicyStream, StockStream, Stream, open_stream
from everlong.evaluation.tasks import TASKS, Sample, Task, make_task
from everlong.evaluation.variable_tracking import VariableTracking
from everlong.evaluation.word_counts import CommonWords, FrequentWords

__all__ = [
    "TASKS",
    "Bucket",
    "CommonWords",
    "Comparison",
    "FindingPlan",
    "Found",
    "FoundShare",
    "FrequentWords",
    "Interval",
    "Method",
    "MethodResult",
    "Needle",
    "NeedleAmongIds",
    "NeedleAmongNeedles",
    "OneNeedle",
    "Passkey",
    "Plan",
    "PolicyStream",
    "Reading",
    "Sample",
    "SentenceInText",
    "StockStream",
    "Stream",
    "Task",
    "VariableTracking",
    "Way",
    "bucketed",
    "compare_methods",
    "find",
    "make_methods",
    "make_task",
    "make_ways",
    "mean_interval",
    "open_stream",
    "read_stream",
    "shares",
    "with_baselines",
]
