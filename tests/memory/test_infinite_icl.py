"""A text into an adapter, segment after segment; interrupted, refused, and without a trace on the model."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from everlong.errors import InputError, MemoryGateError, NumericalError
from everlong.memory import consolidation, infinite_icl
from everlong.memory.anchors import READING, UNRELATED, continuations
from everlong.memory.consolidation import loss_of, student
from everlong.memory.elicitation import Generator
from everlong.memory.infinite_icl import InfiniteICL
from everlong.memory.lessons import Elicited, Lesson, Teacher
from everlong.memory.pairs import Pair
from everlong.memory.progress import LearnProgress, Progress
from everlong.memory.recipes import Carry, Recipe
from everlong.memory.record import Kind
from everlong.memory.segments import Segment, segments
from everlong.memory.writer import Writer
from everlong.models.head import Head
from everlong.reading.attached import AttachedModel
from tests.memory.students import lesson, plain_logits, student_of
from tests.reading.small_tokenizers import trained
from tests.tiny import BYTE_VOCAB

SENTENCES = (
    "Orla Finch keeps bees in Sligo. ",
    "She sells honey to Bennet. ",
    "The bees sleep until May. ",
    "Nobody has seen the queen. ",
    "It rains there every Monday. ",
    "Her brother paints boats.",
)
TEXT = "".join(SENTENCES)  # fewer than 256 bytes: beyond, the tokenizer would be said to shatter it
CARRY = ("carried", "replay", "separate")
_TEACH = Teacher.teach


def recipe_of(**changes: Any) -> Recipe:
    fields = {
        "generators": ("text",),
        "selection": "all",
        "targets": "hard",
        "segment_tokens": 64,
        "rank": 8,
        "alpha": 16,
        "learning_rate": 2e-2,
        "passes": 8,
        "batch_tokens": 256,
        "anchors": 1,
        "ewc": 0.0,
        "continuations": 0,
        "readings": 0,
    }
    return Recipe(**{**fields, **changes})


@pytest.fixture
def model() -> Iterator[AttachedModel]:
    with student_of() as made:
        yield made


def learner_of(model: AttachedModel, seed: int = 0, **changes: Any) -> InfiniteICL:
    return InfiniteICL(model, recipe_of(**changes), seed=seed)


def same(ours: Progress, theirs: Progress) -> bool:
    """Whether two adapters, or lists of them, are the same to the last bit."""
    return len(ours.adapters) == len(theirs.adapters) and all(
        a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
        for a, b in zip(ours.adapters, theirs.adapters, strict=True)
    )


def with_adapter(
    model: AttachedModel, learner: InfiniteICL, progress: Progress, lessons: Sequence[Lesson]
) -> tuple[float, float]:
    """The loss on lessons without what was learned, and with it, as PEFT loads it."""
    from peft import set_peft_model_state_dict

    inner = model.attachment.model
    before = loss_of(model, Head(inner), lessons, 1000)
    (tensors,) = progress.adapters
    with student(model, learner.config()) as adapted:
        set_peft_model_state_dict(adapted, tensors, adapter_name="memory")
        return before, loss_of(model, Head(inner), lessons, 1000)


def whole_text(model: AttachedModel) -> list[Lesson]:
    return [lesson("", part.text) for part in segments([TEXT], model.coder, 64)]


@pytest.mark.parametrize("carry", CARRY)
def test_a_text_is_memorised(model: AttachedModel, carry: str) -> None:
    learner = learner_of(model, carry=carry, passes=20, learning_rate=3e-2)
    progress = learner.learn(TEXT)
    lessons = whole_text(model)
    assert len(lessons) == progress.segment > 2
    if carry == "separate":
        assert len(progress.adapters) == len(lessons)
        for tensors, own in zip(progress.adapters, lessons, strict=True):
            before, after = with_adapter(model, learner, Progress(adapters=[tensors]), [own])
            assert after < 0.5 * before
        return
    assert len(progress.adapters) == 1
    before, after = with_adapter(model, learner, progress, lessons[-1:])
    assert after < 0.5 * before
    before, after = with_adapter(model, learner, progress, lessons[:1])
    if carry == "replay":
        assert after < 0.5 * before, "what was learned first is not forgotten"
    wrong = [lesson("", "Quartz veins cross a granite bluff, 1887.")]
    before, after = with_adapter(model, learner, progress, wrong)
    assert after > 0.6 * before, "it is this text that was learned"


def test_soft_targets_of_what_stands_in_the_text_are_learned(model: AttachedModel) -> None:
    learner = InfiniteICL(
        model,
        recipe_of(generators=("cloze",), targets="soft", selection="gain", passes=20, anchors=0),
        force=True,
    )
    steps: list[LearnProgress] = []
    progress = learner.learn(SENTENCES[0] + SENTENCES[1], on_progress=steps.append)
    losses = [step.loss for step in steps if step.loss is not None]
    assert losses[-1] < 0.6 * losses[0]
    assert all(pair.gain is not None and pair.gain > 0 for pair in progress.pairs)


@pytest.mark.parametrize("carry", CARRY)
def test_it_goes_on_from_each_segment_as_if_it_had_not_stopped(
    model: AttachedModel, carry: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def taught(self: Any, elicited: Any, **_: Any) -> list[Lesson]:  # every third pair is worth nothing
        found = _TEACH(self, elicited)
        return [replace(one, pair=replace(one.pair, gain=float(i % 3))) for i, one in enumerate(found)]

    monkeypatch.setattr(Teacher, "teach", taught)
    settings = {"carry": carry, "held_out": 0.4, "passes": 2, "hidden_weight": 0.1, "readings": 2}
    recipe = recipe_of(generators=("cloze",), selection="gain", targets="soft", **settings)
    stops: list[Progress] = []
    whole = InfiniteICL(model, recipe, force=True).learn(TEXT, on_segment=stops.append)
    assert [stop.segment for stop in stops] == list(range(1, whole.segment + 1)) and len(stops) > 2
    assert same(stops[-1], whole) and not same(stops[0], whole)
    assert sum(stops[0].account.dropped.values()) < sum(whole.account.dropped.values())
    for stop in stops:
        before = copy.deepcopy(stop)
        resumed = InfiniteICL(model, recipe, force=True).learn(TEXT, start=stop)
        assert same(resumed, whole)
        assert resumed.pairs == whole.pairs
        assert [one.pair for one in resumed.pool] == [one.pair for one in whole.pool]
        assert {**vars(resumed.account), "seconds": {}} == {**vars(whole.account), "seconds": {}}
        assert same(stop, before) and (stop.pairs, stop.account) == (before.pairs, before.account)
        assert (stop.segment, len(stop.pool)) == (before.segment, len(before.pool)), "where it stood is kept"


@pytest.mark.parametrize("carry", CARRY)
def test_only_an_adapter_that_is_carried_along_teaches_what_follows(
    model: AttachedModel, carry: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = [256, *TEXT.encode()]
    base, differ = plain_logits(model, ids), []

    def watched(self: Any, elicited: Any, *, gain: bool = True) -> list[Lesson]:
        differs = not torch.allclose(plain_logits(model, ids), base, atol=1e-4)
        if gain:
            differ.append(differs)
        else:
            assert not differs, "what the student is held to is the base model's"
        return _TEACH(self, elicited, gain=gain)

    monkeypatch.setattr(Teacher, "teach", watched)
    learner_of(model, carry=carry, passes=1, generators=("cloze",)).learn(TEXT)
    assert differ == [False, *[carry == "carried"] * (len(differ) - 1)] and len(differ) > 2


def test_the_same_seed_gives_the_same_adapter_and_leaves_draws_alone(model: AttachedModel) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    once = learner_of(model, passes=2).learn(TEXT)
    assert torch.equal(torch.rand(3), expected)
    assert same(once, learner_of(model, passes=2).learn(TEXT))
    assert not same(once, learner_of(model, passes=2, seed=1).learn(TEXT))


@pytest.mark.parametrize("carry", CARRY)
def test_nothing_is_left_on_the_model(model: AttachedModel, carry: str) -> None:
    inner = model.attachment.model
    ids = [256, *TEXT.encode()]
    before, names = plain_logits(model, ids), [name for name, _ in inner.named_modules()]
    wanted = [parameter.requires_grad for parameter in inner.parameters()]
    held, attributes = {k: v.clone() for k, v in inner.state_dict().items()}, set(inner.__dict__)
    learner_of(model, carry=carry, passes=1).learn(TEXT)
    assert [name for name, _ in inner.named_modules()] == names and set(inner.__dict__) == attributes
    assert [parameter.requires_grad for parameter in inner.parameters()] == wanted
    assert all(torch.equal(inner.state_dict()[k], v) for k, v in held.items())
    assert torch.equal(plain_logits(model, ids), before)


# --- the gate -----------------------------------------------------------------------------------------


def with_gains(monkeypatch: pytest.MonkeyPatch, *gains: float) -> None:
    """Let the pairs of each segment be worth this to the teacher."""
    left = list(gains)

    def taught(self: Any, elicited: Any, *, gain: bool = True) -> list[Lesson]:
        found = _TEACH(self, elicited, gain=gain)
        if not found or not gain:
            return found
        worth = left.pop(0)
        return [replace(one, pair=replace(one.pair, gain=worth)) for one in found]

    monkeypatch.setattr(Teacher, "teach", taught)


def test_a_text_that_is_worth_nothing_is_refused(
    model: AttachedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    cloze = {"generators": ("cloze",), "selection": "gain", "passes": 1}
    names = [name for name, _ in model.attachment.model.named_modules()]
    stops: list[Progress] = []
    with_gains(monkeypatch, 0.15, -0.5)
    with pytest.raises(MemoryGateError, match=r"segment 2: .*-0\.\d+ nats per token .* to 6 pairs.*force"):
        learner_of(model, **cloze).learn(TEXT, on_segment=stops.append)
    assert [stop.segment for stop in stops] == [1]
    assert [name for name, _ in model.attachment.model.named_modules()] == names
    with_gains(monkeypatch, 0.15, -0.5, 0.05, 0.5, 0.5)
    forced = InfiniteICL(model, recipe_of(**cloze), force=True).learn(TEXT)
    assert forced.segment > 2 and {pair.segment for pair in forced.pairs} == {0, *range(2, forced.segment)}


def test_what_does_not_choose_by_gain_has_no_gate(
    model: AttachedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_gains(monkeypatch, *[-1.0] * 9)
    assert learner_of(model, passes=1).learn(TEXT).account.gain == -1.0


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("anchors", [0, 2])
def test_a_text_about_which_nothing_can_be_asked_is_refused(
    model: AttachedModel, force: bool, anchors: int
) -> None:
    recipe = recipe_of(generators=("cloze",), selection="gain", anchors=anchors)
    with pytest.raises(MemoryGateError, match="nothing to learn: of 0 pairs"):
        InfiniteICL(model, recipe, force=force).learn("Stop!\n\nNow!")


@pytest.mark.parametrize("anchors", [0, 2])
def test_forced_a_text_that_makes_nothing_likelier_is_refused_all_the_same(
    model: AttachedModel, anchors: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_gains(monkeypatch, *[-1.0] * 9)
    recipe = recipe_of(generators=("cloze",), selection="gain", anchors=anchors)
    with pytest.raises(MemoryGateError, match=r"nothing to learn: of \d+ pairs"):
        InfiniteICL(model, recipe, force=True).learn(TEXT)


@pytest.mark.parametrize("carry", CARRY)
@pytest.mark.parametrize("where", ["first", "last"])
def test_a_segment_without_pairs_is_passed_over(
    model: AttachedModel, carry: str, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    title = "X" * 40 + "!"  # a word of its own, longer than what is left of a segment
    text = f"{title}\n\n{SENTENCES[0]}" if where == "first" else f"{SENTENCES[0]}\n\n{title}"
    with_gains(monkeypatch, 0.5)
    learner = learner_of(model, carry=carry, passes=1, generators=("cloze",), selection="gain", anchors=0)
    stops: list[Progress] = []
    progress = learner.learn(text, on_segment=stops.append)
    assert progress.segment == len(stops) == 2
    assert len(progress.adapters) == 1 and {pair.segment for pair in progress.pairs} == {
        1 if where == "first" else 0
    }
    assert progress.account.uncovered == 1
    assert same(learner.learn(text, start=stops[1]), progress)


def test_a_sentence_without_a_pair_is_learned_in_its_own_words(
    model: AttachedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    class First(Generator):
        """A pair about the first sentence alone."""

        name = "first"

        def elicit(self, segment: Segment, writer: Any) -> Iterator[Elicited]:
            pair = Pair("Who?", " Orla", self.name, segment.number, (0,))
            yield Elicited(pair, segment.text, pair.query)

    monkeypatch.setattr(infinite_icl, "make_generators", lambda names: [First()])
    with_gains(monkeypatch, *[0.5] * 20)
    text = "".join(SENTENCES[:3]) + "Stop!"
    for selection, coverage, missing in (("gain", 1, 1), ("gain", 0, 3), ("random", 1, 3)):
        recipe = recipe_of(
            generators=("text",), selection=selection, coverage=coverage, passes=1, segment_tokens=128
        )
        progress = InfiniteICL(model, recipe).learn(text)
        about = {(pair.generator, number) for pair in progress.pairs for number in pair.sentences}
        own = {("cloze", 1), ("cloze", 2)} if missing == 1 else set()
        assert about == {("first", 0), *own}
        assert (progress.account.sentences, progress.account.uncovered) == (4, missing)


@pytest.mark.parametrize("text", ["", " \n", "ab"])
def test_a_text_with_nothing_in_it_is_refused(model: AttachedModel, text: str) -> None:
    with pytest.raises(InputError, match="nothing in it to remember"):
        learner_of(model).learn(text)


# --- accounts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("selection", "written"), [("gain", 0), ("random", 0), ("all", 0), ("gain", 1)])
def test_the_accounts_add_up(model: AttachedModel, selection: str, written: int) -> None:
    given = {"selection": selection, "continuations": written, "budget": 60, "coverage": 0}
    recipe = recipe_of(generators=("cloze",), passes=1, targets="soft", **given)
    seen: list[LearnProgress] = []
    progress = InfiniteICL(model, recipe, force=True).learn(TEXT, on_progress=seen.append)
    account = progress.account
    parts = list(segments([TEXT], model.coder, 64))
    assert account.tokens == len(TEXT.encode()) == sum(part.tokens for part in parts)
    assert account.elicited == account.kept + sum(account.dropped.values()) == 2 * len(SENTENCES) - len(parts)
    assert account.kept == len(progress.pairs) == len(progress.pool)
    covered = {(pair.segment, number) for pair in progress.pairs for number in pair.sentences}
    assert account.sentences == sum(len(part.sentences) for part in parts) == len(SENTENCES)
    assert account.uncovered == account.sentences - len(covered)
    assert set(account.seconds) == {"anchors", "elicit", "teach", "gate", "learn"}
    assert min(account.seconds.values()) > 0 and math.isfinite(account.loss)
    if selection == "all":
        gains = [pair.gain for pair in progress.pairs if pair.gain is not None]
        assert account.gain == pytest.approx(sum(gains) / account.elicited)
    last = seen[-1]
    assert (last.stage, last.fraction, last.segments) == ("done", 1.0, len(parts))
    assert (last.sentences, last.uncovered, last.seconds_left) == (len(SENTENCES), account.uncovered, 0)
    left = [one.seconds_left for one in seen if one.seconds_left is not None]
    assert seen[0].seconds_left is None and left[0] > 0
    assert (last.pairs, last.kept, last.dropped) == (account.elicited, account.kept, dict(account.dropped))
    fractions = [one.fraction for one in seen]
    assert fractions == sorted(fractions) and fractions[0] >= 0
    stages = ["elicit", "teach", *(["write"] if written else []), "learn"]
    assert list(dict.fromkeys(one.stage for one in seen)) == [*stages, "done"]
    assert all((one.loss is not None) == (one.stage == "learn") for one in seen)


def test_earlier_lessons_are_rehearsed_in_measure(
    model: AttachedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[tuple[list[Lesson], list[list[Lesson]]]] = []

    def remember(
        model: Any, parameters: Any, lessons: list[Lesson], *_: Any, anchors: Any, **__: Any
    ) -> float:
        given.append((list(lessons), [list(turn) for turn in anchors]))
        return 0.0

    monkeypatch.setattr(infinite_icl, "consolidate", remember)
    for carry, share in (("replay", 0.5), ("replay", 0.0), ("carried", 1.0), ("separate", 1.0)):
        given.clear()
        learner_of(model, carry=carry, replay=share, generators=("cloze",)).learn(TEXT)
        pool: list[Lesson] = []
        for number, (lessons, turns) in enumerate(given):
            assert lessons and all(one.pair.segment == number for one in lessons)
            for turn in turns:
                earlier = [one for one in turn if one.pair.generator == "cloze"]
                others = [one for one in turn if one not in earlier]
                assert others and {one.pair.generator for one in others} <= {UNRELATED, READING}
                assert all(one in pool for one in earlier)
                if number == 0 or carry != "replay" or share == 0:
                    assert not earlier
                else:
                    room = share * sum(map(len, lessons))
                    least = room <= sum(map(len, earlier)) < room + max(map(len, earlier))
                    assert least or len(earlier) == len(pool)
            pool += lessons


def test_of_a_long_text_each_segment_is_rehearsed_as_often_as_any_other(
    model: AttachedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(infinite_icl, "_POOL", 100)
    left = torch.zeros(40)
    for seed in range(30):
        learner, state = learner_of(model, seed), Progress()
        for segment in range(40):
            lessons: Any = [(segment, number) for number in range(11)]
            state.pool = learner._pooled(state, lessons, segment)
            state.pairs += lessons
            assert len(set(state.pool)) == len(state.pool) == min(100, len(state.pairs))
        for pooled in state.pool:
            left[pooled[0]] += 1  # type: ignore[index]
    expected = 30 * 100 / 40  # of each segment, with a deviation of some 8
    assert (left - expected).abs().max() < 4.5 * 8
    assert abs(left[:10].mean() - expected) < 10


@pytest.mark.parametrize("held_out", [0.0, 0.1, 0.5])
def test_what_is_held_out_is_not_learned(
    model: AttachedModel, held_out: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[tuple[list[Lesson], list[Lesson]]] = []

    def remember(*arguments: Any, held_out: list[Lesson], **_: Any) -> float:
        given.append((list(arguments[2]), list(held_out)))
        return 0.0

    monkeypatch.setattr(infinite_icl, "consolidate", remember)
    learner_of(model, held_out=held_out, generators=("cloze",), carry="carried").learn(TEXT)
    for lessons, held in given:
        own = [one for one in lessons if one.pair.generator == "cloze"]
        assert len(held) == int(held_out * (len(own) + len(held)))
        assert own and not any(one in own for one in held)


def test_hidden_states_are_taught_in_every_batch(
    model: AttachedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[list[Lesson]] = []
    monkeypatch.setattr(infinite_icl, "consolidate", lambda *args, **_: given.append(args[2]) or 0.0)
    learner_of(model, hidden_weight=1.0, targets="soft", generators=("cloze",)).learn(TEXT)
    assert given and all(one.hidden is not None for lessons in given for one in lessons)


@pytest.mark.parametrize("kind", ["lora", "cartridge"])
@pytest.mark.parametrize("carry", ["carried", "replay"])
def test_what_follows_a_segment_is_the_base_models_whatever_was_learned(
    model: AttachedModel, kind: Kind, carry: Carry, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[list[list[Lesson]]] = []
    whole = infinite_icl.consolidate

    def remember(*arguments: Any, anchors: list[list[Lesson]], **options: Any) -> float:
        given.append(anchors)
        return whole(*arguments, anchors=anchors, **options)

    monkeypatch.setattr(infinite_icl, "consolidate", remember)
    recipe = {"kind": kind, "carry": carry, "continuations": 2, "anchors": 0, "passes": 3, "replay": 0.0}
    learner_of(model, 5, **recipe).learn(TEXT)
    parts = list(segments([TEXT], model.coder, 64))
    assert len(given) == len(parts) > 1
    for part, turns in zip(parts, given, strict=True):
        expected = Teacher(model).teach(continuations(part, Writer(model), 6, 5 + part.number), gain=False)
        found = [one for turn in turns for one in turn]
        assert [len(turn) for turn in turns] == [2, 2, 2]
        assert [one.pair for one in found] == [one.pair for one in expected]
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one.log_probs, other.log_probs, atol=1e-5, rtol=1e-5)


def test_each_pass_has_its_own_anchors_and_readings(
    model: AttachedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[list[list[Lesson]]] = []

    def remember(*_: Any, anchors: list[list[Lesson]], **__: Any) -> float:
        given.append(anchors)
        return 0.0

    monkeypatch.setattr(infinite_icl, "consolidate", remember)
    learner_of(model, carry="carried", anchors=3, readings=2, passes=4, generators=("cloze",)).learn(TEXT)
    assert len(given) > 1
    for turns in given:
        assert len(turns) == 4
        kinds = [[one.pair.generator for one in turn] for turn in turns]
        assert all(kind.count(READING) <= 2 and 1 <= kind.count(UNRELATED) <= 3 for kind in kinds)
        texts = [tuple(one.response) for turn in turns for one in turn if one.pair.generator == UNRELATED]
        assert len(set(texts)) == len(texts)
    every = [one for turns in given for turn in turns for one in turn]
    wide = {(one.pair.generator, one.tokens.shape[1] > 1) for one in every}
    assert wide == {(UNRELATED, True), (READING, False)}, "a distribution, and what the passage says"
    first, second = ([one for turn in turns for one in turn] for turns in given[:2])
    assert [x for x in first if x.pair.generator == UNRELATED] == [
        x for x in second if x.pair.generator == UNRELATED
    ]
    given.clear()
    learner_of(model, carry="carried", anchors=0, readings=0, passes=4, generators=("cloze",)).learn(TEXT)
    assert given and not any(turn for turns in given for turn in turns)


# --- errors, teachers, other models -------------------------------------------------------------------


def test_a_loss_that_is_not_finite_ends_it_with_the_segments_before_intact(
    model: AttachedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    stops: list[Progress] = []
    whole = consolidation.divergence

    def spoiled(*arguments: Any, **options: Any) -> Any:
        loss, gradient = whole(*arguments, **options)
        return (loss * torch.nan if stops else loss), gradient

    expected = learner_of(model, passes=2).learn(TEXT)
    with monkeypatch.context() as patch, pytest.raises(NumericalError):
        patch.setattr(consolidation, "divergence", spoiled)
        learner_of(model, passes=2).learn(TEXT, on_segment=stops.append)
    assert [stop.segment for stop in stops] == [1]
    assert all(tensor.isfinite().all() for tensor in stops[0].adapters[0].values())
    resumed = learner_of(model, passes=2).learn(TEXT, start=stops[0])
    assert same(resumed, expected) and resumed.account.tokens == expected.account.tokens


@pytest.mark.parametrize("words, teachers", [(BYTE_VOCAB,) * 2, (BYTE_VOCAB, 300), (300, BYTE_VOCAB)])
@pytest.mark.parametrize("teachers_bos", [True, False])
def test_another_model_may_teach_whatever_vocabularies_are_padded_to(
    words: int, teachers: int, teachers_bos: bool
) -> None:
    with (
        student_of(vocab_size=words) as model,
        student_of(seed=7, hidden_size=64, add_bos=teachers_bos, vocab_size=teachers) as teacher,
    ):
        settings = {"hidden_weight": 0.1, "segment_tokens": 512, "passes": 1}
        recipe = recipe_of(generators=("cloze", "text"), targets="soft", **settings)
        progress = InfiniteICL(model, recipe, teacher=teacher).learn(TEXT)
        assert len(progress.pool) == 2 * len(SENTENCES)
        for ours in progress.pool:
            assert ours.query[0] == 256, "the student reads its own start token"
            ids = [*teacher.coder.bos, *TEXT.encode(), *b"\n\n", *ours.query[1:], *ours.response]
            logs = plain_logits(teacher, ids)[-len(ours.response) - 1 : -1, :BYTE_VOCAB].log_softmax(-1)
            torch.testing.assert_close(ours.log_probs, logs.topk(64).values, atol=1e-3, rtol=1e-3)
            without = plain_logits(model, [*ours.query, *ours.response])[len(ours.query) - 1 : -1]
            without, tokens = without[:, :BYTE_VOCAB], torch.tensor(ours.response)[:, None]
            gain = (logs.gather(1, tokens) - without.log_softmax(-1).gather(1, tokens)).mean()
            assert ours.pair.gain == pytest.approx(float(gain), abs=1e-3)
            assert ours.hidden is None


def test_a_teacher_of_other_tokens_only_writes(model: AttachedModel) -> None:
    with student_of(seed=7, tokenizer=trained("gpt2"), vocab_size=1000) as teacher:
        recipe = recipe_of(generators=("cloze",), targets="soft", passes=1)
        assert same(
            InfiniteICL(model, recipe, teacher=teacher).learn(TEXT), InfiniteICL(model, recipe).learn(TEXT)
        )


CASES: dict[str, dict[str, Any]] = {
    "no start token": {"add_bos": False},
    "chat": {"chat": True},
    "local layers": {"family": "gemma3_text"},
    "packed": {"packed": True},
    "partial rotary": {"family": "gpt_neox"},
    "bias": {"family": "phi"},
}


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_any_model_learns(options: dict[str, Any]) -> None:
    with student_of(**options) as model:
        learner = InfiniteICL(model, recipe_of(generators=("text", "cloze", "continuation"), passes=4))
        steps: list[LearnProgress] = []
        progress = learner.learn(TEXT[:90], on_progress=steps.append)
        losses = [step.loss for step in steps if step.loss is not None and step.segment == 0]
        assert losses[-1] < 0.8 * losses[0]
        assert not any("lm_head" in name or "embed" in name for name in progress.adapters[0])
        assert all(pair.gain is not None and math.isfinite(pair.gain) for pair in progress.pairs)
