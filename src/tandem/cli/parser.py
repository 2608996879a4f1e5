"""An argparse parser that treats dashes as underscores and suggests the nearest valid flag."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from tandem.errors import UserError
from tandem.storage.run_folder import output_folder as output_folder

if TYPE_CHECKING:
    from tandem.recipe.flags.flag import Flag


class Parser(argparse.ArgumentParser):
    """A command's parser. Mistakes are UserErrors; abbreviations are mistakes."""

    def __init__(self, *, unknown_hint: str = "", **options: Any) -> None:
        self.unknown_hint = unknown_hint
        super().__init__(
            allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options
        )

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parse a command's arguments, flags and names in any order.

        Raises UserError naming the flag, and the nearest valid one for an unknown flag.
        """
        return self.parse_intermixed_args(self._own_spelling(argv))

    def error(self, message: str) -> NoReturn:
        """Raise what argparse finds wrong as a UserError."""
        raise UserError(f"{self.prog}: {message}. See {self.prog} --help")

    def _own_spelling(self, argv: Sequence[str]) -> list[str]:
        """Spell every flag as it was declared."""
        flags = [flag for flag in self._option_string_actions if flag.startswith("--")]
        declared = {flag.replace("_", "-"): flag for flag in flags}
        spelled: list[str] = []
        seen: set[str] = set()
        for position, argument in enumerate(argv):
            if argument == "--":
                return [*spelled, *argv[position:]]
            if not argument.startswith("--"):
                spelled.append(argument)
                continue
            name, equals, value = argument.partition("=")
            flag = declared.get(name.replace("_", "-"))
            if flag is None:
                self._unknown(name, declared)
            if flag in seen:
                raise UserError(f"{self.prog}: {name} is given twice; keep one")
            seen.add(flag)
            spelled.append(f"{flag}{equals}{value}")
        return spelled

    def _unknown(self, name: str, declared: dict[str, str]) -> NoReturn:
        spelled = name.replace("_", "-")
        known = [flag for flag in declared if flag != "--help"]
        close = difflib.get_close_matches(spelled, known, n=1, cutoff=0.6)
        hint = f"; did you mean {declared[close[0]]}?" if close else f". See {self.prog} --help"
        raise UserError(f"{self.prog}: unknown flag {name}{hint}{self.unknown_hint}")


def path(text: str) -> str:
    """Convert to a path, with `~` and variables resolved."""
    from tandem.recipe.section import expanded

    try:  # a shell leaves `~` in `--flag=~/x` as it is
        return expanded(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def positive(text: str) -> int:
    """Convert to a whole number above 0."""
    value = whole(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def seed(text: str) -> int:
    """Convert to a whole number that torch and numpy take as a seed."""
    value = whole(text)
    if not 0 <= value < 2**32:
        raise argparse.ArgumentTypeError(f"{text} is not from 0 to {2**32 - 1}")
    return value


def number(text: str) -> float:
    """Convert to a number."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None


def whole(text: str) -> int:
    """Convert to a whole number."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None


def add_flag(parser: Parser | argparse._ArgumentGroup, flag: Flag, **more: Any) -> None:
    """Declare a flag with `more` options of argparse; true or false may follow a boolean."""
    from tandem.recipe.flags.flag import boolean
    from tandem.recipe.section import expanded

    kind: Any = {expanded: path, int: whole, float: number}.get(flag.kind, flag.kind)
    options: dict[str, Any] = {"help": flag.help.replace("%", "%%"), "type": kind}
    if flag.kind is boolean:
        options |= {"nargs": "?", "const": True, "metavar": "true|false"}
    elif flag.choices:
        options["choices"] = flag.choices
    else:
        of_its_kind = {whole: "N", number: "X", path: "PATH"}.get(kind, "TEXT")
        options["metavar"] = flag.metavar or of_its_kind
    if flag.many:
        options["nargs"] = "+"
    parser.add_argument(f"--{flag.name}", dest=flag.name, **{**options, **more})


def add_dry_run(parser: Parser) -> None:
    """Declare `--dry-run`."""
    about = "Print the resolved settings and stop."
    parser.add_argument("--dry-run", action="store_true", help=about)


def add_overrides(parser: Parser, what: str) -> None:
    """Declare `key=value` arguments."""
    about = f"{what}, with dots; values as in YAML, null unsets."
    parser.add_argument("overrides", metavar="key=value", nargs="*", default=[], help=about)
