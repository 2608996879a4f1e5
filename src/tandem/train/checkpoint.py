"""Where a run stands, and its checkpoints, each of them complete."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import KW_ONLY, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from tandem.model.trained_weights import TrainedWeights
from tandem.storage.atomic_files import atomic_folder, atomic_write_json, atomic_write_text
from tandem.storage.hashing import Damaged, hash_bytes, hash_file, read_object, sealed

_MARK = "checkpoint.json"
_OPTIMIZER = "optimizer.safetensors"
_WAY_OUT = "Restore it, or remove its folder to resume from an earlier step."
_KINDS = {"progress": dict, "files": dict}


@dataclass
class RunState:
    """Where a training run stands: what a resume needs beside tensors, and the final figures."""

    step: int = 0  # finished optimizer steps
    sums: dict[str, float] = field(default_factory=dict)  # since the last logged step
    seconds: float = 0.0
    examples: int = 0
    tokens: int = 0
    padded_tokens: int = 0  # what padded batches of a usual size would have fed
    shared_tokens: int = 0  # what sharing prefixes saved
    micro_batches: int = 0
    # sums over the steps, see `data.packing.StepPlan`
    fill: float = 0.0
    imbalance: float = 0.0
    validation_seconds: float = 0.0
    sample_seconds: float = 0.0
    # the step whose adapter scored best on held-out records so far, and its score
    best_step: int | None = None
    best: float | None = None
    # the same of the score that early stopping waits to be improved, and how many did not
    early_step: int | None = None
    early_best: float | None = None
    early_waited: int = 0


@dataclass(frozen=True)
class CheckpointStore:
    """A folder of checkpoints: step-000100, step-000200, ..."""

    folder: Path
    weights: TrainedWeights  # know how they are saved
    _: KW_ONLY
    keep: int | None  # how many of the newest stay, all when None
    lines: Sequence[Path] = ()  # files of JSON lines; a checkpoint knows what was in them

    def save(
        self,
        model: Any,
        trained: Mapping[str, Tensor],
        optimizer: Mapping[str, Tensor],
        state: RunState,
    ) -> Path:
        """Write one checkpoint aside, sync it, move it into place, remove the oldest.

        `trained` and `optimizer` are the trained weights and the optimizer's tensors, whole.
        """
        path = self.path_of(state.step)
        with atomic_folder(path) as aside:
            self.weights.save(model, aside, trained)
            save_file(dict(optimizer), aside / _OPTIMIZER)
            digests = {f.name: hash_file(f) for f in sorted(aside.iterdir()) if f.is_file()}
            mark = {
                "progress": asdict(state),
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

        `usable` says why a run cannot resume from one, or nothing; `log` names skipped ones.
        """
        for path in reversed(self._all()):
            try:
                why = usable(read_checkpoint(path)[0])
            except Damaged as error:
                why = str(error)
            if not why:
                return path
            log(f"{path.name} is skipped: {why}")
        return None

    def load(self, path: Path, model: Any) -> tuple[RunState, dict[str, Tensor]]:
        """Load the trained weights, bit for bit; returns progress and optimizer tensors."""
        self.weights.load(model, path)
        return read_checkpoint(path)[0], load_file(path / _OPTIMIZER)

    def steps(self) -> list[RunState]:
        """Where the run stood at each checkpoint that is whole, the oldest first."""
        states = []
        for path in self._all():
            with suppress(Damaged):
                states.append(_progress(path, _mark(path)))
        return states

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
        return sorted((p for p in self.folder.glob("step-*") if _step_of(p) >= 0), key=_step_of)


def read_checkpoint(path: Path) -> tuple[RunState, dict[str, str]]:
    """Where a run stood, and its files' hashes; raises Damaged for an incomplete checkpoint."""
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
    """Copy a checkpoint's adapter alone into a folder; raises Damaged where it is not whole."""
    _, files = read_checkpoint(checkpoint)
    for name in sorted(files):
        if name != _OPTIMIZER:
            shutil.copyfile(checkpoint / name, folder / name)


def _mark(path: Path) -> dict[str, Any]:
    return read_object(path / _MARK, _KINDS, _WAY_OUT)


def _progress(path: Path, mark: Mapping[str, Any]) -> RunState:
    known = {one.name for one in fields(RunState)}
    values = mark["progress"]
    figures = [value for key, value in values.items() if key != "sums"]
    fits = values.keys() <= known and isinstance(values.get("sums", {}), dict)
    fits &= all(one is None or type(one) in (int, float) for one in figures)
    if not fits or values.get("step") != _step_of(path):
        raise Damaged(f"{path / _MARK} is not of {path.name}. {_WAY_OUT}")
    return RunState(**values)


def _step_of(path: Path) -> int:
    """The step of a checkpoint's folder, -1 where its name says none."""
    number = path.name.removeprefix("step-")
    return int(number) if number.isdecimal() else -1


def _content(file: Path) -> bytes:
    return file.read_bytes() if file.exists() else b""


def forget_after(path: Path, step: int) -> None:
    """Remove the lines of later steps from a file of metrics, and those that are damaged."""
    if not path.exists():
        return
    lines = path.read_bytes().split(b"\n")[:-1]
    kept = b"".join(line + b"\n" for line in lines if _step_in(line) <= step)
    atomic_write_text(path, kept.decode())


def _step_in(line: bytes) -> float:
    """The step of a line of metrics; infinity for a line that cannot be read."""
    try:
        match json.loads(line.decode()):
            case {"step": int(step)}:
                return step
    except (ValueError, RecursionError):
        pass
    return math.inf
