"""Short-term memory: attention policies, and the seam through which a loaded model follows one."""

from everlong.attention.attach import Attachment, attach
from everlong.attention.cache import StreamCache
from everlong.attention.dual_chunk import DualChunk
from everlong.attention.full import FullAttention
from everlong.attention.h2o import H2O
from everlong.attention.inf_llm import InfLLM
from everlong.attention.infini_pot import InfiniPot
from everlong.attention.infinite_hip import InfiniteHiP
from everlong.attention.lm_infinite import LMInfinite
from everlong.attention.policy import POLICIES, Bytes, Policy, make_policy, policy_options, with_sinks
from everlong.attention.pyramid_kv import PyramidKV
from everlong.attention.quest import Quest
from everlong.attention.re_attention import ReAttention
from everlong.attention.recall import Recall
from everlong.attention.scaled import LinearScaling, NTKScaling, YaRN
from everlong.attention.self_extend import SelfExtend
from everlong.attention.sir_llm import SirLLM
from everlong.attention.snap_kv import SnapKV
from everlong.attention.streaming_llm import StreamingLLM
from everlong.attention.tiers import Tier

__all__ = [
    "H2O",
    "POLICIES",
    "Attachment",
    "Bytes",
    "DualChunk",
    "FullAttention",
    "InfLLM",
    "InfiniPot",
    "InfiniteHiP",
    "LMInfinite",
    "LinearScaling",
    "NTKScaling",
    "Policy",
    "PyramidKV",
    "Quest",
    "ReAttention",
    "Recall",
    "SelfExtend",
    "SirLLM",
    "SnapKV",
    "StreamCache",
    "StreamingLLM",
    "Tier",
    "YaRN",
    "attach",
    "make_policy",
    "policy_options",
    "with_sinks",
]
