"""Options that several commands share, in groups, with one wording each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

import everlong
from everlong.cli.policy_files import method_name
from everlong.errors import ConfigurationError
from everlong.models.catalogue import DEFAULT_MODEL
from everlong.models.files import parse_bytes

if TYPE_CHECKING:
    from everlong.attention import Policy, Tier
    from everlong.llm import LLM
    from everlong.models.pulling import OnProgress
    from everlong.reading.sampling import Sampling

ATTENTION_DEFAULT = "recall"
"""The method where none is named."""

RECIPE_DEFAULT = "infinite-icl"
"""The recipe where none is named."""

_MODEL, _METHOD, _WRITING, _OUTPUT = "Model", "Attention", "Writing", "Output"

System = Annotated[
    str | None,
    typer.Option(
        "--system", metavar="TEXT", help="Instructions that are never forgotten.", rich_help_panel=_MODEL
    ),
]
Json = Annotated[
    bool,
    typer.Option("--json", help="Print one JSON document instead of text.", rich_help_panel=_OUTPUT),
]
Quiet = Annotated[
    bool,
    typer.Option("--quiet", "-q", help="No progress and no remarks.", rich_help_panel=_OUTPUT),
]


MemoryOption = Annotated[
    list[str] | None,
    typer.Option(
        "--memory",
        metavar="NAME",
        help="What the model knows by heart; see `everlong memory list`. May be given several times. "
        "`auto`: for each answer the one that is most like the question, or none.",
        rich_help_panel=_MODEL,
    ),
]
WeightsOption = Annotated[
    str,
    typer.Option(
        "--weights",
        help="How writing reads the weights: auto, float, int8, int4. `everlong models --model M` tells what "
        "each takes.",
        rich_help_panel=_MODEL,
    ),
]


@dataclass(frozen=True)
class ModelOptions:
    """Which model, and what it runs on."""

    model: Annotated[
        str,
        typer.Option(
            "--model",
            "-m",
            metavar="NAME|PATH|HUB-ID",
            help="A name from `everlong models`, a folder, a .gguf file or a hub id.",
            rich_help_panel=_MODEL,
        ),
    ] = DEFAULT_MODEL
    revision: Annotated[
        str | None,
        typer.Option("--revision", help="Branch, tag or commit of a hub id.", rich_help_panel=_MODEL),
    ] = None
    device: Annotated[
        str | None,
        typer.Option(
            "--device",
            help="cpu, cuda, cuda:1, mps … (default: cuda if there is one)",
            rich_help_panel=_MODEL,
        ),
    ] = None
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype",
            help="float32, bfloat16, float16 (default: float32 on the CPU)",
            rich_help_panel=_MODEL,
        ),
    ] = None
    threads: Annotated[
        int | None,
        typer.Option(
            "--threads", min=1, max=1024, help="CPU threads (default: PyTorch's)", rich_help_panel=_MODEL
        ),
    ] = None

    def loading(self, progress: OnProgress) -> dict[str, Any]:
        """Return what ``load()`` and ``load_model()`` take beside the model, having set the threads."""
        if self.threads is not None:
            import torch

            torch.set_num_threads(self.threads)
        return {
            "device": self.device,
            "dtype": self.dtype,
            "revision": self.revision,
            "progress": progress,
        }


@dataclass(frozen=True)
class MethodOptions:
    """Which attention method, with which options."""

    attention: Annotated[
        str | None,
        typer.Option(
            "--attention",
            "-a",
            metavar="METHOD",
            help="lm-infinite, streaming-llm, recall, inf-llm, quest, infinite-hip, re-attention, snap-kv, "
            "pyramid-kv, h2o, sir-llm, infini-pot, self-extend, dual-chunk, linear, ntk, yarn, full, or a "
            f"Python file that registers one (default: {ATTENTION_DEFAULT}).",
            rich_help_panel=_METHOD,
        ),
    ] = None
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="An option of the attention method, such as window=2048; everlong methods NAME lists them. "
            "May be given several times.",
            rich_help_panel=_METHOD,
        ),
    ] = None

    @property
    def name(self) -> str:
        """The method asked for, or the default."""
        return method_name(self.attention or ATTENTION_DEFAULT)

    @property
    def is_file(self) -> bool:
        """Whether the method comes from a file, which a saved session of it needs again."""
        return self.attention is not None and self.name != self.attention

    def policy(self) -> Policy:
        """Make the policy that was asked for."""
        return everlong.make_policy(self.name, parse_settings(self.settings))


@dataclass(frozen=True)
class TierOptions:
    """Where what leaves the window goes, with methods that recall from it."""

    place: Annotated[
        str | None,
        typer.Option(
            "--tier",
            metavar="ram|disk|FOLDER",
            help="Where what leaves the window is kept by methods that recall from it (default: ram).",
            rich_help_panel=_METHOD,
        ),
    ] = None
    tier_precision: Annotated[
        str | None,
        typer.Option(
            "--tier-precision",
            help="How: float16 (the default), int8, or exact.",
            rich_help_panel=_METHOD,
        ),
    ] = None
    tier_limit: Annotated[
        str | None,
        typer.Option(
            "--tier-limit",
            metavar="SIZE",
            help="Such as 4GB: beyond, the oldest is forgotten (default: a quarter of the RAM that is "
            "available, or half of the disk that is free).",
            rich_help_panel=_METHOD,
        ),
    ] = None

    def tier(self) -> Tier:
        """Make the tier that was asked for."""
        return everlong.Tier(**self._given)

    @property
    def is_given(self) -> bool:
        """Whether a tier was asked for."""
        return bool(self._given)

    def check(self, llm: LLM, policy: Policy) -> None:
        """Refuse a tier for a method that has none."""
        memories = llm.handle.new_cache(policy).memories.values() if self._given else ()
        if self._given and all(memory.tier is None for memory in memories):
            name = type(policy).__name__
            raise ConfigurationError(
                f"{name} keeps nothing of what leaves its window: --tier and its like are for methods that "
                "recall it, such as --attention inf-llm"
            )

    @property
    def _given(self) -> dict[str, Any]:
        asked = {
            "place": self.place,
            "precision": self.tier_precision,
            "limit": None if self.tier_limit is None else parse_bytes(self.tier_limit),
        }
        return {name: value for name, value in asked.items() if value is not None}


@dataclass(frozen=True)
class WritingOptions:
    """How much a model writes, and how each token is chosen."""

    max_new_tokens: Annotated[
        int,
        typer.Option("--max-new-tokens", min=1, help="Tokens to write at most.", rich_help_panel=_WRITING),
    ] = 512
    temperature: Annotated[
        float,
        typer.Option("--temperature", help="0: always the likeliest token.", rich_help_panel=_WRITING),
    ] = 0.0
    top_p: Annotated[
        float,
        typer.Option(
            "--top-p",
            help="Draw among the likeliest that make up this probability.",
            rich_help_panel=_WRITING,
        ),
    ] = 1.0
    top_k: Annotated[
        int,
        typer.Option("--top-k", help="Draw among this many likeliest; 0: off.", rich_help_panel=_WRITING),
    ] = 0
    min_p: Annotated[
        float,
        typer.Option(
            "--min-p",
            help="Draw among those at least this likely, to the likeliest.",
            rich_help_panel=_WRITING,
        ),
    ] = 0.0
    repetition_penalty: Annotated[
        float,
        typer.Option(
            "--repetition-penalty",
            help="Above 1: what occurred lately becomes less likely.",
            rich_help_panel=_WRITING,
        ),
    ] = 1.0
    seed: Annotated[
        int | None, typer.Option("--seed", help="Of the random draws.", rich_help_panel=_WRITING)
    ] = None
    stop: Annotated[
        list[str] | None,
        typer.Option(
            "--stop",
            metavar="TEXT",
            help="Where to stop. May be given several times.",
            rich_help_panel=_WRITING,
        ),
    ] = None

    speculate: Annotated[
        str | None,
        typer.Option(
            "--speculate",
            metavar="WAY",
            help="Guess tokens to come and run several at once: prompt-lookup, lookahead. The text stays "
            "the same.",
            rich_help_panel=_WRITING,
        ),
    ] = None

    def arguments(self) -> dict[str, Any]:
        """Return what ``Session.stream`` and its kin take, checked; the seed is the session's."""
        return {
            "speculate": self.speculate,
            "max_new_tokens": self.max_new_tokens,
            "sampling": self._sampling(),
            "stop": tuple(self.stop or ()),
        }

    def _sampling(self) -> Sampling:
        return everlong.Sampling(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
        )


@dataclass(frozen=True)
class OutputOptions:
    """What is printed beside the result."""

    as_json: Json = False
    quiet: Quiet = False


_EXAMPLES = {"--set": "window=2048", "--recipe-set": "generators=cloze"}


def parse_settings(settings: list[str] | None, option: str = "--set") -> dict[str, str]:
    """Turn ``["window=2048", "sinks=4"]``, given to `option`, into a dictionary for ``make_policy``.

    Raises
    ------
    ConfigurationError
        If one is not of the form KEY=VALUE, or a key is given twice.
    """
    parsed: dict[str, str] = {}
    for setting in settings or []:
        key, equals, value = setting.partition("=")
        key = key.strip()
        if not equals or not key:
            raise ConfigurationError(
                f"{option} takes KEY=VALUE, such as {option} {_EXAMPLES[option]}; got {setting!r}"
            )
        if key in parsed:
            raise ConfigurationError(f"{option} {key} is given twice: {parsed[key]!r} and {value.strip()!r}")
        parsed[key] = value.strip()
    return parsed
