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
from tandem.model.adapter import load_adapter_weights, save_adapter

_MARK = "checkpoint.json"
_OPTIMIZER = "optimizer.safetensors"


@dataclass
class Progress:
    """Where a training run stands; everything beside the tensors that a resume needs.

    `step` is the number of finished optimizer steps, `sums` runs since the last logged step; the
    rest is what the summary reports at the end. `padded_tokens` counts what padded batches of a
    usual size would have fed, `shared_tokens` what sharing prefixes saved; `fill` and `imbalance`
    sum up each step's, see `data.packing.StepPlan`.
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
        path = self.folder / f"step-{progress.step:06d}"
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

    def _complete(self) -> list[Path]:
        if not self.folder.exists():
            return []
        return sorted(p for p in self.folder.glob("step-*") if (p / _MARK).exists())


def _intact(path: Path) -> bool:
    try:
        files = read_json(path / _MARK)["files"]
    except (ValueError, KeyError):
        return False
    return all(
        (path / name).exists() and hash_file(path / name) == digest
        for name, digest in files.items()
    )
