"""Tasks of lm-evaluation-harness under any policy and any memory, their texts whole.

Needs the package lm_eval: ``pip install 'everlong[harness]'``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from everlong.attention import Policy
from everlong.errors import ConfigurationError
from everlong.llm import LLM
from everlong.reading.sampling import Sampling
from everlong.reading.session import Session

if TYPE_CHECKING:
    from everlong.memory.folder import Memory
    from everlong.memory.store import MemoryStore

try:
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
    from tqdm import tqdm
except ImportError as error:
    raise ConfigurationError(
        "tasks of lm-evaluation-harness need the package lm_eval, which is not installed or lacks one of "
        f"its own ({error}): pip install 'everlong[harness]'"
    ) from error

_NO_LIMIT = 2**40
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
_SAID_OTHERWISE = {"do_sample", "num_beams", "use_cache"}

Request = tuple[tuple[str, str] | None, list[int], list[int]]


@register_model("everlong")
class EverlongLM(HFLM):  # type: ignore[misc]
    """A model of Everlong as lm-evaluation-harness knows models: ``simple_evaluate(model=EverlongLM(llm))``.

    Every request is read by a session, chunk by chunk, under the policy and with the memories. No text is
    cut: there is no greatest length. What tokenises, what chat templates do, and what is scored are the
    harness's own. One request runs at a time; continuations of one context share its reading.

    Parameters
    ----------
    llm : LLM
        The model, as :func:`everlong.load` gives it.
    attention : Policy or str, optional
        Another policy than the model's.
    memories : sequence of str or Memory, or "auto"
        What it knows by heart; this and the next two as of :meth:`everlong.LLM.session`.
    memory_weights : sequence of float, optional
        By how much each counts.
    store : MemoryStore, optional
        Where names are looked up.
    chunk : int
        Tokens of one forward.
    options
        Others of ``HFLM``, such as ``add_bos_token``. Those that load a model have no effect.

    Raises
    ------
    ConfigurationError
        ``max_length``, or a ``batch_size`` other than 1.
    """

    def __init__(
        self,
        llm: LLM,
        *,
        attention: Policy | str | None = None,
        memories: str | Sequence[str | Memory] = (),
        memory_weights: Sequence[float] | None = None,
        store: MemoryStore | None = None,
        chunk: int = 512,
        **options: Any,
    ) -> None:
        if options.pop("max_length", None) is not None:
            raise ConfigurationError(
                "max_length would cut texts: leave it out, and give a policy a window (attention=...)"
            )
        if options.setdefault("batch_size", 1) not in (1, "1"):
            raise ConfigurationError(
                f"batch_size={options['batch_size']!r} cannot work: requests are read one at a time; use 1"
            )
        self._llm = llm
        self._session_options: dict[str, Any] = {
            "attention": attention,
            "memories": memories,
            "memory_weights": memory_weights,
            "store": store,
            "chunk": chunk,
            "seed": 0,
        }
        self._session()  # refuses what cannot work before anything is loaded
        super().__init__(pretrained=llm.handle.model, tokenizer=llm.tokenizer, backend="causal", **options)

    @property
    def max_length(self) -> int:
        """No limit, so that the harness cuts nothing."""
        return _NO_LIMIT

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Let the model go on from each context until it ends, or one of the request's strings comes."""
        written = []
        eos = self.tok_decode(self.eot_token_id, skip_special_tokens=False)
        for request in tqdm(requests, disable=disable_tqdm, desc="Running generate_until requests"):
            context, given = request.args
            options = normalize_gen_kwargs(given, self.max_gen_toks)
            stop = handle_stop_sequences(options.pop("until", None), eos=eos)
            limit = options.pop("max_gen_toks")
            sampling = _sampling(options)
            session = self._session()
            session.read(self.tok_encode(context) or [self.prefix_token_id])
            text = session.generate(limit, sampling=sampling, stop=[each for each in stop if each]).text
            self.cache_hook.add_partial("generate_until", request.args, text)
            written.append(text)
        return written

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Return of each (key, context, continuation) its log-likelihood, and whether greed would write it.

        Without a key, as for perplexities of whole texts, the second is not asked for, and False.
        """
        found: dict[int, tuple[float, bool]] = {}
        session, read = None, None
        order = sorted(range(len(requests)), key=lambda number: requests[number][1])
        for number in tqdm(order, disable=disable_tqdm, desc="Running loglikelihood requests"):
            key, context, continuation = requests[number]
            if session is None or context != read:
                session, read = self._session(), context
                session.read(list(context))
            found[number] = _continued(session, continuation, is_greedy_asked=key is not None)
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, found[number])
        return [found[number] for number in range(len(requests))]

    def _session(self) -> Session:
        return self._llm.session(**self._session_options)


def _continued(session: Session, ids: list[int], *, is_greedy_asked: bool) -> tuple[float, bool]:
    """Return how likely it is that the stream goes on with `ids`, and whether each is the likeliest."""
    tape = session.fork().to_go_on()
    tape.run_all(session.chunk, logits=True)
    tape.end_of_read()
    driver, total, is_greedy = tape.driver, 0.0, is_greedy_asked
    if not is_greedy_asked:
        driver.surprisal = True
        tape.accept(ids)
        while tape.queue:
            surprisal = tape.run_chunk(session.chunk, logits=True)
            assert surprisal is not None
            total -= float(surprisal.double().sum())
        return total, False
    for number, token in enumerate(ids):
        assert driver.logits is not None
        with torch.inference_mode():
            logarithms = driver.logits.float().log_softmax(-1)
            total += float(logarithms[token])
            is_greedy = is_greedy and int(logarithms.argmax()) == token
        if number + 1 < len(ids):
            tape.accept([token])
            tape.run_all(1, logits=True)
    return total, is_greedy


def _sampling(options: dict[str, Any]) -> Sampling:
    """Return how tokens are chosen, as a request of the harness says it."""
    unknown = set(options) - {*_SAMPLING, *_SAID_OTHERWISE}
    if unknown or options.get("num_beams", 1) != 1:
        wrong = ", ".join(sorted(unknown)) or f"num_beams={options['num_beams']}"
        raise ConfigurationError(f"a task asks to generate with {wrong}; known: {', '.join(_SAMPLING)}")
    if not options.get("do_sample"):
        options = {**options, "temperature": 0.0}
    elif options.get("temperature") is None:
        options = {**options, "temperature": 1.0}  # transformers' default
    values = {name: options[name] for name in _SAMPLING if options.get(name) is not None}
    return Sampling(**values, seed=0)
