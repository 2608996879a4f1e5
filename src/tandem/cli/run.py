"""`tandem run RECIPE [key=value ...]`: the whole pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tandem.cli.nproc import add_nproc, in_processes
from tandem.cli.parser import Parser, add_dry_run, add_overrides, output_folder
from tandem.runtime.launch import announce, launched
from tandem.storage.run_folder import STAGES

if TYPE_CHECKING:
    from tandem.recipe.recipe import Recipe


def run(argv: list[str]) -> int:
    """Run a recipe's stages, or with --dry-run print what they would be."""
    arguments = _parser().parse(argv)
    from tandem.recipe.load_recipe import load_recipe
    from tandem.recipe.recipe import asked_for, stages_of

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    run_dir = output_folder(Path(recipe.output_dir), "output_dir")
    if arguments.dry_run:
        from tandem.pipeline.preflight import check_tokens

        check_tokens(recipe)
        if launched().speaks:
            print(dry_run_text(recipe, until=arguments.until, start=arguments.start))
        return 0
    stages = stages_of(recipe)
    asked = asked_for(stages, until=arguments.until, start=arguments.start)
    count = f"{len(asked)} stage{'' if len(asked) == 1 else 's'}"
    announce(f"{Path(arguments.recipe).name} -> {recipe.output_dir}, {count}")
    if arguments.nproc is not None:
        return in_processes(arguments.nproc, "run", argv, device=recipe.device)
    from tandem.integrations.choose import prepare_devices
    from tandem.runtime.console import notice_console

    console = notice_console()
    for notice in prepare_devices(recipe):
        console.print(notice, markup=False, soft_wrap=True)
    from tandem.pipeline.run_pipeline import run_pipeline

    evaluation = run_pipeline(recipe, until=arguments.until, start=arguments.start, console=console)
    if launched().rank == 0:
        _finish(run_dir, evaluation)
    from tandem.runtime.process_group import leave

    leave()
    return 0


def dry_run_text(recipe: Recipe, *, until: str | None, start: str | None) -> str:
    """Write the resolved recipe as YAML with its stages as comments; it can be run again.

    Raises UserError for a stage that the recipe lacks.
    """
    from tandem.recipe.load_recipe import recipe_to_yaml
    from tandem.recipe.recipe import asked_for, stages_of
    from tandem.recipe.unmeant import unmeant

    planned = stages_of(recipe)
    asked = asked_for(planned, until=until, start=start)
    wide = max(len(stage.name) for stage in planned)
    folders = max(len(str(stage.folder)) for stage in planned)
    lines = [
        f"#   {stage.name:<{wide}}  {stage.folder!s:<{folders}}  "
        + (stage.note if place in asked else "not asked for")
        for place, stage in enumerate(planned)
    ]
    for name, settings in (("sft", recipe.sft), ("dpo", recipe.dpo)):
        if settings is not None:
            # Only `tandem plan` and a run read the data and count records.
            doubts = unmeant(settings, steps=settings.max_steps, records=None)
            lines += [f"# {name}: {doubt}" for doubt in doubts]
    head = "# dry run: nothing was downloaded or written\n"
    return f"{head}{recipe_to_yaml(recipe)}# stages\n" + "\n".join(lines)


def _finish(run_dir: Path, evaluation: dict[str, Any] | None) -> None:
    """Print the result table, sample answers side by side, and the path of the page."""
    from tandem.report import terminal_tables
    from tandem.report.html import write_report
    from tandem.report.run_facts import warnings_of_run
    from tandem.runtime.console import result_console

    page = write_report(run_dir)
    console = result_console()
    if evaluation is not None:
        console.print(terminal_tables.result_table(evaluation))
        if evaluation.get("tasks"):
            console.print(terminal_tables.comparison_table(evaluation))
            for note in terminal_tables.comparison_notes(evaluation):
                console.print(note, markup=False, soft_wrap=True)
        if evaluation.get("samples"):
            console.print(terminal_tables.samples_table(evaluation))
    for line in terminal_tables.warning_lines(warnings_of_run(run_dir)):
        console.print(line, soft_wrap=True)
    console.print(f"report: {page}", soft_wrap=True)


def _parser() -> Parser:
    parser = Parser(
        prog="tandem run",
        usage="tandem run RECIPE [key=value ...] [--dry-run] [--until STAGE] [--from STAGE] "
        "[--nproc N]",
        description="The whole pipeline of a recipe: SFT, merge, pairs, DPO, merge, evaluation; "
        "with rounds\npairs, DPO and merge again and again.\n"
        "The same command skips finished stages and resumes an interrupted one.",
        unknown_hint=" (recipe keys are written key=value, without dashes)",
        epilog="example: tandem run demo sft.learning_rate=2e-3 output_dir=runs/trial",
    )
    parser.add_argument("recipe", metavar="RECIPE", help="A shipped recipe's name or a YAML file.")
    add_overrides(parser, "Recipe keys")
    add_dry_run(parser)
    last = f"The last stage to run: {', '.join(STAGES)}; pairs-2 and so on of a later round."
    parser.add_argument("--until", metavar="STAGE", help=last)
    first = "The first stage to run; those before it must be finished."
    parser.add_argument("--from", dest="start", metavar="STAGE", help=first)
    add_nproc(parser)
    return parser
