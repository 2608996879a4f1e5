"""`tandem plan RECIPE [key=value ...]`: what a run would do and take, before it starts."""

from __future__ import annotations

import json
from pathlib import Path

from tandem.cli.parser import Parser, add_overrides, positive
from tandem.errors import UserError
from tandem.runtime.launch import announce


def plan(argv: list[str]) -> int:
    """Print a recipe's plan, as tables or as JSON."""
    arguments = _parser().parse(argv)
    records, tokens = arguments.records or [], arguments.tokens_per_record or []
    if len(records) != len(tokens):
        raise UserError(
            "tandem plan: --records and --tokens-per-record go together; give both, with as many "
            "numbers"
        )
    from tandem.recipe.load_recipe import load_recipe

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    announce(f"plan of {Path(arguments.recipe).name}")
    from tandem.pipeline.preflight import check_paths

    check_paths(recipe.model_copy(update={"pairs": None, "evaluate": None}), weights=False)
    from tandem.plan.plan_page import as_json, show_plan
    from tandem.plan.plan_recipe import Guess, plan_recipe
    from tandem.runtime.console import notice_console, result_console

    planned = plan_recipe(
        recipe,
        processes=arguments.nproc or 1,
        download=arguments.download,
        guesses=[Guess(*pair) for pair in zip(records, tokens, strict=True)],
        console=notice_console(),
    )
    if arguments.json:
        print(json.dumps(as_json(planned), indent=2, ensure_ascii=False))
    else:
        show_plan(planned, result_console())
    return 0


def _parser() -> Parser:
    parser = Parser(
        prog="tandem plan",
        usage="tandem plan RECIPE [key=value ...] [--nproc N] [--json] [--download]\n"
        "                   [--records N[,N] --tokens-per-record M[,M]]",
        description="What a recipe's training would do and take: records, steps, tokens, padding "
        "avoided,\nprompts shared, operations, memory, disk and time. Needs the model's "
        "configuration and\ntokenizer, no weights. Data is read and encoded as training would, and "
        "found again by it.",
        unknown_hint=" (recipe keys are written key=value, without dashes)",
        epilog="example: tandem plan demo sft.batch_size=16 --nproc 2",
    )
    add = parser.add_argument
    add("recipe", metavar="RECIPE", help="A shipped recipe's name or a YAML file.")
    add_overrides(parser, "Recipe keys")
    add("--nproc", metavar="N", type=positive, help="Plan for so many processes.")
    add("--json", action="store_true", help="Print JSON.")
    add("--download", action="store_true", help="Fetch data sets of the Hub, and read them.")
    add("--records", metavar="N[,N]", type=_numbers,
        help="Records of data that is not here, by training stage.")  # fmt: skip
    add("--tokens-per-record", metavar="M[,M]", type=_numbers, help="Tokens of each of them.")
    return parser


def _numbers(text: str) -> list[int]:
    """Convert to positive numbers between commas."""
    return [positive(part) for part in text.split(",")]
