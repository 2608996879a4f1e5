"""`tandem report RUN` and `tandem cache`: what is on disk already, shown or made anew."""

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
    if (run_dir / "sweep.json").is_file():
        from tandem.report.sweep_page import write_page

        print(write_page(run_dir))
        return 0
    from tandem.report.html import write_report

    print(write_report(run_dir))
    return 0


def cache(argv: list[str]) -> int:
    """Show what the cache holds, or empty it."""
    parser = Parser(
        prog="tandem cache",
        usage="tandem cache [show|clear]",
        description="Show or empty what is kept between runs: encoded data and reference "
        "log-probs.\nBoth are found again by their content, so that nothing is lost but time.",
    )
    parser.add_argument("action", nargs="?", choices=("show", "clear"), default="show")
    action = parser.parse(argv).action
    from tandem.storage.cache_folder import cache_report, clear_cache

    try:
        if action == "clear":
            print(f"freed {_size(clear_cache())}")
            return 0
        entries = cache_report()
    except OSError as error:
        raise UserError(f"the cache cannot be read or emptied: {error}") from None
    for name, size in entries:
        print(f"{_size(size):>10}  {name}")
    print(f"{_size(sum(size for _, size in entries)):>10}  in all")
    return 0


def _size(count: int) -> str:
    """Write bytes in the largest unit that leaves a number above one."""
    if count < 1024:
        return f"{count} bytes"
    if count < 1024**2:
        return f"{count / 1024:.1f} KiB"
    return f"{count / 1024**2:.1f} MiB" if count < 1024**3 else f"{count / 1024**3:.1f} GiB"
