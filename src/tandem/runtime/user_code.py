"""Functions of the user's own, named `module:function` or `path/to/file.py:function`."""

from __future__ import annotations

import difflib
import inspect
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

from tandem.errors import UserError
from tandem.storage.hashing import text_hash


def imported(name: str) -> ModuleType:
    """Import a module by its name, also from the current folder, or a file by its path.

    Raises FileNotFoundError for a path to no file, and whatever the module raises.
    """
    if not name.endswith(".py"):
        here = str(Path.cwd())
        if here not in sys.path:
            sys.path.insert(0, here)
        return import_module(name)
    path = Path(name).expanduser()
    spec = spec_from_file_location(f"tandem_user_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    # Pickling and dataclasses look for the module here.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def is_missing_file(name: str) -> bool:
    """Whether a name is a path to a file of Python that is not there."""
    return name.endswith(".py") and not Path(name).expanduser().is_file()


def load_function(named: str, key: str) -> Callable[..., Any]:
    """Import the function that the recipe's `key` names.

    Raises UserError for another form than `module:function` or `path/to/file.py:function`, a module
    that cannot be imported, and a name that the module lacks or that is no function.
    """
    module_name, colon, name = named.rpartition(":")
    if not (colon and module_name and name):
        raise UserError(f"{key}: {named!r} names no function; write it as module:function")
    if is_missing_file(module_name):
        raise UserError(f"{key}: there is no file {module_name}; check the path")
    try:
        found: Any = imported(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not (module_name + ".").startswith(error.name + "."):
            raise UserError(
                f"{key}: {module_name} imports {error.name}, which is not there"
            ) from None
        raise UserError(
            f"{key}: there is no module {module_name}; run tandem in the folder of "
            f"{module_name}.py, or install its package"
        ) from None
    except Exception as error:
        raise UserError(
            f"{key}: {module_name} cannot be imported ({type(error).__name__}: {error})"
        ) from error
    for part in name.split("."):
        if not hasattr(found, part):
            close = difflib.get_close_matches(part, dir(found), n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise UserError(f"{key}: {module_name} has no {name}{hint}")
        found = getattr(found, part)
    if not callable(found):
        raise UserError(f"{key}: {named} is {type(found).__name__}, and no function")
    function: Callable[..., Any] = found
    return function


def identity_of(function: Callable[..., Any]) -> str:
    """A hash of a function's source text, so that a changed function is another one.

    Raises UserError for a function without source, such as a builtin one.
    """
    try:
        source = inspect.getsource(function)
    except (OSError, TypeError):
        name = getattr(function, "__qualname__", repr(function))
        raise UserError(
            f"{name} has no source text, by which tandem tells whether it has changed; define it "
            "with def in a file or a notebook"
        ) from None
    return text_hash(inspect.cleandoc(source))
