"""`tandem show DATA --row N`: one record as a run would train it, token by token."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from tandem.cli.inspected_data import add_inspected, chat_of, data_of, recipe_of
from tandem.cli.parser import Parser, positive
from tandem.errors import UserError

if TYPE_CHECKING:
    from tandem.check.survey_result import CheckTarget


def show(argv: list[str]) -> int:
    """Print a record's tokens; exit code 2 when a run would drop it."""
    arguments = _parser().parse(argv)
    if not arguments.data and arguments.recipe is None:
        raise UserError("tandem show needs DATA or --recipe. See tandem show --help")
    if arguments.model is None and arguments.recipe is None and not arguments.text:
        raise UserError(
            "tandem show needs --model or --recipe, whose tokenizer makes the tokens; --text "
            "shows the turns alone"
        )
    if arguments.text:
        _require_used(arguments)
    from tandem.check.show_page import show_tokens, show_turns
    from tandem.check.show_record import find_row
    from tandem.runtime.console import notice_console, result_console

    with TemporaryDirectory() as folder:
        recipe = recipe_of(arguments)
        targets, notices = data_of(arguments, recipe, Path(folder))
        target = _one(targets)
        for notice in notices:
            notice_console().print(notice, markup=False, soft_wrap=True)
        place = find_row(target.sources, target.options.kind, arguments.file, arguments.row)
        console = result_console()
        format_name = f": {place.format_name}" if place.format else ""
        console.print(f"{place.row.origin}{format_name}", markup=False, soft_wrap=True)
        if arguments.text:
            show_turns(console, place)
            return 0
        chat = chat_of(arguments, recipe)
        assert chat is not None
        show_tokens(console, place, target, chat, ids=arguments.ids)
    return 0


def _require_used(arguments: argparse.Namespace) -> None:
    """Raise UserError for flags about tokens if only the turns are asked for."""
    unused = [name for name in ("model", "chat_template", "ids") if getattr(arguments, name)]
    if unused:
        names = " and ".join(f"--{name}" for name in unused)
        are = "is" if len(unused) == 1 else "are"
        raise UserError(
            f"--text shows the turns alone, and {names} {are} about tokens: leave out one or the "
            "other"
        )


def _one(targets: Sequence[CheckTarget]) -> CheckTarget:
    if len(targets) == 1:
        return targets[0]
    names = ", ".join(str(target.stage) for target in targets)
    raise UserError(f"the data belongs to several stages ({names}): name one with --stage")


def _parser() -> Parser:
    parser = Parser(
        prog="tandem show",
        usage="tandem show DATA --row N (--model M | --recipe R | --text) [flags]",
        description="One record as a run would train it: the rendered text, and which tokens are "
        "prompt, trained,\nand shared by both answers of a pair. In a terminal in colours, "
        "elsewhere with a word before each line.",
    )
    add_inspected(parser)
    add = parser.add_argument
    add(
        "--row", type=positive, required=True, metavar="N", help="Counted from 1, as in the ledger."
    )
    add("--file", metavar="NAME", help="Of several files, the one with the row.")
    add("--ids", action="store_true", help="Print one token a line, with its id.")
    add("--text", action="store_true", help="Print the turns alone, without a tokenizer.")
    return parser
