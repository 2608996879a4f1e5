"""Checkpoints that are complete or not there: adapter, optimizer, cursor and running sums."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from tandem.model.trained_weights import TrainedWeights
from tandem.storage.atomic_files import atomic_folder, atomic_write_json
from tandem.storage.hashing import Damaged, hash_bytes, hash_file, read_object, sealed

_MARK = "checkpoint.json"
_OPTIMIZER = "optimizer.safetensors"
_WAY_OUT = "Restore it, or remove its folder to go on from an earlier step."
_KINDS = {"progress": dict, "files": dict}


@dataclass
class RunState:
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
        weights: what is trained, which knows how it is saved.
        keep: how many of the newest stay, all when None.
        lines: files of JSON lines that grow along with the run. A checkpoint knows what was in
            them.
    """

    def __init__(
        self,
        folder: Path,
        weights: TrainedWeights,
        *,
        keep: int | None,
        lines: Sequence[Path] = (),
    ) -> None:
        self.folder = folder
        self.weights = weights
        self.keep = keep
        self.lines = lines

    def save(
        self,
        model: Any,
        trained: Mapping[str, Tensor],
        optimizer: Mapping[str, Tensor],
        progress: RunState,
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
            self.weights.save(model, aside, trained)
            save_file(dict(optimizer), aside / _OPTIMIZER)
            digests = {f.name: hash_file(f) for f in sorted(aside.iterdir()) if f.is_file()}
            mark = {
                "progress": asdict(progress),
                "files": digests,
                "lines": {file.name: hash_bytes(_content(file)) for file in self.lines},
            }
            atomic_write_json(aside / _MARK, sealed(mark))
        for old in self._all()[: -self.keep] if self.keep else []:
            shutil.rmtree(old)
        return path

    def newest(
        self,
        log: Callable[[str], None] = lambda _: None,
        usable: Callable[[RunState], str] = lambda _: "",
    ) -> Path | None:
        """The newest checkpoint whose files are all there and unchanged.

        Args:
            log: told of each newer one that is passed over, and why.
            usable: why a run that stood there cannot go on from it; empty where it can.
        """
        for path in reversed(self._all()):
            try:
                why = usable(read_checkpoint(path)[0])
            except Damaged as error:
                why = str(error)
            if not why:
                return path
            log(f"{path.name} is passed over: {why}")
        return None

    def load(self, path: Path, model: Any) -> tuple[RunState, dict[str, Tensor]]:
        """Put the adapter's weights back to where `save` found them, bit for bit.

        Returns the progress and the optimizer's tensors.
        """
        self.weights.load(model, path)
        return read_checkpoint(path)[0], load_file(path / _OPTIMIZER)

    def steps(self) -> list[RunState]:
        """Where the run stood at each checkpoint that is whole, the oldest first."""
        found = []
        for path in self._all():
            with suppress(Damaged):
                found.append(_progress(path, _mark(path)))
        return found

    def changed_lines(self, path: Path) -> list[Path]:
        """The files of lines that do not hold what they held at a checkpoint."""
        known = _mark(path).get("lines", {})
        return [
            file
            for file in self.lines
            if file.name in known and hash_bytes(_content(file)) != known[file.name]
        ]

    def clear(self) -> None:
        """Remove all checkpoints and the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def path_of(self, step: int) -> Path:
        """Where the checkpoint of a step is, or would be."""
        return self.folder / f"step-{step:06d}"

    def _all(self) -> list[Path]:
        """The checkpoints' folders, the oldest first."""
        found = self.folder.glob("step-*") if self.folder.is_dir() else ()
        return sorted((p for p in found if _step_of(p) >= 0), key=_step_of)


def read_checkpoint(path: Path) -> tuple[RunState, dict[str, str]]:
    """Where a run stood at a checkpoint, and its files by their hashes.

    Raises Damaged for one that is not whole, or is another step's.
    """
    mark = _mark(path)
    files = mark["files"]
    if _OPTIMIZER not in files or len(files) < 2:
        raise Damaged(f"{path / _MARK} names no adapter or no optimizer. {_WAY_OUT}")
    for name, digest in files.items():
        file = path / name
        if not file.is_file() or hash_file(file) != digest:
            raise Damaged(f"{file} is missing or damaged. {_WAY_OUT}")
    return _progress(path, mark), files


def copy_adapter(checkpoint: Path, folder: Path) -> None:
    """Copy a checkpoint's adapter, and nothing else of it, into a folder.

    Raises Damaged when the checkpoint is not whole.
    """
    _, files = read_checkpoint(checkpoint)
    for name in sorted(files):
        if name != _OPTIMIZER:
            shutil.copyfile(checkpoint / name, folder / name)


def _mark(path: Path) -> dict[str, Any]:
    return read_object(path / _MARK, _KINDS, _WAY_OUT)


def _progress(path: Path, mark: Mapping[str, Any]) -> RunState:
    known = {one.name for one in fields(RunState)}
    said = mark["progress"]
    figures = [value for key, value in said.items() if key != "sums"]
    fits = said.keys() <= known and isinstance(said.get("sums", {}), dict)
    fits &= all(one is None or type(one) in (int, float) for one in figures)
    if not fits or said.get("step") != _step_of(path):
        raise Damaged(f"{path / _MARK} is not of {path.name}. {_WAY_OUT}")
    return RunState(**said)


def _step_of(path: Path) -> int:
    """The step of a checkpoint's folder, -1 where its name says none."""
    number = path.name.removeprefix("step-")
    return int(number) if number.isdecimal() else -1


def _content(file: Path) -> bytes:
    return file.read_bytes() if file.exists() else b""
