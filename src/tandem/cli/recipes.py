"""`tandem recipes`: the recipes that ship; `tandem recipes copy NAME` starts one of your own."""

from __future__ import annotations

from pathlib import Path

from tandem.cli.parser import Parser, output_folder, path
from tandem.errors import UserError


def recipes(argv: list[str]) -> int:
    """List the recipes that ship, or copy one."""
    arguments = _parser().parse(argv)
    if arguments.action == "list":
        if arguments.name is not None:
            raise UserError("tandem recipes list takes no name; copy does")
        _list()
        return 0
    if arguments.name is None:
        raise UserError("tandem recipes copy needs the NAME of a recipe; `tandem recipes` has them")
    from tandem.recipe.shipped import copy_recipe

    target = output_folder(Path(arguments.path).parent, "PATH") / Path(arguments.path).name
    file = copy_recipe(arguments.name, target)
    print(f"{file} is your own now. Change in it:")
    print("  name, output_dir   what the run is called, and where it goes")
    print("  model              a Hub id or a folder; chat_template must suit it")
    print("  sft.data, dpo.data your own data (docs/guide/data.md), and the lengths that it needs")
    print("Then:")
    print(f"  tandem rehearse {file}   # finds in minutes what would fail in hours")
    print(f"  tandem run {file}")
    return 0


def _list() -> None:
    """Print a table of the recipes."""
    from rich.table import Table
    from rich.text import Text

    from tandem.recipe.shipped import shipped_recipes
    from tandem.runtime.console import result_console

    table = Table(box=None, padding=(0, 2, 0, 0))
    table.show_header = False
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for one in shipped_recipes():
        table.add_row(Text(one.name), Text(one.description))
        table.add_row("", Text(f"{one.model}, {one.hardware}", style="dim"))
    console = result_console()
    console.print(table)
    console.print("\ntandem recipes copy NAME writes one to a file of your own", markup=False)


def _parser() -> Parser:
    parser = Parser(
        prog="tandem recipes",
        usage="tandem recipes [list]\n       tandem recipes copy NAME [PATH]",
        description="The recipes that ship: model, data, the hardware that each is made for. copy "
        "writes one to a file,\nby default NAME.yaml in the current folder, to be changed there.",
        epilog="example: tandem recipes copy qwen3-4b-24gb my-run.yaml",
    )
    add = parser.add_argument
    add("action", nargs="?", choices=("list", "copy"), default="list", help="list is the default.")
    add("name", metavar="NAME", nargs="?", help="The recipe to copy.")
    add("path", metavar="PATH", nargs="?", type=path, default=".", help="A file or a folder.")
    return parser
