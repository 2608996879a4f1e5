"""Held-out records of a training stage: where they come from, and how they are scored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tandem.data.batching.sampler import choose_held_out, shared_prompts, tenth
from tandem.data.encoded.dataset import EncodedDataset
from tandem.data.ledger import Ledger
from tandem.recipe.training_settings import TrainingSettings
from tandem.storage.atomic_files import read_jsonl
from tandem.train.checkpoint import RunState
from tandem.train.held_out_evaluation import Best

_METRICS = {
    "loss": Best("loss", higher=False),
    "accuracy": Best("rewards/accuracies", higher=True),
    "margin": Best("rewards/margins", higher=True),
}


@dataclass(frozen=True)
class HeldOut:
    """The held-out records.

    Attributes:
        trees: encoded.
        ledger: of data sets of their own; None where they were training records.
        warnings: what a reader of their scores should know.
        shared: how many of them have a prompt that is trained on.
    """

    dataset: EncodedDataset
    ledger: Ledger | None
    warnings: tuple[str, ...] = ()
    shared: int = 0


def hold_out(
    settings: TrainingSettings,
    dataset: EncodedDataset,
    ledger: Ledger,
    *,
    seed: int,
    prepare: Callable[[], tuple[Ledger, EncodedDataset]],
    log: Callable[[str], None],
) -> tuple[EncodedDataset, HeldOut | None]:
    """The records to train on, and those that are held out.

    Args:
        settings: of the stage.
        trees, ledger: of the stage's data sets.
        seed: of the choice.
        prepare: reads and encodes the held-out data sets.
        log: told what is held out, and the prompts that both parts have.

    Raises UserError for data that cannot be used or divided.
    """
    validation = settings.validation
    if validation is None:
        return dataset, None
    if validation.fraction is not None:
        held = choose_held_out(dataset.prompts, validation.fraction, seed)
        parts = [dataset.select(np.flatnonzero(which)) for which in (~held, held)]
        ledger.hold_out(len(parts[1]))
        log(
            f"{len(parts[1])} of {len(dataset)} records are held out, with every record of their "
            f"{len(np.unique(parts[1].prompts))} prompts; {len(parts[0])} are trained on"
        )
        return parts[0], HeldOut(parts[1], None)
    own, found = prepare()
    trained, shared = shared_prompts(dataset.prompts, found.prompts)
    if not shared:
        return dataset, HeldOut(found, own)
    warning = (
        f"{shared} of {len(found)} held-out records have a prompt that {trained} training records "
        "have too, so that their scores say less about new prompts; take them out of one of the "
        "two, or hold out with validation.fraction, which divides by prompt"
    )
    return dataset, HeldOut(found, own, (warning,), shared)


def best_by(settings: TrainingSettings) -> Best | None:
    """How the best adapter is told; None where the last one is kept."""
    return _METRICS[settings.best_metric] if settings.keep == "best" else None


def scored_every(settings: TrainingSettings, total: int) -> int:
    """Steps from one score to the next."""
    assert settings.validation is not None
    return settings.validation.steps or tenth(total)


def kept_in_words(settings: TrainingSettings, progress: RunState) -> str:
    """Which adapter becomes the stage's, where that was to be chosen; else empty."""
    if settings.keep != "best":
        return ""
    return (
        f"the adapter of step {progress.best_step} of {progress.step} is kept: the best held-out "
        f"{settings.best_metric}, {progress.best:.4f}"
    )


def validation_summary(
    settings: TrainingSettings, held_out: HeldOut | None, progress: RunState, folder: Path
) -> dict[str, Any]:
    """What summary.json says about held-out records: their counts, first, last and best scores."""
    if held_out is None:
        return {}
    lines = read_jsonl(folder / "validation.jsonl")
    return {
        "validation": {
            "records": len(held_out.dataset),
            "shared_prompts": held_out.shared,
            "seconds": progress.validation_seconds,
            "first": lines[0],
            "last": lines[-1],
            **({} if held_out.ledger is None else {"ledger": held_out.ledger.summary()}),
        },
        "kept_step": progress.best_step if settings.keep == "best" else progress.step,
        **({"best_metric": settings.best_metric} if settings.keep == "best" else {}),
    }


def kept_warnings(settings: TrainingSettings, progress: RunState) -> list[str]:
    """What a user should know about the adapter that was kept."""
    if settings.keep == "best" and progress.best_step == 0:
        return [
            f"no score after training is better than the {settings.best_metric} before it, so the "
            "adapter that is kept changes nothing: lower the learning rate, or look at the data"
        ]
    return []
