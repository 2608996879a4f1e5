"""`tandem check DATA [--recipe R]`: what is in a data set, before anything is trained."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from tandem import __version__
from tandem.cli.inspected_data import add_inspected, chat_of, data_of, recipe_of
from tandem.cli.parser import Parser, path, positive
from tandem.errors import UserError

if TYPE_CHECKING:
    from tandem.check.inputs import StageChat, StageData
    from tandem.check.survey import Survey
    from tandem.recipe.recipe import Recipe


def check(argv: list[str]) -> int:
    """Read data once and say what is in it; exit code 2 when it would not train."""
    arguments = _parser().parse(argv)
    if not arguments.data and arguments.recipe is None:
        raise UserError("tandem check needs DATA or --recipe. See tandem check --help")
    from tandem.check.inputs import with_validation

    with TemporaryDirectory() as folder:
        recipe = recipe_of(arguments)
        asked, notices = data_of(arguments, recipe, Path(folder))
        chat = chat_of(arguments, recipe)
        notices = [*(chat.notices if chat else ()), *notices]
        found = [
            _survey(data, chat, recipe, arguments, Path(folder)) for data in with_validation(asked)
        ]
        if recipe is not None and arguments.limit is None:
            from tandem.check.inputs import doubts_of

            for one in found:
                if one.subject.stage is not None and not one.subject.held_out:
                    doubts = doubts_of(one.subject.stage, recipe, one.counts["trained"])
                    notices = [*doubts, *notices]
        if arguments.json:
            _print_json(found, recipe, chat, notices)
        else:
            _print_pages(found, chat, notices)
    _require_trainable(found, whole=arguments.json)
    return 0


def _survey(
    data: StageData,
    chat: StageChat | None,
    recipe: Recipe | None,
    arguments: argparse.Namespace,
    folder: Path,
) -> Survey:
    from tandem.check.inputs import other_sets, require_context
    from tandem.check.survey import Subject, survey
    from tandem.runtime.console import notice_console, phase

    if chat is not None:
        require_context(chat, data)
    subject = Subject(
        data.stage,
        data.sources,
        data.plan,
        data.max_dropped,
        chat=chat.chat if chat else None,
        special=chat.special if chat else (),
        limited=data.limited,
        held_out=data.held_out,
    )
    console = notice_console()
    return survey(
        subject,
        others=other_sets(data, recipe, arguments.against or [], folder),
        limit=arguments.limit,
        shown=arguments.rows,
        show=lambda text, total: phase(console, text, total),
    )


def _print_json(
    found: Sequence[Survey], recipe: Recipe | None, chat: StageChat | None, notices: Sequence[str]
) -> None:
    from tandem.check.check_page import as_json

    value = {
        "tandem": __version__,
        "recipe": recipe.name if recipe else None,
        "model": chat.model if chat else None,
        "chat_template": chat.template if chat else None,
        "notices": list(notices),
        "trains": all(one.problem is None for one in found),
        "data": [as_json(one) for one in found],
    }
    # In ASCII: keys and file names may hold what is no UTF-8.
    sys.stdout.write(json.dumps(value, indent=2) + "\n")


def _require_trainable(found: Sequence[Survey], *, whole: bool) -> None:
    """Raise UserError for data that would not train: in its own words unless a page has them."""
    problems = [
        one.problem
        if whole or not one.counts["read"]
        else f"{' and '.join(source.path for source in one.subject.sources)}: a run would stop, "
        "for the reason at the end of the page"
        for one in found
        if one.problem is not None
    ]
    if problems:
        raise UserError("\n".join(problems))


def _print_pages(found: Sequence[Survey], chat: StageChat | None, notices: Sequence[str]) -> None:
    from tandem.check.check_page import print_survey
    from tandem.runtime.console import notice_console, result_console

    for notice in notices:
        notice_console().print(notice, markup=False, soft_wrap=True)
    # Of data of which nothing could be read, its problem alone is said.
    pages = [one for one in found if one.counts["read"] or one.problem is None]
    for number, one in enumerate(pages):
        if number:
            result_console().print()
        print_survey(
            result_console(), one, f"{chat.model}, template {chat.template}" if chat else None
        )


def _parser() -> Parser:
    parser = Parser(
        prog="tandem check",
        usage="tandem check DATA ... [--recipe R] [--model M] [--against FILE ...] [flags]",
        description="What is in a data set: format, lengths, what a run would cut or drop, "
        "duplicates, damaged\ntexts, pairs the wrong way round, overlaps with evaluation sets. "
        "Exit code 2 when a run would not train on it.",
    )
    add_inspected(parser)
    add = parser.add_argument
    add("--against", type=path, metavar="FILE", nargs="+",
        help="Evaluation or validation sets of any layout, with which nothing should be shared.",
    )  # fmt: skip
    add("--limit", type=positive, metavar="N", help="Only the first N rows.")
    add("--rows", type=positive, default=3, metavar="N", help="Rows shown of each finding (3).")
    add("--json", action="store_true", help="Print one JSON object, and nothing else.")
    return parser
