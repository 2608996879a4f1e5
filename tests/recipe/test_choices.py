"""Each closed set of words is spelt in one place."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import get_args

from tandem.recipe import choices

PACKAGE = Path(choices.__file__).parents[1]
HOMES = {PACKAGE / "recipe" / "choices.py", PACKAGE / "storage" / "run_folder.py"}
SETS = {
    frozenset(words): name
    for name, value in vars(choices).items()
    if len(words := get_args(value)) > 1 and all(isinstance(word, str) for word in words)
}


def _words(node: ast.AST) -> frozenset[str]:
    """The words of a Literal, a tuple, a list or a set of nothing else."""
    if isinstance(node, ast.Tuple | ast.List | ast.Set):
        values = [one.value for one in node.elts if isinstance(one, ast.Constant)]
        if len(values) == len(node.elts):
            return frozenset(value for value in values if isinstance(value, str))
    return frozenset()


def test_there_are_sets() -> None:
    assert {"DeviceName", "StageName", "TooLong", "Role"} <= set(SETS.values())


def test_no_module_spells_a_set_again() -> None:
    again = [
        (str(path.relative_to(PACKAGE)), node.lineno, SETS[words])
        for path in PACKAGE.rglob("*.py")
        if path not in HOMES
        for node in ast.walk(ast.parse(path.read_text()))
        if (words := _words(node)) in SETS and isinstance(node, ast.expr)
    ]
    assert again == []
