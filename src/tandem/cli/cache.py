"""`tandem cache [show|clear]`: what tandem keeps outside the runs' folders."""

from __future__ import annotations

from tandem.cli.parser import Parser
from tandem.errors import UserError


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
    """Bytes in the largest unit that leaves a number above one."""
    number = float(count)
    for unit in ("bytes", "KiB", "MiB"):
        if number < 1024:
            return f"{number:.0f} {unit}" if unit == "bytes" else f"{number:.1f} {unit}"
        number /= 1024
    return f"{number:.1f} GiB"
