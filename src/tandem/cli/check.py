"""`tandem check DATA [--recipe R]`: what is in a data set, before anything is trained."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from tandem.cli.inspected_data import add_inspected, chat_of, data_of, recipe_of
from tandem.cli.parser import Parser, path, positive
from tandem.errors import UserError


def check(argv: list[str]) -> int:
    """Read data once and say what is in it; exit code 2 when it would not train."""
    arguments = _parser().parse(argv)
    if not arguments.data and arguments.recipe is None:
        raise UserError("tandem check needs DATA or --recipe. See tandem check --help")
    from tandem.check.check_data import CheckJob, check_data

    with TemporaryDirectory() as folder:
        recipe = recipe_of(arguments)
        targets, notices = data_of(arguments, recipe, Path(folder))
        chat = chat_of(arguments, recipe)
        job = CheckJob(
            targets, chat, recipe, arguments.against or [], arguments.limit, arguments.rows, notices
        )
        check_data(job, Path(folder), as_one_object=arguments.json)
    return 0


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
