"""``everlong methods``: which ways to read and to learn there are, and what can be set of each."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any

import typer

from everlong.cli.described import Description, described
from everlong.cli.options import ATTENTION_DEFAULT, RECIPE_DEFAULT, Json
from everlong.cli.terminal import output, print_json

if TYPE_CHECKING:
    from everlong.registry import Registry

_KINDS = {
    "attention": "--attention NAME --set KEY=VALUE: demo, read, chat, ask, generate, bench speed; elsewhere "
    "--methods NAME,NAME",
    "reading": "ask --method NAME --set KEY=VALUE: for a question that is known before the text",
    "recipe": "memorize --recipe NAME --set KEY=VALUE, elsewhere --recipe-set: how memories are made",
    "generator": "memorize --set generators=NAME,NAME: what a recipe asks about the text",
}
_DEFAULTS = (ATTENTION_DEFAULT, RECIPE_DEFAULT)


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command("methods")(methods)


def methods(
    name: Annotated[
        str | None,
        typer.Argument(metavar="[NAME]", help="One of the list, or a Python file that registers a policy."),
    ] = None,
    as_json: Json = False,
) -> None:
    """List the ways to read and to learn; of one, what it does and what can be set of it."""
    known = _known()
    if name is None:
        found = {kind: [_named(kind, some, each) for each in some] for kind, some in known.items()}
        if as_json:
            print_json({kind: [one.as_json() for one in some] for kind, some in found.items()})
        else:
            _list(found)
        return
    kind, one = _looked_up(known, name)
    if as_json:
        print_json({"kind": kind, **one.as_json()})
    else:
        _show(kind, one)


def _known() -> dict[str, Registry[Any]]:
    from everlong.attention import POLICIES
    from everlong.memory.elicitation import GENERATORS
    from everlong.memory.recipes import RECIPES
    from everlong.reading.outside import READING_METHODS

    return dict(zip(_KINDS, (POLICIES, READING_METHODS, RECIPES, GENERATORS), strict=True))


def _looked_up(known: dict[str, Registry[Any]], name: str) -> tuple[str, Description]:
    """Return which kind a name is of, and what is known of it."""
    from everlong.cli.policy_files import method_name
    from everlong.registry import unknown_name

    name = method_name(name)
    for kind, some in known.items():
        if name in some:
            return kind, _named(kind, some, name)
    raise unknown_name("method", name, sorted(each for some in known.values() for each in some))


def _named(kind: str, some: Registry[Any], name: str) -> Description:
    """Describe an entry; one that is an instance is told from others of its class by what it sets."""
    one = dataclasses.replace(described(some[name]), name=name)
    if kind == "generator":  # recipes know them by their names alone
        return dataclasses.replace(one, options=())
    if isinstance(some[name], type):
        return one
    usual = {option.name: option for option in described(type(some[name])).options}
    own = [f"{option.name}={option.shown_default}" for option in one.options if option != usual[option.name]]
    return dataclasses.replace(one, title=", ".join(own) or "the usual settings")


def _list(found: dict[str, list[Description]]) -> None:
    from rich.table import Table

    for kind, some in found.items():
        table = Table(box=None, pad_edge=False, show_header=False)
        table.add_column(no_wrap=True)
        table.add_column()
        for one in some:
            table.add_row(one.name + " (default)" * (one.name in _DEFAULTS), one.title)
        output().print(_KINDS[kind], style="bold", markup=False)
        output().print(table, markup=False)
        output().print()
    output().print("everlong methods NAME tells what can be set", style="dim")


def _show(kind: str, one: Description) -> None:
    from rich.table import Table

    output().print(f"{one.name}  ({_KINDS[kind].partition(':')[0]})\n", style="bold", markup=False)
    for paragraph in (one.title, *one.text):
        output().print(paragraph + "\n", markup=False)
    if not one.options:
        output().print("nothing can be set of it", style="dim")
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("KEY", "default", ""):
        table.add_column(heading, no_wrap=bool(heading))
    for option in one.options:
        table.add_row(option.name, option.shown_default, option.text)
    output().print(table, markup=False)
