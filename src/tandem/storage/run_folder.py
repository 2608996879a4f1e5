"""Names in a run's folder: its stages' folders and titles, made pairs, the newest model, labels."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Literal, get_args

from tandem.errors import UserError

StageName = Literal["sft", "sft-merge", "pairs", "dpo", "dpo-merge", "evaluate"]
TrainingStageName = Literal["sft", "dpo"]
PairsFormat = Literal["jsonl", "parquet"]
STAGES: tuple[StageName, ...] = get_args(StageName)
TRAINING_STAGES: tuple[TrainingStageName, ...] = get_args(TrainingStageName)
PAIRS_FORMATS: tuple[PairsFormat, ...] = get_args(PairsFormat)

# The kinds of stages, as manifests name them, and their titles.
KIND_TITLES = {
    "sft": "Supervised fine-tuning",
    "dpo": "Direct Preference Optimization",
    "merge": "Merge of an adapter",
    "pairs": "Preference pairs",
    "evaluate": "Evaluation",
}


@dataclass(frozen=True)
class StageFolder:
    """A stage's folder within a run's, what its manifest calls the stage, and its title."""

    name: str
    kind: str
    title: str


FOLDERS: dict[StageName, StageFolder] = {
    "sft": StageFolder("1-sft", "sft", KIND_TITLES["sft"]),
    "sft-merge": StageFolder("2-sft-merged", "merge", "Merge of the SFT adapter"),
    "pairs": StageFolder("3-pairs", "pairs", KIND_TITLES["pairs"]),
    "dpo": StageFolder("4-dpo", "dpo", KIND_TITLES["dpo"]),
    "dpo-merge": StageFolder("5-final", "merge", "Merge of the DPO adapter"),
    "evaluate": StageFolder("6-evaluation", "evaluate", KIND_TITLES["evaluate"]),
}


# Stages that a run with several rounds repeats, and the folder of a later round.
ROUND_STAGES: tuple[StageName, ...] = ("pairs", "dpo", "dpo-merge")
MOST_ROUNDS = 99
_ROUND_FOLDER = re.compile(r"round-(\d\d)")


@dataclass(frozen=True)
class Stage:
    """A stage of a run: what it does, and in which round, counted from 1.

    What no round repeats is of round 1, whose names and folders are those of a run without rounds.
    """

    work: StageName
    round: int = 1

    @property
    def name(self) -> str:
        """What commands call it: `dpo`, and in the second round `dpo-2`."""
        return self.work if self.round == 1 else f"{self.work}-{self.round}"

    @property
    def folder(self) -> str:
        """Its folder within the run's: `4-dpo`, and in the second round `round-02/4-dpo`."""
        name = FOLDERS[self.work].name
        return name if self.round == 1 else f"round-{self.round:02}/{name}"

    @property
    def kind(self) -> str:
        """What its manifest calls it."""
        return FOLDERS[self.work].kind

    @property
    def title(self) -> str:
        """Its title for people."""
        return self.titled(FOLDERS[self.work].title)

    def titled(self, title: str) -> str:
        """Return a title with the round, where it is a later one."""
        return title if self.round == 1 else f"{title}, round {self.round}"

    @property
    def place(self) -> tuple[bool, int, int]:
        """What sorts stages in the order in which they run; the evaluation is the last."""
        return self.work == "evaluate", self.round, STAGES.index(self.work)


def stage_folder(run: str | Path, stage: StageName, in_round: int = 1) -> Path:
    """Return the folder of one of a run's stages, whether it exists or not."""
    return Path(run) / Stage(stage, in_round).folder


def stages_in(run: Path) -> list[Stage]:
    """Return the stages whose folders a run's folder has, in the order in which they run."""
    rounds = (_ROUND_FOLDER.fullmatch(folder.name) for folder in run.glob("round-*"))
    later = [int(found[1]) for found in rounds if found and int(found[1]) > 1]
    stages = [Stage(work) for work in STAGES]
    stages += [Stage(work, number) for number in later for work in ROUND_STAGES]
    return sorted((s for s in stages if (run / s.folder).is_dir()), key=lambda s: s.place)


def run_of(folder: Path) -> Path:
    """Return the folder of the run in which a stage's folder is."""
    above = folder.parent
    return above.parent if _ROUND_FOLDER.fullmatch(above.name) else above


def stage_at(folder: Path) -> Stage | None:
    """Return the stage whose folder in a run has this name and place; None for another folder."""
    works = {FOLDERS[work].name: work for work in STAGES}
    if folder.name not in works:
        return None
    found = _ROUND_FOLDER.fullmatch(folder.parent.name)
    return Stage(works[folder.name], int(found[1]) if found else 1)


def pairs_file(folder: Path, name: str, kind: str) -> Path:
    """Return the file of pairs: `name` is pairs or heldout, `kind` jsonl or parquet."""
    return folder / f"{name}.{kind}"


def made_pairs(folder: Path, name: str = "pairs") -> Path | None:
    """Return the file of pairs that a stage's folder has, whatever its kind; None for none."""
    paths = (pairs_file(folder, name, kind) for kind in PAIRS_FORMATS)
    return next((path for path in paths if path.exists()), None)


def model_in_run(path: str) -> str:
    """Return the newest model of a run's folder, or any other path unchanged."""
    if (Path(path) / "config.json").exists():
        return path
    for stage in reversed(stages_in(Path(path))):
        # A training stage has a model where it trained all weights.
        inside = Path(path) / stage.folder
        if stage.kind in ("merge", *TRAINING_STAGES) and (inside / "config.json").exists():
            return str(inside)
    return path


def labels_of(models: Sequence[str]) -> list[str]:
    """Return the shortest path endings that differ for all models."""
    parts = [PurePath(m.rstrip("/")).parts or (m,) for m in models]
    for depth in range(1, max(map(len, parts), default=1) + 1):
        labels = ["/".join(p[-depth:]) for p in parts]
        if len(set(labels)) == len(labels):
            return labels
    return [f"{m} ({i})" for i, m in enumerate(models, start=1)]


def output_folder(path: Path, name: str) -> Path:
    """Resolve `~` in the folder that a command writes into; it need not exist yet.

    `name` is its flag or key, for the message. Raises UserError if it, or a parent, is a file.
    """
    try:
        path = path.expanduser()
    except RuntimeError as error:
        raise UserError(f"{name}: {path}: {error} Name another folder") from error
    for place in (path, *path.parents):
        if place.is_dir():
            break
        if place.exists():
            raise UserError(f"{name}: {place} is a file, not a folder; name another folder")
    return path
