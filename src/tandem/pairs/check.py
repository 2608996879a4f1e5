"""A check of the user's own: a Python function that says whether a pair may stay."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from tandem.artifact.hashing import hash_file
from tandem.data.records import Origin
from tandem.errors import UserError

_HOW = (
    "It is a function's place, `module:function` or `path/to/file.py:function`; the function takes "
    "a pair as a dict of system, question, chosen and rejected, and returns True to keep it, or "
    "False or a reason (a text) to leave it out."
)


class Check:
    """A user's function, called with each pair that all other filters let through.

    Args:
        place: `module:function` or `file.py:function`.

    `identity` is the hash of its file. Raises UserError for one that cannot be imported.
    """

    def __init__(self, place: str) -> None:
        self.place = place
        name, colon, function = place.rpartition(":")
        if not colon or not name or not function.isidentifier():
            raise UserError(f"pairs.filters.check: {place!r} is no place of a function. {_HOW}")
        module = _imported(name, place)
        found = getattr(module, function, None)
        if not callable(found):
            raise UserError(f"pairs.filters.check: {name} has no function {function}. {_HOW}")
        self._function: Callable[[dict[str, str]], Any] = found
        file = getattr(module, "__file__", None)
        self.identity = hash_file(Path(file)) if file else place

    def __call__(self, row: dict[str, str], origin: Origin) -> str | None:
        """None to keep a pair, else the reason to leave it out.

        Raises UserError, with the prompt's file and row, when the function raises or returns
        something else.
        """
        try:
            said = self._function(dict(row))
        except Exception as error:  # whatever a user's function may raise
            frame = traceback.extract_tb(error.__traceback__)[-1]
            raise UserError(
                f"{origin}: pairs.filters.check {self.place} raised {type(error).__name__}: "
                f"{error} ({Path(frame.filename).name}, line {frame.lineno})"
            ) from error
        if said is True:
            return None
        if said is False:
            return "check"
        if isinstance(said, str) and said.strip():
            return f"check: {' '.join(said.split())}"
        raise UserError(
            f"{origin}: pairs.filters.check {self.place} returned {said!r}, which is neither True, "
            "False nor a reason."
        )


def _imported(name: str, place: str) -> ModuleType:
    try:
        if not name.endswith(".py"):
            return importlib.import_module(name)
        path = Path(name).expanduser()
        if not path.is_file():
            raise UserError(f"pairs.filters.check: there is no file {name}. {_HOW}")
        spec = importlib.util.spec_from_file_location(f"tandem_check_{path.stem}", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        # Where pickling and dataclasses look for a module.
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
    except UserError:
        raise
    except Exception as error:  # a user's module may do anything
        raise UserError(
            f"pairs.filters.check: {place} cannot be imported: {type(error).__name__}: {error}"
        ) from error
    return module
