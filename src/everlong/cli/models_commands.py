"""``everlong models | pull | remove``: which models there are, and which of them are on this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from everlong.cli.options import Json, Quiet
from everlong.cli.terminal import is_interactive, notes, output, print_json, pull_progress
from everlong.errors import ModelFileError
from everlong.models.catalogue import CATALOGUE, DEFAULT_MODEL
from everlong.models.files import human_bytes

if TYPE_CHECKING:
    from everlong.models.store import ModelState, Store

Name = Annotated[str, typer.Argument(metavar="NAME", help="A name from `everlong models`.")]


def register(app: typer.Typer) -> None:
    """Add the commands to `app`."""
    app.command("models")(models)
    app.command("pull")(pull)
    app.command("remove")(remove)


def models(
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            metavar="NAME|PATH|HUB-ID",
            help="Load this one and say what each choice of --weights takes.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """List the models that can be named, with size, licence and whether they are on this machine."""
    from rich.table import Table

    if model is not None:
        _weights(model, as_json)
        return
    store = _store()
    states, conversions = store.states(), store.conversions()
    if as_json:
        print_json(
            {
                "home": str(store.home),
                "models": [_as_json(state) for state in states],
                "conversions": [{"name": name, "bytes_on_disk": size} for name, size in conversions.items()],
            }
        )
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("name", "size", "context", "licence", "state", "on disk"):
        table.add_column(heading, justify="right" if heading in ("size", "context", "on disk") else "left")
    for state in states:
        entry = state.entry
        table.add_row(
            f"{entry.name} (default)" if entry.name == DEFAULT_MODEL else entry.name,
            human_bytes(entry.download_size),
            f"{entry.context:,}",
            entry.licence,
            state.state,
            human_bytes(state.bytes) if state.bytes else "",
        )
    for name, size in conversions.items():
        table.add_row(f"{name} (from a .gguf file)", "", "", "", "ready", human_bytes(size))
    output().print(table)
    output().print()
    for state in states:
        kind = "a chat model" if state.entry.chat else "a base model"
        output().print(f"{state.entry.name}: {kind}, for {state.entry.good_for}", style="dim", markup=False)
    output().print(f"\nkept in {store.home} (EVERLONG_HOME)", style="dim", soft_wrap=True)


def pull(
    name: Name = DEFAULT_MODEL,
    accept_terms: Annotated[
        bool, typer.Option("--accept-terms", help="Accept the model's licence without being asked.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Fetch a model, check it and convert it; goes on where an interrupted pull stopped."""
    store = _store()
    _see_to_terms(store, name, accept_terms)
    with pull_progress(quiet=quiet) as progress:
        path = store.pull(name, progress=progress)
    notes(quiet=quiet).print(
        f"{name} is ready: {human_bytes(store.state(name).bytes)} in {path.parent}", soft_wrap=True
    )


def remove(
    name: Annotated[str, typer.Argument(metavar="NAME", help="As `everlong models` lists it.")],
    quiet: Quiet = False,
) -> None:
    """Delete a model from this machine, its GGUF and its conversion."""
    freed = _store().remove(name)
    message = f"removed {name}: {human_bytes(freed)} freed" if freed else f"{name} was not on this machine"
    notes(quiet=quiet).print(message)


def _store() -> Store:
    from everlong.models.store import Store

    return Store()


def _see_to_terms(store: Store, name: str, accept: bool) -> None:
    """Have the licence accepted where one asks for it: by the flag, or by asking once in a terminal."""
    entry = CATALOGUE[name]
    if entry.terms is None or store.terms_accepted(name):
        return
    if accept:
        store.accept_terms(name)
        return
    if not is_interactive():
        raise ModelFileError(
            f"{name} comes under the {entry.licence}, to be accepted once, and there is no terminal "
            f"to ask in; read them at {entry.terms.url} and run: everlong pull {name} --accept-terms"
        )
    console, text = notes(), store.terms_text(name)
    console.print(f"{entry.title}: {entry.terms.notice}.", soft_wrap=True)
    while True:
        answer = (
            typer.prompt("Do you accept these terms? yes, no, or show to read them", err=True).strip().lower()
        )
        if answer in ("yes", "y"):
            store.accept_terms(name)
            return
        if answer in ("no", "n"):
            raise ModelFileError(f"{name} is not fetched: its terms were not accepted")
        if answer in ("show", "s"):
            console.print(text, markup=False)


def _weights(name: str, as_json: bool) -> None:
    """Show the bytes of each way to keep a model's weights, and which one "auto" is."""
    from rich.table import Table

    with pull_progress(quiet=as_json) as progress:
        from everlong.models.loading import load_model
        from everlong.models.packed_weights import kernels_missing
        from everlong.models.packing import MOST_ROWS, bytes_of, choose_weights

        model = load_model(name, progress=progress).model
    auto = choose_weights(model, "auto")
    given = sum(parameter.nbytes for parameter in model.parameters())
    missing = kernels_missing() or (
        "" if bytes_of(model, "int8") else "not on the CPU in float32 or bfloat16"
    )
    extra = {"float": 0, "int8": bytes_of(model, "int8"), "int4": bytes_of(model, "int4")}
    if as_json:
        print_json(
            {"model": name, "weights": given, "packed": extra, "auto": auto, "missing": missing or None}
        )
        return
    if missing:
        output().print(f"{name}: {human_bytes(given)}; its weights cannot be packed here: {missing}")
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("--weights", "float weights", "packed copy", "together"):
        table.add_column(heading, justify="left" if heading == "--weights" else "right")
    for kind, packed in extra.items():
        shown = f"{kind} (auto)" if kind == auto else kind
        table.add_row(
            shown, *(human_bytes(count) if count else "" for count in (given, packed, given + packed))
        )
    output().print(table)
    output().print(
        f"\nthe packed copy is read in forwards of up to {MOST_ROWS} rows, as in writing", style="dim"
    )


def _as_json(state: ModelState) -> dict[str, object]:
    entry = state.entry
    return {
        "name": entry.name,
        "title": entry.title,
        "default": entry.name == DEFAULT_MODEL,
        "state": state.state,
        "bytes_to_fetch": entry.download_size,
        "bytes_on_disk": state.bytes,
        "context": entry.context,
        "licence": entry.licence,
        "terms": entry.terms.url if entry.terms else None,
        "chat": entry.chat,
        "good_for": entry.good_for,
    }
