"""InfiniteICL: segment after segment of a text is asked about, and learned (arXiv 2504.01707, section 3).

For each segment: *elicit* what could be asked about it, and what the model answers reading it; *select* the
pairs that only the segment makes likely; *consolidate* them into an adapter, by distilling the model that
reads the segment into the one that does not.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from everlong.attention import StreamCache
from everlong.errors import MemoryGateError
from everlong.memory import cartridge
from everlong.memory.anchors import continuations, readings
from everlong.memory.consolidation import Schedule, Step, consolidate, student
from everlong.memory.curvature import Curvature
from everlong.memory.elicitation import Cloze, Generator, make_generators
from everlong.memory.gate import weighed, without_worth
from everlong.memory.lessons import Elicited, Lesson, Teacher, as_tokens
from everlong.memory.own_texts import MEASURED, OwnTexts
from everlong.memory.progress import Account, LearnProgress, Progress, Reporter
from everlong.memory.recipes import Recipe
from everlong.memory.rehearsal import dealt, rehearsed
from everlong.memory.segments import Segment, segments
from everlong.memory.selection import Selected, select
from everlong.memory.writer import Writer
from everlong.reading.attached import AttachedModel

_POOL = 2048  # lessons kept to be rehearsed
_TURNS = 8  # passes of training before the student is held to the same again


class InfiniteICL:
    """Learns a text by a recipe.

    Parameters
    ----------
    model : AttachedModel
        The student, and its own teacher where `teacher` is not given; its adapters set aside.
    recipe : Recipe
        How.
    seed : int
        Of everything that is drawn.
    teacher : AttachedModel, optional
        Elicits, and with the same tokenizer teaches, instead.
    force : bool
        Whether to go on where the text is not worth anything to the model.
    own_texts : OwnTexts, optional
        What the model writes by itself and how firmly it expects that, if it is kept.
    """

    def __init__(
        self,
        model: AttachedModel,
        recipe: Recipe,
        *,
        seed: int = 0,
        teacher: AttachedModel | None = None,
        force: bool = False,
        own_texts: OwnTexts | None = None,
    ) -> None:
        self.model = model
        self.recipe = recipe
        self.seed = seed
        self.teacher = teacher
        self.force = force
        self.generators: list[Generator] = make_generators(recipe.generators)
        self.is_cartridge = recipe.kind == "cartridge"
        self._layers = _linear_layers(model.attachment.model)
        self._own_texts = own_texts or OwnTexts(model)
        self._texts: list[Lesson] | None = None
        self._curvature: Curvature | None = None  # of these: both are the same for every segment

    def config(self, prefix: int = 0) -> Any:
        """Return the adapter's configuration, PEFT's; a cartridge's, of `prefix` tokens."""
        from peft import LoraConfig

        if self.is_cartridge:
            return cartridge.config_of(self.model, prefix)
        return LoraConfig(
            r=self.recipe.rank,
            lora_alpha=self.recipe.alpha,
            target_modules=self._layers,
            lora_dropout=0.0,
            bias="none",
            task_type="CAUSAL_LM",
            base_model_name_or_path=self.model.name,
        )

    def learn(
        self,
        text: str,
        *,
        start: Progress | None = None,
        on_progress: Callable[[LearnProgress], None] | None = None,
        on_segment: Callable[[Progress], None] | None = None,
    ) -> Progress:
        """Learn a text, from where `start` stands.

        Parameters
        ----------
        text : str
            The source, whole.
        start : Progress, optional
            To go on from.
        on_progress : callable, optional
            Called now and then.
        on_segment : callable, optional
            Called after each segment with what one could go on from.

        Raises
        ------
        MemoryGateError
            The model does not use the text: what it would teach is no better than what it knows. Or nothing
            can be asked about it.
        NumericalError
            The loss is not finite. `on_segment` has seen the last good adapter.
        """
        parts = list(segments([text], self.model.coder, self.recipe.segment_tokens))
        state = self.learn_segments(parts, start=start, on_progress=on_progress, on_segment=on_segment)
        if not state.pairs:
            raise MemoryGateError(
                f"there is nothing to learn: of {state.account.elicited} pairs about the text, it makes none "
                "likelier. Use a larger model, teacher=, or generators=('cloze',)"
            )
        return state

    def learn_segments(
        self,
        parts: Sequence[Segment],
        *,
        start: Progress | None = None,
        on_progress: Callable[[LearnProgress], None] | None = None,
        on_segment: Callable[[Progress], None] | None = None,
    ) -> Progress:
        """Learn segments, at least one, of a text of which there may be more; those before `start` are left.

        Parameters and errors are those of :meth:`learn`; that nothing can be asked about them is none.
        """
        state = Progress() if start is None else start.copy()
        report = Reporter(on_progress, parts, state)
        first = torch.empty(0)
        if self.is_cartridge:
            first = cartridge.first_keys(self.model, parts[0].text, self.recipe.prefix)
        with state.account.timed("anchors"):
            self._ask()
        with self._seeded(), student(self.model, self.config(len(first))) as adapted:
            if self.is_cartridge:
                _load(adapted, {cartridge.WEIGHTS: first})
            blank = _state(adapted)
            with state.account.timed("anchors"):
                self._measure(adapted)
            if state.adapters and self.recipe.carry != "separate":
                _load(adapted, state.adapters[-1])
            for segment in parts:
                if segment.number < state.segment:
                    continue
                if self.recipe.carry == "separate":
                    _load(adapted, blank)
                carried = self.recipe.carry == "carried"
                with nullcontext() if carried else self._without(adapted):
                    lessons = self._lessons(segment, state, report)
                if lessons:  # a title, or a list of numbers, may have none
                    self._train(adapted, lessons, segment, state, report)
                    saved = _state(adapted)
                    state.adapters = [*state.adapters, saved] if self.recipe.carry == "separate" else [saved]
                    state.pool = self._pooled(state, lessons, segment.number)
                    state.pairs += [lesson.pair for lesson in lessons]
                state.segment = segment.number + 1
                if on_segment is not None:
                    on_segment(state.copy())
        report("done", parts[-1].number, 1.0)
        return state

    @property
    def _is_judged(self) -> bool:
        return self.recipe.ewc > 0 and not self.is_cartridge

    def _ask(self) -> None:
        """Let the model write by itself, once; it has no adapter yet."""
        if self._texts is None:
            count = max(self._turns * self.recipe.anchors, MEASURED if self._is_judged else 0)
            self._texts = self._own_texts.taught_by(self._taught_by(self.model), count)

    def _measure(self, adapted: Any) -> None:
        """Measure the model, once, with an adapter that changes nothing yet."""
        if self._curvature is None and self._is_judged:
            assert self._texts is not None
            self._curvature = self._own_texts.curvature(adapted, self._texts)

    def _lessons(self, segment: Segment, state: Progress, report: Reporter) -> list[Lesson]:
        """Elicit, teach and select."""
        account = state.account
        report("elicit", segment.number, 0.0)
        author = self.teacher or self.model
        writer = Writer(author)
        with account.timed("elicit"):
            elicited: list[Elicited] = []
            for generator in self.generators:
                elicited += generator.elicit(segment, writer)
                report("elicit", segment.number, 0.1)
        report("teach", segment.number, 0.3)
        teacher = self._taught_by(self.teacher)
        with account.timed("teach"):
            lessons = teacher.teach(elicited)
        with account.timed("gate"):
            worthless = self._worthless(lessons, segment, writer, account)
        worthy = [lesson for lesson in lessons if lesson.pair.generator not in worthless]
        selected = self._select(worthy, segment)
        missing = self._missing(selected.uncovered)
        if missing:
            with account.timed("teach"):
                more = teacher.teach(
                    [e for e in Cloze().elicit(segment, writer) if missing & {*e.pair.sentences}]
                )
            lessons, worthy = [*lessons, *more], [*worthy, *more]
            selected = self._select(worthy, segment)
        total = account.gain * account.elicited + sum(lesson.pair.gain or 0.0 for lesson in lessons)
        account.tokens += segment.tokens
        account.sentences += len(segment.sentences)
        account.elicited += len(lessons)
        account.gain = total / max(1, account.elicited)
        account.kept += len(selected.lessons)
        account.dropped.update(selected.dropped)
        account.dropped.update(
            f"{lesson.pair.generator} not worth it"
            for lesson in lessons
            if lesson.pair.generator in worthless
        )
        account.uncovered += len(selected.uncovered)
        if self.recipe.targets == "hard":
            return [lesson.hard() for lesson in selected.lessons]
        return selected.lessons

    def _worthless(
        self, lessons: list[Lesson], segment: Segment, writer: Writer, account: Account
    ) -> set[str]:
        """Measure what the text is worth, and return the kinds of pairs that are not to be learned."""
        has_gate = self.recipe.selection != "all"
        account.worth = weighed(
            account.worth,
            self.generators,
            [lesson.pair for lesson in lessons],
            segment,
            writer if has_gate else None,
            self.seed + segment.number,
        )
        return without_worth(account.worth, segment.number) if has_gate and not self.force else set()

    def _select(self, lessons: list[Lesson], segment: Segment) -> Selected:
        return select(lessons, self.recipe, len(segment.sentences), self.seed + segment.number)

    def _missing(self, uncovered: Sequence[int]) -> set[int]:
        """Return the sentences whose own words are to be learned, as what was elicited is not enough."""
        recipe = self.recipe
        is_floored = recipe.coverage > 0 and recipe.selection != "random"
        return set(uncovered) if is_floored and Cloze.name not in recipe.generators else set()

    def _without(self, adapted: Any) -> AbstractContextManager[Any]:
        """Let the model be the base model; a cartridge is only there where texts are put behind it."""
        return nullcontext() if self.is_cartridge else adapted.disable_adapter()

    def _train(
        self,
        adapted: Any,
        lessons: list[Lesson],
        segment: Segment,
        state: Progress,
        report: Reporter,
    ) -> None:
        recipe, draws = self.recipe, random.Random(self.seed + segment.number)
        held = draws.sample(range(len(lessons)), int(recipe.held_out * len(lessons)))
        learned = [lesson for number, lesson in enumerate(lessons) if number not in held]
        if recipe.continuations:
            report("write", segment.number, 0.35)
        beside = (
            rehearsed(state.pool, self._turns, recipe.replay * sum(map(len, lessons)), draws),
            dealt(self._anchors(), self._turns),
            dealt(self._continuations(adapted, segment, state.account), self._turns),
            dealt(self._readings(learned, segment), self._turns),
        )
        schedule = Schedule(
            passes=recipe.passes,
            batch_tokens=recipe.batch_tokens,
            learning_rate=recipe.learning_rate,
            patience=recipe.patience,
            hidden_weight=recipe.hidden_weight,
            seed=self.seed + segment.number,
        )

        def behind_prefix() -> StreamCache:
            return cartridge.past_of(self.model, adapted.prompt_encoder["memory"].weight)

        def on_step(step: Step) -> None:
            report("learn", segment.number, 0.4 + 0.6 * step.number / step.of, step.loss)

        with state.account.timed("learn"):
            state.account.loss = consolidate(
                self.model,
                [parameter for parameter in adapted.parameters() if parameter.requires_grad],
                learned,
                schedule,
                anchors=[list(chain(*kinds)) for kinds in zip(*beside, strict=True)],
                held_out=[lessons[i] for i in held],
                past=behind_prefix if self.is_cartridge else None,
                penalty=self._penalty(adapted),
                on_step=on_step,
            )

    @property
    def _turns(self) -> int:
        return min(self.recipe.passes, _TURNS)

    def _penalty(self, adapted: Any) -> Callable[[], Tensor] | None:
        """Return what the adapter's weights cost; None: nothing is known that it might change."""
        if self._curvature is None or not self._curvature.factors:
            return None
        return self._curvature.of(adapted, self.recipe.ewc)

    def _anchors(self) -> list[Lesson]:
        """Return the texts to which the student is held."""
        return (self._texts or [])[: self._turns * self.recipe.anchors]

    def _continuations(self, adapted: Any, segment: Segment, account: Account) -> list[Lesson]:
        """Return what the base model writes having read a segment, as it then expects it."""
        count = self._turns * self.recipe.continuations
        with account.timed("anchors"), self._without(adapted):
            elicited = continuations(segment, Writer(self.model), count, self.seed + segment.number)
            return self._taught_by(self.model).teach(elicited, gain=False)

    def _readings(self, lessons: list[Lesson], segment: Segment) -> list[Lesson]:
        """Return what the student goes on reading while it learns a segment: responses as they stand."""
        draws = random.Random(self.seed + segment.number)
        elicited = readings(segment, lessons, self.recipe.readings, self._turns, draws)
        return [as_tokens(self.model, item).hard() for item in elicited]

    def _taught_by(self, teacher: AttachedModel | None) -> Teacher:
        """Return a model as teacher, if its tokens are the student's; else the student itself."""
        if teacher is None or not teacher.has_tokens_of(self.model):
            teacher = self.model
        keeps_hidden = self.recipe.hidden_weight > 0 and teacher is self.model
        return Teacher(teacher, top_k=self.recipe.top_k, hidden=keeps_hidden, student=self.model)

    def _pooled(self, state: Progress, lessons: list[Lesson], segment: int) -> list[Lesson]:
        """Return the lessons to rehearse from now on: of all so far, each as likely as any other.

        Of a sample of all is kept what a sample of all and the new ones would have of it (Vitter 1985, in
        batches).
        """
        if self.recipe.carry != "replay":
            return []
        before = len(state.pairs)
        if before + len(lessons) <= _POOL:
            return [*state.pool, *lessons]
        draws = random.Random(self.seed + segment)
        new = sum(number >= before for number in draws.sample(range(before + len(lessons)), _POOL))
        return [*draws.sample(state.pool, _POOL - new), *draws.sample(lessons, new)]

    @contextmanager
    def _seeded(self) -> Iterator[None]:
        """Draw the adapter's first weights, which PEFT does on the CPU, from the seed, beside other draws."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.seed)
            yield


def _linear_layers(model: torch.nn.Module) -> list[str]:
    """Return the names, the last part of each, of the linear layers of the decoder's blocks."""
    inner: Any = model
    head = inner.get_output_embeddings()
    names = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    }
    return sorted(names)


def _state(adapted: Any) -> dict[str, Tensor]:
    from peft import get_peft_model_state_dict

    found = get_peft_model_state_dict(adapted, adapter_name="memory", save_embedding_layers=False)
    return {name: tensor.detach().cpu().clone() for name, tensor in found.items()}


def _load(adapted: Any, state: dict[str, Tensor]) -> None:
    from peft import set_peft_model_state_dict

    set_peft_model_state_dict(adapted, state, adapter_name="memory")
