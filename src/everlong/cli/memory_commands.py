"""``everlong memory …``: the memories on this machine, listed, shown, renamed, merged, exported, deleted."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from everlong.cli.options import Json, Quiet
from everlong.cli.terminal import is_interactive, notes, output, print_json
from everlong.errors import ConfigurationError
from everlong.models.files import human_bytes

if TYPE_CHECKING:
    from everlong.memory.folder import Memory
    from everlong.memory.store import MemoryStore

Name = Annotated[str, typer.Argument(metavar="NAME", help="A name from `everlong memory list`.")]
Replace = Annotated[bool, typer.Option("--replace", help="Delete a memory that has the new name already.")]

_SHOWN_PAIRS = 3


def register(app: typer.Typer) -> None:
    """Add the group to `app`."""
    group = typer.Typer(
        name="memory",
        help="List, show, merge, export and delete memories.",
        rich_markup_mode="markdown",
        no_args_is_help=True,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    group.command("list")(list_memories)
    group.command("show")(show)
    group.command("delete")(delete)
    group.command("rename")(rename)
    group.command("merge")(merge)
    group.command("export")(export)
    app.add_typer(group)


def list_memories(as_json: Json = False, quiet: Quiet = False) -> None:
    """List the memories on this machine, and those whose files are damaged."""
    store = _store()
    memories, broken = store.list(), store.broken()
    if as_json:
        print_json(
            {
                "folder": str(store.folder),
                "memories": [_as_json(memory) for memory in memories],
                "broken": [{"name": memory.name, "reason": memory.reason} for memory in broken],
            }
        )
        return
    if memories:
        table = Table(box=None, pad_edge=False, header_style="bold")
        right = ("rank", "tokens", "pairs", "on disk")
        for heading in ("name", "kind", "base model", *right, "recall", "created"):
            table.add_column(heading, justify="right" if heading in right else "left")
        for memory in memories:
            record = memory.record
            table.add_row(
                Text(memory.name),
                record.kind,
                Text(record.base_model),
                "" if record.rank is None else str(record.rank),
                f"{record.source.tokens:,}",
                f"{len(memory.pairs()):,}",
                human_bytes(memory.bytes),
                _recall(memory),
                record.created[:10],
            )
        output().print(table)
    for damaged in broken:
        line = Text(f"{damaged.name} is broken: {damaged.reason}", style="red")
        output().print(line, soft_wrap=True)
    kept = f"kept in {store.folder}" if memories or broken else f"there are no memories in {store.folder}"
    notes(quiet=quiet).print(f"{kept} (EVERLONG_HOME)", style="dim", soft_wrap=True, markup=False)


def show(name: Name, as_json: Json = False, quiet: Quiet = False) -> None:
    """Show what is known about a memory: its source, how it was made, what it recalls, who can serve it."""
    from everlong.memory.compatible import check_vllm

    memory = _store().get(name)
    record, pairs = memory.record, memory.pairs()
    problems = check_vllm(memory.path, record.base_model)
    if as_json:
        print_json({**_as_json(memory), "not_served_by_vllm": list(problems)})
        return
    values = ", ".join(f"{key} {value}" for key, value in record.recipe.values.items())
    rows = {
        "name": memory.name,
        "kind": record.kind if record.rank is None else f"{record.kind}, rank {record.rank}",
        "base model": f"{record.base_model} (weights {record.base_hash[:12]})",
        "source": f"{record.source.tokens:,} tokens, {record.source.characters:,} characters, "
        f"{record.segments:,} segment{'s'[: record.segments != 1]} (SHA-256 {record.source.sha256[:12]})",
        "recipe": f"{record.recipe.name}: {values}" if values else record.recipe.name,
        "worth": _worth(record.measured) or "not measured",
        "coverage": _coverage(record.measured) or "not measured",
        "recall": _recall(memory) or "not measured",
        "learned in": f"{record.seconds:,.0f} s, {record.created}",
        "files": f"{memory.path} ({human_bytes(memory.bytes)})",
        "vLLM": "not as it is: " + "; ".join(problems)
        if problems
        else f"serves it as it is, started with the model {record.base_model}",
    }
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for heading, value in rows.items():
        table.add_row(heading, Text(value))
    output().print(table)
    console = notes(quiet=quiet)
    console.print(f"\n{len(pairs):,} pairs{', among them:' if pairs else ''}", style="dim")
    for pair in pairs[:_SHOWN_PAIRS]:
        line = " ".join(f"{pair.query} → {pair.response}".split())
        console.print(line, style="dim", markup=False, soft_wrap=True)


def delete(
    name: Name,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Delete a memory, sound or broken: its weights, its pairs, all of it. There is no way back."""
    store = _store()
    store.path(name)
    if not yes and not _agreed(name):
        notes(quiet=quiet).print(f"{name} is kept", markup=False)
        if as_json:
            print_json({"deleted": None, "bytes": 0})
        return
    freed = store.delete(name)
    if as_json:
        print_json({"deleted": name, "bytes": freed})
        return
    notes(quiet=quiet).print(f"deleted {name}: {human_bytes(freed)} freed", markup=False)


def rename(
    old: Annotated[str, typer.Argument(metavar="OLD", help="A name from `everlong memory list`.")],
    new: Annotated[str, typer.Argument(metavar="NEW", help="The name it is to have.")],
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Give a memory another name."""
    _tell(_store().rename(old, new), f"{old} is now called {new}", as_json, quiet)


def merge(
    names: Annotated[list[str], typer.Argument(metavar="NAMES…", help="Two memories or more. They stay.")],
    into: Annotated[str, typer.Option("--into", metavar="NEW", help="The name of the new memory.")],
    weights: Annotated[
        str | None,
        typer.Option(
            "--weights", metavar="W,W,…", help="What the effect of each is multiplied with (default: 1 each)."
        ),
    ] = None,
    replace: Replace = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Combine memories of one base model into a new one, whose effect is the weighted sum of theirs.

    Exact up to a joint rank of 128; above that the best approximation of rank 128 is kept, and its error
    told.
    """
    memory = _store().merge(names, into, weights=_numbers(weights, len(names)), replace=replace)
    values = memory.record.recipe.values
    how = "exactly" if values["method"] == "cat" else f"with a relative error of {values['error']:.2%}"
    _tell(
        memory,
        f"{' and '.join(names)} are merged into {into} {how}, rank {memory.record.rank}",
        as_json,
        quiet,
    )


def export(
    name: Name,
    path: Annotated[str, typer.Argument(metavar="PATH", help="A folder that does not exist yet.")],
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Copy the folder of a memory, which PEFT, vLLM and SGLang read as it is.

    No GGUF for llama.cpp is written.
    """
    target = _store().export(name, path)
    if as_json:
        print_json({"name": name, "path": str(target)})
        return
    notes(quiet=quiet).print(f"{name} is copied to {target}", markup=False, soft_wrap=True)


def _store() -> MemoryStore:
    from everlong.memory.store import MemoryStore

    return MemoryStore()


def _agreed(name: str) -> bool:
    if not is_interactive():
        raise ConfigurationError(
            f"deleting {name!r} is to be confirmed, and there is no terminal to ask in; "
            f"run: everlong memory delete {name} --yes"
        )
    return typer.confirm(f"Delete {name} for good?", err=True)


def _numbers(weights: str | None, count: int) -> list[float] | None:
    if weights is None:
        return None
    try:
        numbers = [float(weight) for weight in weights.split(",")]
    except ValueError as error:
        raise ConfigurationError(
            f"--weights takes numbers with commas between them, such as 1,0.5; got {weights!r}"
        ) from error
    if len(numbers) != count:
        raise ConfigurationError(f"--weights has {len(numbers)} numbers for {count} memories; give one each")
    return numbers


def _tell(memory: Memory, message: str, as_json: bool, quiet: bool) -> None:
    if as_json:
        print_json(_as_json(memory))
    else:
        notes(quiet=quiet).print(message, markup=False, soft_wrap=True)


def _recall(memory: Memory) -> str:
    return ", ".join(f"{share:.0%} {name}" for name, share in (memory.record.recall or {}).items())


def _worth(measured: dict[str, Any] | None) -> str:
    """Say what the text was worth to the model, by kind of pair."""
    lines = []
    for kind, worth in (measured or {}).get("worth", {}).items():
        line = f"{kind}: {worth['gain']:.2f} nats per token"
        if "gain_low" in worth:
            line += f" ({worth['gain_low']:.2f} to {worth['gain_high']:.2f})"
        line += f" of {worth['pairs']:,} pairs"
        if "asked" in worth:
            line += f", {worth['reading']} of {worth['asked']} answered reading, {worth['without']} without"
        lines.append(line)
    return "\n".join(lines)


def _coverage(measured: dict[str, Any] | None) -> str:
    if not measured or "sentences" not in measured:
        return ""
    return f"{measured['sentences'] - measured['uncovered']:,} of {measured['sentences']:,} sentences"


def _as_json(memory: Memory) -> dict[str, Any]:
    return {
        **asdict(memory.record),
        "path": str(memory.path),
        "bytes_on_disk": memory.bytes,
        "pairs": len(memory.pairs()),
    }
