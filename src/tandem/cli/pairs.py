"""`tandem pairs`: preference pairs from an instruction set, by a model or a server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from tandem.cli.environment import prepare_devices
from tandem.cli.parser import Parser, output_folder, path, seed
from tandem.recipe.flags import DEVICES, DTYPES

if TYPE_CHECKING:
    from tandem.recipe.recipe import Recipe


def pairs(argv: list[str]) -> int:
    """Make pairs, or with --dry-run print the settings."""
    arguments = _parser().parse(argv)
    from tandem.recipe.load_recipe import load_pairs

    given = [
        # Overrides are read as YAML; a flag's text is what it is.
        f"{key}={json.dumps(value, ensure_ascii=False)}"
        for key, value in (
            ("pairs.prompts", arguments.prompts),
            ("pairs.model", arguments.model),
            ("seed", arguments.seed),
            ("device", arguments.device),
            ("dtype", arguments.dtype),
        )
        if value is not None
    ]
    given += [f"pairs.{override}" for override in arguments.overrides]
    folder = output_folder(Path(arguments.output_dir), "--output_dir")
    recipe = load_pairs(arguments.recipe, given)
    if arguments.dry_run:
        print(_text(recipe, folder), end="")
        return 0
    from tandem.runtime.console import notice_console, result_console

    console = notice_console()
    for notice in prepare_devices(recipe):
        console.print(notice, markup=False, soft_wrap=True)
    from tandem.pairs.make_pairs import run_pairs
    from tandem.recipe.run_settings import runtime_of

    settings = recipe.pairs
    assert settings is not None
    run_pairs(
        model=settings.model or recipe.model,
        settings=settings,
        output_dir=folder,
        seed=recipe.seed,
        runtime=runtime_of(recipe),
        console=console,
    )
    result_console().print(f"pairs and their card: {folder}", markup=False, soft_wrap=True)
    return 0


def _text(recipe: Recipe, folder: Path) -> str:
    from tandem.recipe.yaml_lines import dump_yaml

    assert recipe.pairs is not None
    head = {"output_dir": str(folder), "seed": recipe.seed, "device": recipe.device}
    return dump_yaml({**head, "dtype": recipe.dtype, "pairs": recipe.pairs.model_dump(mode="json")})


def _parser() -> Parser:
    parser = Parser(
        prog="tandem pairs",
        usage="tandem pairs [--recipe RECIPE] [--prompts DATA] [--model MODEL] --output_dir O "
        "[key=value ...]",
        description="Preference pairs: the answers of an instruction set are chosen, answers that "
        "a model writes\nare rejected. The same command again goes on with an interrupted run.",
        unknown_hint=" (keys of the pairs section are written key=value, without dashes)",
        epilog="example: tandem pairs --prompts conversations.jsonl --model demo:base \\\n"
        "             --output_dir out/pairs select.count=12000 filters.drop_refusals=true",
    )
    parser.add_argument(
        "overrides",
        metavar="key=value",
        nargs="*",
        default=[],
        help="keys of a recipe's pairs section, with dots; values as in YAML",
    )
    for flag, what, text in (
        ("--prompts", "DATA", "the instruction set: a file, a folder or a Hub id"),
        ("--model", "MODEL", "writes the rejected answers; or the key `server` names one"),
        ("--output_dir", "FOLDER", "where pairs go"),
    ):
        parser.add_argument(
            flag, type=path, metavar=what, required=flag == "--output_dir", help=text
        )
    parser.add_argument(
        "--recipe", metavar="RECIPE", help="begin with the pairs section of this recipe"
    )
    parser.add_argument("--seed", type=seed, metavar="N", help="of selection and sampling (42)")
    parser.add_argument("--device", choices=DEVICES, help="where to generate")
    parser.add_argument("--dtype", choices=DTYPES, help="of the model's weights")
    parser.add_argument(
        "--dry_run", action="store_true", help="print the resolved settings and stop"
    )
    return parser
