"""Dependencies point one way; vendors and third parties have one home each.

`DEBTS` lists the imports that still run the wrong way. No new one may be added.
"""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "src" / "tandem"

_GROUND = {"storage"}
_MODEL = _GROUND | {"losses", "recipe", "runtime", "demo", "data", "model"}
_TRAIN = _MODEL | {"train", "integrations"}
# What each package may import from tandem, besides itself, `errors` and `wording`.
ALLOWED: dict[str, set[str]] = {
    "storage": set(),
    "losses": _GROUND | {"runtime"},
    "recipe": _GROUND | {"losses"},
    "runtime": _GROUND,
    "demo": _GROUND,
    "data": _GROUND | {"recipe", "runtime", "demo"},
    "model": _MODEL,
    "train": _MODEL,
    "integrations": _TRAIN,
    "pairs": _TRAIN,
    "evaluate": _TRAIN,
    "export": _GROUND | {"recipe", "runtime", "data", "model"},
    "stages": _TRAIN,
    "plan": _TRAIN | {"stages"},
    "report": _GROUND | {"losses"},
    "chat": _GROUND | {"data", "model"},
    "check": _GROUND | {"recipe", "runtime", "data", "model"},
    "pipeline": _TRAIN | {"pairs", "evaluate", "stages", "plan", "report", "export"},
    "api": _TRAIN | {"pairs", "evaluate", "stages", "plan", "report", "chat", "check", "pipeline"},
    "cli": _TRAIN
    | {"pairs", "evaluate", "stages", "plan", "report", "chat", "check", "export", "pipeline"},
}

# Imports that run the wrong way, as (module, package), until the seam is there that removes them.
DEBTS: set[tuple[str, str]] = set()

# Third-party packages with one home each.
HOMES = {
    "torch": {
        "chat",
        "data/batching/collate.py",
        "demo",
        "evaluate",
        "export",
        "integrations",
        "losses",
        "model",
        "pairs",
        "plan",
        "runtime",
        "stages",
        "train",
    },
    "peft": {"model/lora"},
    "accelerate": {"model/empty_model.py", "train/engines/engine.py", "integrations/trackers.py"},
    "wandb": {"integrations/trackers.py"},
    "mlflow": {"integrations/trackers.py"},
    "trackio": {"integrations/trackers.py"},
    "tensorboard": {"integrations/trackers.py"},
    "bitsandbytes": {"model/quantize.py"},
    "deepspeed": {"integrations/deepspeed"},
    "gguf": {"export"},
    "httpx2": {"integrations/chat_request.py"},
    "lm_eval": {"evaluate/harness.py"},
    "vllm": {"pairs/vllm_generator.py"},
}


@cache
def tree(path: Path) -> ast.Module:
    """A module as Python reads it, parsed once for all tests."""
    return ast.parse(path.read_text())


@cache
def imports(path: Path) -> frozenset[str]:
    """Dotted names that a module imports, wherever in the file."""
    found = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(found)


@cache
def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def _name(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def _packages(path: Path) -> set[str]:
    """The packages of tandem that a module imports, its own left out."""
    own = path.relative_to(PACKAGE).parts[0]
    names = (name.split(".")[1] for name in imports(path) if name.startswith("tandem."))
    return {name for name in names if name in ALLOWED} - {own}


def test_dependencies_point_one_way() -> None:
    """And debts that are paid leave the list."""
    found = {
        (_name(path), package)
        for path in modules()
        if len(path.relative_to(PACKAGE).parts) > 1
        for package in _packages(path) - ALLOWED[path.relative_to(PACKAGE).parts[0]]
    }
    assert found == DEBTS


def test_third_parties_stay_at_home() -> None:
    strays = {
        (name, package)
        for path in modules()
        for package in HOMES.keys() & {used.split(".")[0] for used in imports(path)}
        if not any(
            (name := _name(path)) == home or name.startswith(home + "/") for home in HOMES[package]
        )
    }
    assert strays == set()


def test_vendors_have_one_home() -> None:
    """Which device there is, is asked in one place; models choose kernels by it."""
    homes = {
        "runtime/device.py",
        "integrations/choose.py",
        "integrations/gaudi/bridge.py",
        "integrations/gaudi/gaudi_device.py",
    }
    named = re.compile(r"torch\.(cuda|xpu|hpu|mps)\b|habana_frameworks|torch\.backends\.(cuda|mps)")
    found = {
        _name(path)
        for path in modules()
        if named.search(path.read_text()) and not _name(path).startswith("model/")
    }
    assert found == homes


def test_gaudi_is_named_where_it_is_chosen_and_asked_for_alone() -> None:
    named = re.compile(r"(?<![a-z])(hpu|gaudi|habana)", re.IGNORECASE)
    homes = ("integrations/gaudi/", "integrations/__init__.py", "recipe/")
    others = {"integrations/choose.py", "api/options.py"}  # the latter lists all keys of recipes
    found = {
        _name(path)
        for path in modules()
        if named.search(path.read_text()) and not _name(path).startswith(homes)
    }
    assert found == others


def test_deepspeed_and_gaudi_stand_behind_engine_and_device_alone() -> None:
    """Only the file that chooses imports them, and they bring no method that others could call."""
    from tandem.integrations.deepspeed.zero import Zero2Engine, Zero3Engine
    from tandem.integrations.gaudi.gaudi_device import GaudiDevice
    from tandem.runtime.device import Device
    from tandem.train.engines.engine import Engine

    vendors = ("tandem.integrations.deepspeed", "tandem.integrations.gaudi")
    importers = {
        _name(path)
        for path in modules()
        if any(name.startswith(vendors) for name in imports(path))
        and not _name(path).startswith(("integrations/deepspeed/", "integrations/gaudi/"))
    }
    assert importers == {"integrations/choose.py"}
    for ours, theirs, own in (
        (Engine, Zero2Engine, {"name"}),
        (Engine, Zero3Engine, {"name"}),
        (Device, GaudiDevice, {"settings", "lazy"}),
    ):
        added = {name for name in dir(theirs) if not name.startswith("_")} - set(dir(ours))
        assert added <= own, theirs


def test_code_decides_by_an_engines_name_where_it_is_chosen_alone() -> None:
    """Elsewhere the names stand in messages, and in the table of what each engine shards."""
    found = set()
    for path in modules():
        if "deepspeed" not in path.read_text():
            continue
        for node in ast.walk(tree(path)):
            compared = ast.walk(node) if isinstance(node, ast.Compare) else ()
            constants = {one.value for one in compared if isinstance(one, ast.Constant)}
            if any(isinstance(one, str) and "deepspeed" in one for one in constants):
                found.add(_name(path))
    assert found <= {"integrations/choose.py"}


# In `model` what stands later may import what stands before it, and not the other way round.
MODEL_ORDER = (
    {"cpu", "unwrap", "trained_weights", "weight_files", "shard_writer", "empty_model"},
    {"read_model"},
    {"model_folder", "added_tokens", "untrained_rows", "elementwise", "generate"},
    {"quantize", "companion_files"},
    {"attention", "full", "lora"},
    {"logprobs"},
    {"prepare_model"},
    {"base_model"},
    {"load_model"},
    {"merge_sums"},
    {"merge_weights"},
    {"layer_walk"},
    {"verify_merge", "stand_in"},
)


def test_models_are_built_from_the_ground_up() -> None:
    def level(name: str) -> int:
        return next(i for i, names in enumerate(MODEL_ORDER) if name in names)

    for path in (PACKAGE / "model").rglob("*.py"):
        parts = path.relative_to(PACKAGE / "model").with_suffix("").parts
        used = [name.split(".")[2] for name in imports(path) if name.startswith("tandem.model.")]
        if parts[0] != "__init__":
            assert all(level(name) <= level(parts[0]) for name in used), path


def test_stages_do_not_import_each_other() -> None:
    stages = {"sft", "dpo", "merge"}
    for name in stages:
        used = imports(PACKAGE / "stages" / f"{name}.py")
        others = {f"tandem.stages.{other}" for other in stages - {name}}
        assert not [one for one in used if any(one.startswith(other) for other in others)]


def test_no_name_that_says_nothing() -> None:
    assert not [p for p in modules() if p.stem in {"utils", "common", "helpers", "misc"}]


def test_no_folder_is_crowded_and_every_package_says_what_it_is() -> None:
    for folder in {path.parent for path in modules()}:
        assert len(list(folder.glob("*.py"))) <= 21, folder  # 20, and what the package is
        first = (folder / "__init__.py").read_text().splitlines()[:1]
        assert first
        assert first[0].startswith('"""'), folder
