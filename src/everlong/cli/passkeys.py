"""``everlong bench passkey`` and ``niah``: which methods find a number, or a sentence, in a long text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from everlong.cli.finding import SOME_METHODS, FindingOptions, find_and_show, token_counts
from everlong.cli.options import MethodOptions, ModelOptions, OutputOptions, TierOptions
from everlong.errors import ConfigurationError

if TYPE_CHECKING:
    from everlong.evaluation.tasks import Task


def passkey(
    model: ModelOptions,
    method: MethodOptions,
    finding: FindingOptions,
    tier: TierOptions,
    output_options: OutputOptions,
    digits: Annotated[str, typer.Option("--digits", metavar="N,N,…", help="Of a passkey.")] = "7,64",
    text: Annotated[
        str | None,
        typer.Option(
            "--text",
            metavar="FILE",
            help="Hide it in this text, instead of sentences that say nothing; library: in Python's own "
            "sources.",
        ),
    ] = None,
    question: Annotated[
        str | None,
        typer.Option(
            "--question",
            metavar="TEXT",
            help='Asked before "The passkey is", instead of: Which number is the passkey?',
        ),
    ] = None,
) -> None:
    """Hide a number in a long text, and ask for it at the end.

    Every method reads the same texts, and the question only after them. The window has 2,048 tokens, unless
    `--set` says otherwise. Found is a number that is told whole; beside it stands which share of its digits
    was told before the first mistake. Ctrl-C shows what was measured until then; with `--output` the same
    command goes on from there.
    """

    def make_tasks() -> list[Task]:
        from everlong.evaluation.needles import PASSKEY_QUESTION, Passkey

        asked = PASSKEY_QUESTION if question is None else question
        return [Passkey(text, count, asked) for count in token_counts("--digits", digits)]

    find_and_show(model, method, finding, tier, output_options, make_tasks, methods=SOME_METHODS)


def niah(
    model: ModelOptions,
    method: MethodOptions,
    finding: FindingOptions,
    tier: TierOptions,
    output_options: OutputOptions,
    text: Annotated[
        str,
        typer.Option(
            "--text", metavar="FILE", help="Hide it in this text; library: in Python's own sources."
        ),
    ] = "library",
    needle: Annotated[
        str | None, typer.Option("--needle", metavar="TEXT", help="The sentence that is hidden.")
    ] = None,
    question: Annotated[
        str | None, typer.Option("--question", metavar="TEXT", help="What is asked at the end.")
    ] = None,
    answer: Annotated[
        str | None, typer.Option("--answer", metavar="TEXT", help="What the model's answer is to contain.")
    ] = None,
    begun: Annotated[
        str | None,
        typer.Option(
            "--lead",
            metavar="TEXT",
            help="How the answer begins, which the model is given: for small ones, which go on with a text "
            "rather than answer.",
        ),
    ] = None,
) -> None:
    """Hide a sentence of your own in a text of your own, and ask for it at the end.

    Without `--needle` it is one about a lighthouse keeper. Every method reads the same texts, and the
    question only after them. The window has 2,048 tokens, unless `--set` says otherwise. Ctrl-C shows what
    was measured until then; with `--output` the same command goes on from there.
    """
    own = {"needle": needle, "question": question, "answer": answer}
    if any(own.values()) and not all(own.values()):
        missing = " and ".join(f"--{name}" for name, value in own.items() if not value)
        raise ConfigurationError(f"a needle goes with its question and its answer: {missing} is missing")
    if needle and answer and answer.casefold() not in needle.casefold():
        raise ConfigurationError(f"the needle does not say {answer!r}: nobody could find that in the text")

    def make_tasks() -> list[Task]:
        from everlong.evaluation.needles import SentenceInText

        given = {name: value for name, value in own.items() if value is not None}
        return [SentenceInText(text, lead=begun, **given)]

    find_and_show(model, method, finding, tier, output_options, make_tasks, methods=SOME_METHODS)
