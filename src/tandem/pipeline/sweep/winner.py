"""The best trial: its recipe as a file, and its stage as the run's own."""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path

from tandem.errors import UserError
from tandem.pipeline.sweep.grid import Grid, Trial
from tandem.pipeline.sweep.state import TrialState
from tandem.recipe.load_recipe import recipe_to_yaml
from tandem.storage.atomic_files import atomic_folder, atomic_write_text
from tandem.storage.manifest import NAME as MANIFEST
from tandem.storage.manifest import read_manifest
from tandem.storage.run_folder import stage_folder

BEST = "best.yaml"


def write_best(grid: Grid, best: Trial) -> Path:
    """Write the best trial's whole recipe, with the command that goes on with it."""
    path = grid.folder / BEST
    head = f"# The best trial of the sweep {grid.name}: {best.name}\n# Go on with: {go_on(grid)}\n"
    atomic_write_text(path, head + recipe_to_yaml(best.recipe))
    return path


def go_on(grid: Grid) -> str:
    """The command that goes on with the best trial."""
    return f"tandem run {shlex.quote(str(grid.folder / BEST))}"


def check_take(grid: Grid, states: Sequence[TrialState]) -> None:
    """Raise UserError where the run's DPO stage is there already, and is none of the trials."""
    own = stage_folder(grid.shared.output_dir, "dpo")
    if not own.exists():
        return
    manifest = read_manifest(own)
    if manifest is None or manifest["status"] != "finished":
        raise UserError(f"--take: {own} is there already; remove it, or leave out --take")
    if manifest["inputs_hash"] not in [state.inputs_hash for state in states]:
        raise UserError(
            f"--take: {own} holds a DPO stage that is none of the trials; remove it, or leave out "
            "--take"
        )


def take(best: Trial) -> str:
    """Make a finished trial the run's DPO stage, which `tandem run` then finds finished.

    Weights are shared by hard links where the file system has them, so that they are on disk once;
    checkpoints stay behind. Returns what was done, in words. Raises UserError for a stage of
    something else that is in the way.
    """
    own = stage_folder(best.recipe.output_dir, "dpo")
    there = read_manifest(own) if own.exists() else None
    trial = read_manifest(best.folder)
    assert trial is not None, "it is finished"
    if there is not None and there["inputs_hash"] == trial["inputs_hash"]:
        return f"{own} is {best.name} already"
    if own.exists():
        raise UserError(
            f"--take: {own} holds another DPO stage than the best trial, {best.name}; remove it "
            "and start the sweep again, which trains nothing anew"
        )
    with atomic_folder(own) as aside:
        for name in [MANIFEST, *trial["outputs"]]:
            target = aside / name
            target.parent.mkdir(parents=True, exist_ok=True)
            _put(best.folder / name, target)
    return f"{best.name} is now {own}"


def _put(source: Path, target: Path) -> None:
    """Link a file of weights, which nothing writes into, and copy any other."""
    if source.suffix == ".safetensors":
        try:
            os.link(source, target)
        except OSError:  # another file system, or one without hard links
            pass
        else:
            return
    shutil.copyfile(source, target)
