"""`tandem sweep RECIPE dpo.beta=0.05,0.1,0.3`: DPO with several values, compared."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tandem.cli.nproc import add_nproc, in_processes
from tandem.cli.parser import Parser, add_dry_run, number, output_folder, positive
from tandem.errors import UserError
from tandem.recipe.choices import BEST_METRICS
from tandem.runtime.launch import announce, launched

if TYPE_CHECKING:
    from tandem.pipeline.sweep.grid import Grid
    from tandem.pipeline.sweep.run_sweep import SweepOptions

_KEEP, _RUNGS = 0.5, 2


def sweep(argv: list[str]) -> int:
    """Run a sweep, or with --dry-run print its trials; 1 where a trial failed."""
    arguments = _parser().parse(argv)
    _check_flags(arguments)
    from tandem.pipeline.sweep.grid import make_grid

    grid = make_grid(arguments.recipe, arguments.overrides, arguments.name)
    output_folder(Path(grid.shared.output_dir), "output_dir")
    from tandem.pipeline.sweep.run_sweep import check_metric

    check_metric(grid, arguments.metric)
    options = _options(arguments)
    if arguments.dry_run:
        if launched().speaks:
            print(dry_run_text(grid, options))
        return 0
    count = f"{len(grid.trials)} trials"
    announce(f"{Path(arguments.recipe).name} -> {grid.folder}, {count}")
    if arguments.nproc is not None:
        return in_processes(arguments.nproc, "sweep", argv, device=grid.shared.device)
    from tandem.integrations.choose import prepare_devices
    from tandem.pipeline.sweep.run_sweep import run_sweep
    from tandem.runtime.console import notice_console

    console = notice_console()
    for notice in prepare_devices(grid.shared):
        console.print(notice, markup=False, soft_wrap=True)
    results = run_sweep(grid, options, console)
    if launched().rank == 0:
        _finish(grid, results)
    from tandem.runtime.process_group import leave

    leave()
    return int(any(one["state"] == "failed" for one in results["trials"]))


def dry_run_text(grid: Grid, options: SweepOptions) -> str:
    """List what all trials share, and the trials with where they stand."""
    from tandem.pipeline.sweep.run_sweep import shared_stages
    from tandem.pipeline.sweep.state import check_begun, state_of, store_of

    check_begun(grid)
    shared = ", ".join(shared_stages(grid.shared)) or "none"
    lines = [
        "# dry run: nothing was downloaded or written",
        f"recipe: {grid.shared.name}",
        f"shared: {shared}; encoded pairs and reference log-probs of DPO",
        f"folder: {grid.folder}",
        f"compared by: held-out {options.metric}",
    ]
    if options.halving is not None:
        left, parts = len(grid.trials), []
        for share in options.halving.shares:
            parts.append(f"{left} trials to {share:.3g} of their steps")
            left = options.halving.survivors(left)
        lines.append(f"halving: {', '.join(parts)}, {left} to the end")
    store = store_of(grid.folder)
    lines.append(f"trials: {len(grid.trials)}")
    for trial in grid.trials:
        state = state_of(trial, store)
        standing = "finished" if state.finished else "failed" if state.failure else "begun"
        lines.append(f"  {trial.name}  {'new' if state.inputs_hash is None else standing}")
    return "\n".join(lines)


def _finish(grid: Grid, results: dict[str, Any]) -> None:
    """Print the table, what to know of it, and how to go on with the best trial."""
    from tandem.pipeline.sweep.winner import go_on
    from tandem.report.sweep_page import PAGE, sweep_notes, sweep_table
    from tandem.report.terminal_tables import warning_lines
    from tandem.runtime.console import result_console

    console = result_console()
    console.print(sweep_table(results))
    for line in warning_lines(sweep_notes(results)):
        console.print(line, soft_wrap=True)
    if results["best"] is not None:
        console.print(f"best: {results['best']}", markup=False, soft_wrap=True)
        console.print(f"go on with: {go_on(grid)}", markup=False, soft_wrap=True)
    console.print(f"report: {grid.folder / PAGE}", markup=False, soft_wrap=True)


def _options(arguments: argparse.Namespace) -> SweepOptions:
    from tandem.pipeline.sweep.run_sweep import SweepOptions
    from tandem.pipeline.sweep.state import Halving

    keep = _KEEP if arguments.keep is None else arguments.keep
    rungs = _RUNGS if arguments.rungs is None else arguments.rungs
    halving = Halving(keep, rungs) if arguments.halving else None
    return SweepOptions(arguments.metric, halving, arguments.take)


def _check_flags(arguments: argparse.Namespace) -> None:
    for flag in ("keep", "rungs"):
        if getattr(arguments, flag) is not None and not arguments.halving:
            raise UserError(f"tandem sweep: --{flag} has no effect without --halving; add it")
    if arguments.keep is not None and not 0 < arguments.keep < 1:
        raise UserError(
            f"tandem sweep: --keep {arguments.keep:g} is not between 0 and 1; it is the share of "
            "the trials that goes on"
        )


def _parser() -> Parser:
    parser = Parser(
        prog="tandem sweep",
        usage="tandem sweep RECIPE dpo.KEY=VALUE,VALUE,... [key=value ...] [--metric METRIC] "
        "[--halving] [--take] [--dry-run]",
        description="DPO of a recipe with several values of its settings, compared on held-out "
        "pairs.\nEverything before DPO is run once. The same command resumes an interrupted sweep, "
        "and\none with more values runs only the new trials.",
        unknown_hint=" (recipe keys are written key=value, without dashes)",
        epilog="example: tandem sweep demo dpo.beta=0.05,0.1,0.3 dpo.loss=sigmoid,ipo "
        "dpo.validation.fraction=0.1",
    )
    parser.add_argument("recipe", metavar="RECIPE", help="A shipped recipe's name or a YAML file.")
    about = (
        "Recipe keys, with dots. Values between commas are tried, in every combination; commas in "
        "brackets, braces or quotes belong to a value."
    )
    parser.add_argument("overrides", metavar="key=value", nargs="*", default=[], help=about)
    parser.add_argument(
        "--metric",
        choices=BEST_METRICS,
        default="accuracy",
        help="What decides on held-out records: the share of pairs whose chosen answer gained more "
        "(default), by how much in nats, or the loss, where it is the same in all trials.",
    )
    parser.add_argument(
        "--halving",
        action="store_true",
        help="Compare the trials on the way, and go on with the best ones alone.",
    )
    parser.add_argument(
        "--keep",
        type=number,
        metavar="X",
        help=f"With --halving: the share of the trials that goes on each time ({_KEEP}).",
    )
    parser.add_argument(
        "--rungs",
        type=positive,
        metavar="N",
        help=f"With --halving: how often they are compared before the end ({_RUNGS}).",
    )
    parser.add_argument(
        "--name", metavar="TEXT", help="The sweep's folder within output_dir/sweep (the keys)."
    )
    parser.add_argument(
        "--take",
        action="store_true",
        help="Make the best trial the run's DPO stage, for tandem run to go on with.",
    )
    add_dry_run(parser)
    add_nproc(parser)
    return parser
