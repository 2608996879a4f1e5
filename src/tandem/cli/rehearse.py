"""`tandem rehearse RECIPE [key=value ...]`: the whole run in minutes, on a random stand-in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from tandem.cli.parser import Parser, add_overrides, positive
from tandem.errors import UserError
from tandem.runtime.launch import announce

if TYPE_CHECKING:
    from rich.console import Console

    from tandem.pipeline.rehearsal.findings import Rehearsal


def rehearse(argv: list[str]) -> int:
    """Rehearse a recipe and print what that showed; exit code 2 when something failed."""
    arguments = _parser().parse(argv)
    from tandem.recipe.load_recipe import load_recipe

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    announce(f"rehearsal of {Path(arguments.recipe).name}")
    from tandem.pipeline.rehearsal.rehearse import Scope, rehearse
    from tandem.runtime.console import notice_console, result_console

    scope = Scope(
        records=arguments.records,
        steps=arguments.steps,
        with_servers=not arguments.without_servers,
        keep=arguments.keep,
    )
    found = rehearse(recipe, scope, notice_console())
    _show(found, result_console())
    return UserError.exit_code if found.failed else 0


def _show(found: Rehearsal, console: Console) -> None:
    """Print the findings as a table, and what they leave open."""
    from rich.text import Text

    from tandem.wording import duration

    for one in found.findings:
        line = Text("✓ " if one.passed else "✗ ", style="green" if one.passed else "bold red")
        line.append(f"{one.stage:<13} ", style="bold")
        line.append(f"{duration(one.seconds):>7}  ", style="dim")
        line.append(one.text, style="default" if one.passed else "red")
        console.print(line, soft_wrap=True)
    for name in found.skipped:
        console.print(f"– {name:<13} not reached", markup=False)
    _list(console, "worth knowing", found.notes)
    changes = [
        f"{c.key}: {_value(c.recipe)} -> {_value(c.rehearsed)} ({c.why})" for c in found.changes
    ]
    _list(console, "other than in the recipe", changes)
    _list(console, "not shown", found.not_shown)
    console.print()
    if found.folder is not None:
        console.print(f"files: {found.folder}", markup=False, soft_wrap=True)
    failed = len(found.failed)
    result = f"{failed} mistake{'s' if failed > 1 else ''} found" if failed else "nothing failed"
    console.print(f"{result} in {duration(found.seconds)}", markup=False, soft_wrap=True)


def _list(console: Console, title: str, lines: list[str] | tuple[str, ...]) -> None:
    if lines:
        console.print()
        console.print(f"{title}:", markup=False)
        for line in lines:
            console.print(f"  {line}", markup=False, soft_wrap=True)


def _parser() -> Parser:
    parser = Parser(
        prog="tandem rehearse",
        usage="tandem rehearse RECIPE [key=value ...] [--records N] [--steps N]\n"
        "                       [--without-servers] [--keep]",
        description="The whole run on the CPU in minutes: a small random model of the same "
        "architecture, the real\ntokenizer and template, a sample of the real data, a few steps a "
        "stage. Says what that has shown\nand what not; exit code 2 with stage and mend when "
        "something fails. Nothing of the run is written.",
        unknown_hint=" (recipe keys are written key=value, without dashes)",
        epilog="example: tandem rehearse demo",
    )
    add = parser.add_argument
    add("recipe", metavar="RECIPE", help="A shipped recipe's name or a YAML file.")
    add_overrides(parser, "Recipe keys")
    add("--records", metavar="N", type=positive, default=48,
        help="Records of each data set, spread over it (48).")  # fmt: skip
    add("--steps", metavar="N", type=positive, default=4,
        help="Steps of each training stage (4).")  # fmt: skip
    add("--without-servers", action="store_true",
        help="Ask no server and no judge; stand-ins write and rank.")  # fmt: skip
    add("--keep", action="store_true", help="Keep the rehearsal's files.")
    return parser


def _value(value: object) -> str:
    """A value as a recipe has it."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
