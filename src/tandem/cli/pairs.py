"""`tandem pairs`: preference pairs from an instruction set, by a model or a server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from tandem.cli.parser import Parser, add_dry_run, add_flag, add_overrides, output_folder, path
from tandem.integrations.choose import prepare_devices
from tandem.recipe.flags.flag import flag_of
from tandem.recipe.pairs_settings import PairsSettings
from tandem.recipe.run_settings import RunSettings
from tandem.runtime.launch import announce

if TYPE_CHECKING:
    from tandem.recipe.jobs import PairsJob

_FLAGS = (
    flag_of(PairsSettings, "model", at=("pairs",),
            help="Writes the rejected answers; or the key `server` names one."),
    flag_of(RunSettings, "seed", help="Decides selection and sampling (42)."),
    flag_of(RunSettings, "device", help="The device to generate on."),
    flag_of(RunSettings, "dtype", help="Number format of the model's weights."),
)  # fmt: skip


def pairs(argv: list[str]) -> int:
    """Make pairs, or with --dry-run print the settings."""
    arguments = _parser().parse(argv)
    from tandem.recipe.jobs import PairsJob
    from tandem.recipe.load_recipe import load_pairs

    values = {".".join(flag.field): getattr(arguments, flag.name) for flag in _FLAGS}
    values["pairs.prompts"] = arguments.prompts
    overrides = [
        # Quoted, because overrides are read as YAML.
        f"{key}={json.dumps(value, ensure_ascii=False)}"
        for key, value in values.items()
        if value is not None
    ]
    overrides += [f"pairs.{override}" for override in arguments.overrides]
    folder = output_folder(Path(arguments.output_dir), "--output_dir")
    recipe = load_pairs(arguments.recipe, overrides)
    assert recipe.pairs is not None
    run = {"model": recipe.pairs.model or recipe.model, "output_dir": str(folder)}
    job = PairsJob(recipe.model_copy(update=run), recipe.pairs)
    if arguments.dry_run:
        print(_dry_run_text(job), end="")
        return 0
    announce(f"pairs -> {folder}")
    from tandem.runtime.console import notice_console, result_console

    console = notice_console()
    for notice in prepare_devices(recipe):
        console.print(notice, markup=False, soft_wrap=True)
    from tandem.pairs.make_pairs import make_pairs

    make_pairs(job, console)
    result_console().print(f"pairs and their card: {folder}", markup=False, soft_wrap=True)
    return 0


def _dry_run_text(job: PairsJob) -> str:
    from tandem.recipe.yaml_lines import dump_yaml

    run = job.run.model_dump(include={"output_dir", "seed", "device", "dtype"})
    return dump_yaml({**run, "pairs": job.settings.model_dump(mode="json")})


def _parser() -> Parser:
    parser = Parser(
        prog="tandem pairs",
        usage="tandem pairs [--recipe RECIPE] [--prompts DATA] [--model MODEL] --output_dir O "
        "[key=value ...]",
        description="Preference pairs: the answers of an instruction set are chosen, answers that "
        "a model writes\nare rejected. The same command resumes an interrupted run.",
        unknown_hint=" (keys of the pairs section are written key=value, without dashes)",
        epilog="example: tandem pairs --prompts conversations.jsonl --model demo:base \\\n"
        "             --output_dir out/pairs select.count=12000 filters.drop_refusals=true",
    )
    add_overrides(parser, "Keys of a recipe's pairs section")
    parser.add_argument(
        "--prompts", type=path, metavar="DATA",
        help="The instruction set: a file, a folder or a Hub id.",
    )  # fmt: skip
    parser.add_argument(
        "--output_dir", type=path, metavar="FOLDER", required=True, help="Where pairs go."
    )
    parser.add_argument(
        "--recipe", metavar="RECIPE", help="Begin with the pairs section of this recipe."
    )
    for flag in _FLAGS:
        add_flag(parser, flag, default=None)
    add_dry_run(parser)
    return parser
