"""The lists of changes: each model is made of what it was, and nothing else changes one."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

import tandem
from tandem.model import prepare_model
from tandem.model.cpu.c_kernels import kernels
from tandem.model.cpu.onednn_linear import bytes_to_order

from .prepared import CASES, FILE, prepared

SOURCES = Path(tandem.__file__).parent


@pytest.mark.parametrize("name", CASES)
def test_prepared_models_are_module_by_module_what_they_were(name: str, tmp_path: Path) -> None:
    """`prepared.json` was written before the order of the changes became lists."""
    import torch

    if kernels() is None or not bytes_to_order(torch.nn.Sequential(torch.nn.Linear(1, 1))):
        pytest.skip("what replaces a forward depends on the kernels and on oneDNN")
    if CASES[name].quantization is not None:
        pytest.importorskip("bitsandbytes")
    assert prepared(CASES[name], tmp_path) == json.loads(FILE.read_text())[name]


def _changing(tree: ast.AST) -> set[str]:
    """The functions that set a `forward` or a `tandem_...` attribute of another object."""
    found = set()
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef):
            continue
        for node in ast.walk(function):
            targets = node.targets if isinstance(node, ast.Assign) else []
            for target in targets:
                for one in ast.walk(target):
                    if isinstance(one, ast.Attribute) and isinstance(one.ctx, ast.Store):
                        own = isinstance(one.value, ast.Name) and one.value.id == "self"
                        if not own and (one.attr == "forward" or one.attr.startswith("tandem_")):
                            found.add(function.name)
    return found


def test_only_functions_that_the_lists_name_change_a_model() -> None:
    path = Path(prepare_model.__file__)
    listed = {
        change.__name__
        for changes in vars(prepare_model).values()
        if isinstance(changes, tuple)
        for change in changes
    }
    tree = ast.parse(path.read_text())
    named = {
        node.id
        for function in tree.body
        if isinstance(function, ast.FunctionDef) and function.name in listed
        for node in ast.walk(function)
        if isinstance(node, ast.Name)
    }
    # A model without weights that lasts for one check of a merge, and what is done while a model
    # gets its weights.
    apart = {SOURCES / "model" / f"{name}.py" for name in ("layer_walk", "quantize", "read_model")}
    for source in {*SOURCES.rglob("*.py")} - apart:
        changing = _changing(ast.parse(source.read_text()))
        assert changing <= (listed if source == path else named), source
