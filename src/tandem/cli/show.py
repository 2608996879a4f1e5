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
    from rich.console import Console

    from tandem.check.inputs import StageChat, StageData
    from tandem.check.show_record import Place


def show(argv: list[str]) -> int:
    """Print a record's tokens; exit code 2 when a run would drop it."""
    arguments = _parser().parse(argv)
    if not arguments.data and arguments.recipe is None:
        raise UserError("tandem show needs DATA or --recipe. See tandem show --help")
    if arguments.model is None and arguments.recipe is None and not arguments.text:
        raise UserError(
            "tandem show needs --model or --recipe, for tokens are those of a tokenizer; --text "
            "shows the turns alone"
        )
    if arguments.text:
        _require_used(arguments)
    from tandem.check.show_record import find_row
    from tandem.runtime.console import notice_console, result_console

    with TemporaryDirectory() as folder:
        recipe = recipe_of(arguments)
        asked, notices = data_of(arguments, recipe, Path(folder))
        data = _one(asked)
        for notice in notices:
            notice_console().print(notice, markup=False, soft_wrap=True)
        place = find_row(data.sources, data.plan.kind, arguments.file, arguments.row)
        console = result_console()
        format_name = f": {place.format_name}" if place.format else ""
        console.print(f"{place.row.origin}{format_name}", markup=False, soft_wrap=True)
        if arguments.text:
            _show_turns(console, place)
            return 0
        chat = chat_of(arguments, recipe)
        assert chat is not None
        _show_tokens(console, place, data, chat, ids=arguments.ids)
    return 0


def _require_used(arguments: argparse.Namespace) -> None:
    """Raise UserError for flags about tokens, where the turns alone are asked for."""
    unused = [name for name in ("model", "chat_template", "ids") if getattr(arguments, name)]
    if unused:
        names = " and ".join(f"--{name}" for name in unused)
        are = "is" if len(unused) == 1 else "are"
        raise UserError(
            f"--text shows the turns alone, for which {names} {are} of no use: leave out one or "
            "the other"
        )


def _one(found: Sequence[StageData]) -> StageData:
    if len(found) == 1:
        return found[0]
    names = ", ".join(data.stage for data in found)
    raise UserError(f"the data is that of several stages ({names}): name one with --stage")


def _show_turns(console: Console, place: Place) -> None:
    from tandem.check.show_page import print_turns
    from tandem.check.show_record import outcome, records_in

    records, entries = records_in(place)
    for entry in entries:
        console.print(outcome(entry), markup=False, soft_wrap=True)
    for number, record in enumerate(records, start=1):
        if len(records) > 1:
            console.print(f"\nrecord {number} of {len(records)}", highlight=False)
        print_turns(console, record)


def _show_tokens(
    console: Console, place: Place, data: StageData, chat: StageChat, *, ids: bool
) -> None:
    from tandem.check.inputs import require_context
    from tandem.check.show_page import print_encodings
    from tandem.check.show_record import encode_row, outcome, would_be_dropped
    from tandem.runtime.console import notice_console

    require_context(chat, data)
    for notice in chat.notices:
        notice_console().print(notice, markup=False, soft_wrap=True)
    found = encode_row(chat.chat, data.plan, place)
    limits = data.plan.limits
    said = (
        f"max_length {limits.sequence}"
        + (f", max_prompt_length {limits.prompt}" if limits.prompt is not None else "")
        if data.limited
        else "no limits; give --recipe to see what a run would cut"
    )
    lines = [f"tokenizer {chat.model}, template {chat.template}, {said}"]
    lines += map(outcome, found.entries)
    if not found.entries:
        lines.append("trained whole")
    for line in lines:
        console.print(line, markup=False, soft_wrap=True)
    if not found.examples:
        raise would_be_dropped(found.entries)
    print_encodings(console, found, ids=ids)


def _parser() -> Parser:
    parser = Parser(
        prog="tandem show",
        usage="tandem show DATA --row N (--model M | --recipe R | --text) [flags]",
        description="One record as a run would train it: the rendered text, and which tokens are "
        "prompt, trained,\nand shared by both answers of a pair. In a terminal in colours, "
        "elsewhere with a word before each line.",
    )
    add_inspected(parser)
    parser.add_argument(
        "--row",
        type=positive,
        required=True,
        metavar="N",
        help="counted from 1, as the ledger does",
    )
    parser.add_argument("--file", metavar="NAME", help="of several files, the one with the row")
    parser.add_argument("--ids", action="store_true", help="one token a line, with its id")
    parser.add_argument("--text", action="store_true", help="the turns alone, without a tokenizer")
    return parser
