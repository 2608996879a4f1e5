"""Dependencies point one way: cli -> stages -> train -> (model, losses, data)."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "src" / "tandem"

# What each folder may import from tandem, besides itself and `errors`.
ALLOWED = {
    "artifact": set(),
    "losses": set(),
    "data": {"artifact"},
    "diagnose": {"data"},
    "demo": {"artifact"},
    "recipe": set(),
    "model": {"artifact", "data", "demo"},
    "evaluate": {"artifact"},
    "pairs": {"artifact", "data", "evaluate"},
    "train": {"artifact", "data", "losses", "model"},
    "estimate": {"artifact", "data", "model"},
    "report": {"artifact"},
    "chat": {"data", "model"},
    "stages": {
        "artifact", "data", "demo", "estimate", "evaluate", "model", "pairs", "recipe", "report",
        "train",
    },
    "cli": {"artifact", "chat", "diagnose", "recipe", "report", "stages", "train"},
}  # fmt: skip

# Third-party packages with one home each.
HOMES = {
    "torch": {
        "data/collate.py",
        "data/buckets.py",
        "losses",
        "model",
        "train",
        "estimate",
        "stages",
        "chat",
        "demo",
    },
    "peft": {"model/adapter.py", "model/adapter_config.py"},
    "accelerate": {"train/engine.py"},
    "bitsandbytes": {"model/quantization.py"},
    "lm_eval": {"evaluate/leaderboard.py"},
}


def imports(path: Path) -> set[str]:
    """Dotted names that a module imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_dependencies_point_one_way(path: Path) -> None:
    relative = path.relative_to(PACKAGE)
    folder = relative.parts[0] if len(relative.parts) > 1 else ""
    if not folder:
        return
    used = {
        name.split(".")[1]
        for name in imports(path)
        if name.startswith("tandem.") and name.split(".")[1] != "errors"
    }
    assert used - {folder} <= ALLOWED[folder]


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_third_parties_stay_at_home(path: Path) -> None:
    relative = str(path.relative_to(PACKAGE))
    for package, homes in HOMES.items():
        if any(name.split(".")[0] == package for name in imports(path)):
            assert any(relative == home or relative.startswith(home + "/") for home in homes)


def test_vendors_have_one_home() -> None:
    """Which device there is, is asked in one place; models choose kernels by it."""
    homes = {"train/device.py", "train/gaudi.py"}
    named = re.compile(r"torch\.(cuda|xpu|hpu|mps)\b|habana_frameworks|torch\.backends\.(cuda|mps)")
    found = {
        relative
        for path in modules()
        if named.search(path.read_text())
        and not (relative := str(path.relative_to(PACKAGE))).startswith("model/")
    }
    assert found == homes


def test_stages_do_not_import_each_other() -> None:
    stages = {"sft", "dpo", "merge", "pairs", "evaluate"}
    for name in stages:
        used = imports(PACKAGE / "stages" / f"{name}.py")
        assert not used & {f"tandem.stages.{other}" for other in stages - {name}}
        assert "tandem.stages.pipeline" not in used


def test_no_name_that_says_nothing() -> None:
    assert not [p for p in modules() if p.stem in {"utils", "common", "helpers", "misc"}]
