"""Functions of the user's own, by the name that a recipe has for them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tandem.errors import UserError
from tandem.runtime.user_code import identity_of, load_function

_MODULE = """
import math
limit = 3
class Held:
    @staticmethod
    def inner(x): return x + 1
def double(x):
    return 2 * x
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    (tmp_path / "own_functions.py").write_text(_MODULE)
    (tmp_path / "broken_functions.py").write_text("import not_there_at_all\n")
    (tmp_path / "raising_functions.py").write_text("1 / 0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield "own_functions"
    for name in ("own_functions", "broken_functions", "raising_functions"):
        sys.modules.pop(name, None)


def test_a_function_of_the_current_folder_is_found(module: str) -> None:
    assert load_function(f"{module}:double", "callbacks")(4) == 8
    assert load_function(f"{module}:Held.inner", "callbacks")(4) == 5
    assert load_function("math:sqrt", "callbacks")(4) == 2
    assert load_function(f"{Path.cwd() / 'own_functions.py'}:double", "callbacks")(4) == 8


@pytest.mark.parametrize(
    ("named", "says"),
    [
        ("double", "'double' names no function; write it as module:function"),
        ("own_functions:", "names no function"),
        ("own_function:double", "there is no module own_function; run tandem in the folder"),
        ("own_functions.more:double", "there is no module own_functions.more"),
        ("own_functions:doubel", "own_functions has no doubel; did you mean double?"),
        ("own_functions:limit", "own_functions:limit is int, and no function"),
        ("nowhere/own.py:f", "there is no file nowhere/own.py; check the path"),
        ("broken_functions:f", "broken_functions imports not_there_at_all, which is not there"),
        ("raising_functions:f", "raising_functions cannot be imported (ZeroDivisionError"),
    ],
)
def test_a_name_that_leads_nowhere_says_why(module: str, named: str, says: str) -> None:
    with pytest.raises(UserError) as caught:
        load_function(named, "callbacks")
    assert str(caught.value).startswith("callbacks: ")
    assert says in str(caught.value)


def test_a_changed_function_is_another_one(module: str) -> None:
    first = identity_of(load_function(f"{module}:double", "loss"))
    Path("own_functions.py").write_text(_MODULE.replace("2 * x", "3 * x"))
    sys.modules.pop(module)
    changed = identity_of(load_function(f"{module}:double", "loss"))
    Path("own_functions.py").write_text(_MODULE + "\n\n# more\n")
    sys.modules.pop(module)
    assert identity_of(load_function(f"{module}:double", "loss")) == first != changed
    with pytest.raises(UserError, match="has no source text"):
        identity_of(len)
