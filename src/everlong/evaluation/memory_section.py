"""What the report says of the long-term memory: recall by what the model had, and what was forgotten."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from everlong.evaluation.finding_pictures import draw_shares
from everlong.evaluation.forgetting import Standing
from everlong.evaluation.measures import Picture, Section, Table
from everlong.evaluation.probes import Probe
from everlong.evaluation.recall import Answered, Recall
from everlong.evaluation.statistics import Interval
from everlong.models.files import human_bytes

ALONE = "no memory"
WHOLE = "no memory, reading the whole text"
SHOWN = f"{WHOLE}, behind examples"
OWN = "the memory"
OTHER = "a memory of another document"

_NOTE = (
    "The model is asked as sessions ask, with none of the methods, and with nothing before the question but "
    "what is named: the text, and behind examples also another text before it, with questions and answers "
    "that show what an answer looks like; a memory is given none. An answer is right if its first words are; "
    "beside stands how many have it anywhere. A memory's own pairs are what it learned by heart; invented "
    "facts are asked in other words too, and in reverse (the person for the fact). Forgetting is what a "
    "memory costs where it has nothing to tell: the loss on {text}, in nats a token, and words left out of "
    "it. Intervals are of 95 %, differences are paired."
)


def memory_section(name: str, rows: Sequence[dict[str, Any]]) -> Section:
    """Return the section of a measure of memories.

    Parameters
    ----------
    name : str
        Of the measure.
    rows : sequence of dict
        As its steps give them: ``recalls`` by what the model had, ``about`` what; ``standing`` on an
        unrelated text. The first is the standing of the model as it is.
    """
    recalls = _gathered(rows)
    tables: list[Table] = []
    pictures: list[Picture] = []
    for about, by_what in recalls.items():
        title = f"recall of {about}"
        tables.append(_recall_table(title, by_what))
        bars = [(what, found.accuracy()) for what, found in by_what.items()]
        pictures.append(Picture(lambda dark, b=bars, t=title: draw_shares(b, t, dark=dark), title))  # type: ignore[misc]
    before, learned = rows[0]["standing"], [row for row in rows[1:] if "standing" in row]
    if learned:
        tables.append(_forgetting_table(before, learned))
        tables.append(_cost_table(learned))
    tables += [_answers(about, by_what) for about, by_what in recalls.items()]
    values = {
        "recall": {
            about: {what: _counted(found) for what, found in by_what.items()}
            for about, by_what in recalls.items()
        },
        "forgetting": [
            {
                "memory": row["memory"],
                **_losses(before, row["standing"]),
                "learned": row["learned"],
            }
            for row in learned
        ],
    }
    note = _NOTE.format(text=before["text"])
    title = "Long-term memory"
    return Section(name, title, note, tuple(tables), tuple(pictures), values, has_ways=False)


def _gathered(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Recall]]:
    """Return answers by what they are about and what the model had, those of all documents together."""
    found: dict[str, dict[str, Recall]] = {}
    for row in rows:
        for what, answers in row.get("recalls", {}).items():
            by_what = found.setdefault(row["about"], {})
            by_what[what] = by_what.get(what, Recall(())) + recall_of(answers)
    return found


def recall_of(answers: Sequence[dict[str, Any]]) -> Recall:
    """Return answers as they were before they were kept."""
    return Recall(
        tuple(
            Answered(Probe(each["prompt"], tuple(each["answers"]), each["form"]), each["written"])
            for each in answers
        )
    )


def _recall_table(caption: str, by_what: dict[str, Recall]) -> Table:
    forms = list(dict.fromkeys(form for found in by_what.values() for form in found.forms))
    rows = []
    for what, found in by_what.items():
        cells = [_percent(found.accuracy(form)) if form in found.forms else "" for form in forms]
        alone = by_what.get(ALONE)
        is_same = alone is not None and [a.probe for a in alone.answered] == [a.probe for a in found.answered]
        gain = _points(found.above(alone)) if alone is not None and is_same and what != ALONE else ""
        anywhere = f"{found.accuracy(lenient=True).mean:.0%}"
        asked = str(len(found.answered))
        rows.append((what, *cells, _percent(found.accuracy()), anywhere, asked, gain))
    return Table(caption, ("", *forms, "all", "anywhere", "asked", "above no memory"), tuple(rows))


def _standing(kept: dict[str, Any]) -> Standing:
    return Standing(torch.tensor(kept["surprisal"]), recall_of(kept["task"]))


def _losses(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    was, now = _standing(before), _standing(after)
    change, words = now.loss_above(was), now.accuracy_above(was)
    return {
        "loss_before": was.loss.mean,
        "loss_after": now.loss.mean,
        "loss_change": [change.mean, *_ends(change)],
        "words_before": was.recall.accuracy().mean,
        "words_after": now.recall.accuracy().mean,
        "words_change": [words.mean, words.low, words.high],
    }


def _ends(interval: Interval) -> list[float | None]:
    return [end if interval.samples > 1 else None for end in (interval.low, interval.high)]


def _forgetting_table(before: dict[str, Any], learned: Sequence[dict[str, Any]]) -> Table:
    rows = []
    for row in learned:
        was, now = _standing(before), _standing(row["standing"])
        change = now.loss_above(was)
        rows.append(
            (
                row["memory"],
                f"{was.loss.mean:.3f}",
                f"{now.loss.mean:.3f}",
                f"{change.mean:+.3f} ({change.low:+.3f} to {change.high:+.3f})",
                _percent(was.recall.accuracy()),
                _percent(now.recall.accuracy()),
                _points(now.accuracy_above(was)),
            )
        )
    headings = ("", "loss before", "after", "change", "words left out, before", "after", "change")
    return Table(f"forgetting, on {before['text']}", headings, tuple(rows))


def _cost_table(learned: Sequence[dict[str, Any]]) -> Table:
    rows = tuple(
        (
            row["memory"],
            account["kind"],
            f"{account['tokens']:,}",
            f"{account['pairs']:,}",
            f"{account['seconds']:,.0f}",
            human_bytes(account["bytes"]),
        )
        for row in learned
        for account in (row["learned"],)
    )
    headings = ("", "kind", "tokens of text", "pairs", "seconds to learn", "on disk")
    return Table("what the memories took", headings, rows)


def _answers(about: str, by_what: dict[str, Recall]) -> Table:
    rows = tuple(
        (
            what,
            each.probe.form,
            "yes" if each.is_right else "no",
            each.probe.prompt,
            each.probe.answers[0],
            each.text,
        )
        for what, found in by_what.items()
        for each in found.answered
    )
    headings = ("", "form", "right", "asked", "answer", "written")
    return Table(f"Every answer about {about}", headings, rows, is_detail=True, text_from=3)


def _counted(found: Recall) -> dict[str, Any]:
    every = found.accuracy()
    return {
        "all": {"right": found.right, "of": every.samples, "low": every.low, "high": every.high},
        **found.as_json(),
    }


def _percent(share: Interval) -> str:
    return f"{share.mean:.0%} ({share.low:.0%}-{share.high:.0%})"


def _points(change: Interval) -> str:
    return f"{100 * change.mean:+.0f} ({100 * change.low:+.0f} to {100 * change.high:+.0f})"
