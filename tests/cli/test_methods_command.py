"""``everlong methods`` lists what there is, and tells of each what can be set."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from dataclasses import dataclass, field

import pytest

from everlong.attention import POLICIES, InfLLM
from everlong.cli.app import run
from everlong.cli.described import described
from everlong.memory.elicitation import GENERATORS
from everlong.memory.recipes import RECIPES, Recipe
from everlong.reading.outside import READING_METHODS


@dataclass(frozen=True)
class Known:
    """What is known: of a :class:`~everlong.attention.Policy`, and ``code``.

    More of it,
    over lines.

    Parameters
    ----------
    one, two : int
        Both of `them`,
        in words.
    words : tuple of str
        None : that is no entry.

    Returns
    -------
    three : int
        No option.
    """

    one: int = 1
    two: int | None = None
    words: tuple[str, ...] = field(default_factory=lambda: ("a", "b"))
    is_so: bool = False
    three: int = field(default=3, init=False)


def test_a_docstring_is_taken_apart():
    found = described(Known)
    assert (found.name, found.title) == ("Known", "What is known: of a Policy, and code.")
    assert found.text == ("More of it, over lines.",)
    assert [(option.name, option.shown_default, option.text) for option in found.options] == [
        ("one", "1", "Both of them, in words."),
        ("two", "none", "Both of them, in words."),
        ("words", "a,b", "None : that is no entry."),
        ("is_so", "false", ""),
    ]
    assert [option.shown_default for option in described(Known(one=0, is_so=True)).options][::3] == [
        "0",
        "true",
    ]


def test_where_nothing_is_said_no_signature_is_shown():
    @dataclass(frozen=True)
    class Silent:
        one: int = 1

    assert described(Silent).title == "Nothing is said of it."


@pytest.mark.parametrize("some", [POLICIES, READING_METHODS, RECIPES], ids=lambda some: some.kind)
def test_every_option_of_what_is_registered_is_explained(some):
    for name in some:
        if isinstance(some[name], type) and not some[name].__module__.startswith("everlong."):
            continue  # another test's
        found = described(some[name])
        assert [option.name for option in found.options if not option.text] == [], name
        kind = some[name] if isinstance(some[name], type) else type(some[name])
        section = re.split(r"Parameters\n-+\n|Attributes\n-+\n", inspect.cleandoc(kind.__doc__))[1:]
        entries = [line for part in section for line in part.splitlines() if line[:1].strip()]
        assert [line for line in entries if " : " not in line] == [], name


def test_all_there_is_is_listed(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    assert run(["methods"]) == 0
    shown = capsys.readouterr().out
    listed = [line.split()[0] for line in shown.splitlines() if line and not line.startswith(" ")]
    for some in (POLICIES, READING_METHODS, RECIPES, GENERATORS):
        assert {*some} <= {*listed}
    assert "recall (default)" in shown and "infinite-icl (default)" in shown
    assert "anchors=24, ewc=0.0, kind=cartridge" in shown, "recipes are told apart by what they set"


def test_of_one_it_tells_what_can_be_set(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    assert run(["methods", "inf-llm"]) == 0
    shown = capsys.readouterr().out
    assert "--attention NAME --set KEY=VALUE" in shown and "arXiv 2402.04617" in shown
    for option in dataclasses.fields(InfLLM):
        (row,) = (line for line in shown.splitlines() if line.startswith(f"{option.name} "))
        assert row.split()[1] == str(option.default).lower()


def test_as_json(capsys):
    assert run(["methods", "cartridge", "--json"]) == 0
    one = json.loads(capsys.readouterr().out)
    assert (one["kind"], one["name"]) == ("recipe", "cartridge")
    options = {option["name"]: option["default"] for option in one["options"]}
    assert options["kind"] == "cartridge" and [*options] == [each.name for each in dataclasses.fields(Recipe)]
    assert run(["methods", "--json"]) == 0
    every = json.loads(capsys.readouterr().out)
    assert [*every] == ["attention", "reading", "recipe", "generator"]
    assert [one["name"] for one in every["attention"]] == [*POLICIES]
    assert one in [{"kind": "recipe", **each} for each in every["recipe"]]
    assert not any(each["options"] for each in every["generator"]), "recipes know them by name alone"


def test_a_generator_is_explained_with_nothing_to_set(capsys):
    assert run(["methods", "cloze"]) == 0
    assert "nothing can be set of it" in capsys.readouterr().out


def test_of_a_file_it_tells_what_the_policy_takes(capsys, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from dataclasses import dataclass\n"
        "from everlong.attention import POLICIES, LMInfinite\n"
        "@POLICIES.register('told-by-a-file')\n"
        "@dataclass(frozen=True)\n"
        "class Mine(LMInfinite):\n"
        '    """One of my own.\n\n    Parameters\n    ----------\n'
        '    window : int\n        Of [layers], and [/].\n    """\n'
    )
    try:
        assert run(["methods", str(path)]) == 0
    finally:
        POLICIES._entries.pop("told-by-a-file", None)
    shown = capsys.readouterr().out
    assert "told-by-a-file" in shown and "One of my own." in shown and "Of [layers], and [/]." in shown


@pytest.mark.parametrize(("name", "told"), [("infllm", "did you mean 'inf-llm'"), ("liftt", "'lift'")])
def test_a_name_that_is_none_is_told_what_is_near(capsys, name, told):
    assert run(["methods", name]) == 2
    assert told in capsys.readouterr().err
