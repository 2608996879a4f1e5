"""Checkpoints that are complete or not there: adapter, optimizer, cursor and running sums."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from tandem.artifact.files import atomic_folder, atomic_write_json, read_json
from tandem.artifact.hashing import hash_file
from tandem.errors import TandemError
from tandem.model.adapter import load_adapter_weights, save_adapter

_MARK = "checkpoint.json"
_OPTIMIZER = "optimizer.safetensors"


@dataclass
class Progress:
    """Where a training run stands; everything beside the tensors that a resume needs.

    `step` is the number of finished optimizer steps, `sums` runs since the last logged step; the
    rest is what the summary reports at the end. `padded_tokens` counts what padded batches of a
    usual size would have fed, `shared_tokens` what sharing prefixes saved; `fill` and `imbalance`
    sum up each step's, see `data.packing.StepPlan`. `best_step` is the step whose adapter scored
    best on held-out records so far, `best` its score.
    """

    step: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    examples: int = 0
    tokens: int = 0
    padded_tokens: int = 0
    shared_tokens: int = 0
    micro_batches: int = 0
    fill: float = 0.0
    imbalance: float = 0.0
    validation_seconds: float = 0.0
    best_step: int | None = None
    best: float | None = None


class CheckpointStore:
    """The `checkpoints` folder of a stage.

    Args:
        folder: holds step-000100, step-000200, ...
        keep: how many of the newest stay, all when None.
    """

    def __init__(self, folder: Path, *, keep: int | None) -> None:
        self.folder = folder
        self.keep = keep

    def save(
        self,
        model: Any,
        trained: Mapping[str, Tensor],
        optimizer: Mapping[str, Tensor],
        progress: Progress,
    ) -> Path:
        """Write one checkpoint aside, sync it, move it into place, remove the oldest.

        Args:
            model: adapter-wrapped, for the adapter's configuration.
            trained: the adapter's weights, whole, by the model's names.
            optimizer: its tensors, whole, by name.
            progress: where the run stands.
        """
        path = self.path_of(progress.step)
        with atomic_folder(path) as aside:
            save_adapter(model, aside, trained)
            save_file(dict(optimizer), aside / _OPTIMIZER)
            digests = {f.name: hash_file(f) for f in sorted(aside.iterdir()) if f.is_file()}
            mark = {"progress": asdict(progress), "files": digests}
            atomic_write_json(aside / _MARK, mark)
        for old in self._complete()[: -self.keep] if self.keep else []:
            shutil.rmtree(old)
        return path

    def newest(self) -> Path | None:
        """The newest checkpoint whose files are all there and unchanged."""
        for path in reversed(self._complete()):
            if _intact(path):
                return path
        return None

    def load(self, path: Path, model: Any) -> tuple[Progress, dict[str, Tensor]]:
        """Put the adapter's weights back to where `save` found them, bit for bit.

        Returns the progress and the optimizer's tensors.
        """
        load_adapter_weights(model, path)
        progress = Progress(**read_json(path / _MARK)["progress"])
        return progress, load_file(path / _OPTIMIZER)

    def steps(self) -> list[Progress]:
        """Where the run stood at each complete checkpoint, the oldest first."""
        return [Progress(**read_json(path / _MARK)["progress"]) for path in self._complete()]

    def clear(self) -> None:
        """Remove all checkpoints and the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def path_of(self, step: int) -> Path:
        """Where the checkpoint of a step is, or would be."""
        return self.folder / f"step-{step:06d}"

    def _complete(self) -> list[Path]:
        if not self.folder.exists():
            return []
        return sorted(p for p in self.folder.glob("step-*") if (p / _MARK).exists())


def copy_adapter(checkpoint: Path, folder: Path) -> None:
    """Copy a checkpoint's adapter, and nothing else of it, into a folder.

    Raises TandemError when the checkpoint is not whole.
    """
    if not _intact(checkpoint):
        raise TandemError(f"{checkpoint} is damaged or gone; remove the folder and train again")
    for file in sorted(checkpoint.iterdir()):
        if file.name not in (_MARK, _OPTIMIZER):
            shutil.copyfile(file, folder / file.name)


def _intact(path: Path) -> bool:
    try:
        files = read_json(path / _MARK)["files"]
    except (OSError, ValueError, KeyError):
        return False
    return all(
        (path / name).exists() and hash_file(path / name) == digest
        for name, digest in files.items()
    )
