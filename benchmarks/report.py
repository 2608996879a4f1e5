"""`python -m benchmarks.report` makes tables and charts again from the JSON.

With --readme, the README's table between its two marks is replaced as well.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from . import gpu, sweeps
from .apart import ROOT
from .record import load
from .tables import MARKS, RESULTS, readme_table, write


def main(arguments: Sequence[str] | None = None) -> None:
    """Make tables and charts again from the JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--readme", action="store_true", help="also replace the README's table")
    options = parser.parse_args(arguments)
    for file in sorted(options.results.glob("training-*.json")):
        write(load(file), file)
        print(file.with_suffix(".md"))
    if (options.results / "sweeps.json").exists():
        sweeps.write(load(options.results / "sweeps.json"), options.results / "sweeps.json")
        print(options.results / "sweeps.md")
    gpu.write(options.results)
    if options.readme:
        _replace_in_readme(readme_table(options.results))


def _replace_in_readme(table: str | None) -> None:
    if table is None:
        raise SystemExit("the README's table needs training-dpo-60m.json and training-sft-60m.json")
    readme = ROOT / "README.md"
    before, mark, rest = readme.read_text(encoding="utf-8").partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    if not mark or not end:
        raise SystemExit(f"README.md lacks the marks {MARKS[0]} and {MARKS[1]} around its table")
    readme.write_text(f"{before}{mark}\n{table}\n{end}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
