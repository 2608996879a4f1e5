"""`tandem report RUN`: the page of a run, again."""

from __future__ import annotations

from pathlib import Path

from tandem.cli.parser import Parser, path
from tandem.errors import UserError


def report(argv: list[str]) -> int:
    """Rebuild a run's report.html from the files in its folder."""
    parser = Parser(
        prog="tandem report",
        usage="tandem report RUN",
        description="Rebuild a run's report.html from the files in its folder.",
    )
    parser.add_argument(
        "run", type=path, metavar="RUN", help="A run's folder, for instance runs/demo."
    )
    run_dir = Path(parser.parse(argv).run)
    if not run_dir.is_dir():
        raise UserError(f"{run_dir}: no such folder; name the folder of a run")
    from tandem.report.html import write_report

    print(write_report(run_dir))
    return 0
