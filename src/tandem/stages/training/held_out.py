"""Held-out records of a training stage: where they come from, and how they are scored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tandem.data.batching.sampler import choose_held_out, shared_prompts
from tandem.data.encoded.dataset import EncodedDataset
from tandem.data.ledger import Ledger
from tandem.recipe.training_settings import TrainingSettings
from tandem.storage.atomic_files import read_jsonl
from tandem.train.callbacks.held_out_evaluation import Best
from tandem.train.checkpoint import RunState

# What makes an adapter the best, by the recipe's `best_metric`.
METRICS = {
    "loss": Best("loss", higher=False),
    "accuracy": Best("rewards/accuracies", higher=True),
    "margin": Best("rewards/margins", higher=True),
}


@dataclass(frozen=True)
class HeldOut:
    """The held-out records."""

    dataset: EncodedDataset
    ledger: Ledger | None  # of data sets of their own; None where they were training records
    warnings: tuple[str, ...] = ()  # what a reader of their scores should know
    shared: int = 0  # how many of them have a prompt that is trained on
    # how many examples each data set gave, by its name
    sizes: dict[str, int] = field(default_factory=dict)


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

    `prepare` reads and encodes the held-out data sets; `log` takes lines about what is held out,
    and prompts that both parts have. Raises UserError for data that cannot be used or divided.
    """
    validation = settings.validation
    if validation is None:
        return dataset, None
    if validation.fraction is not None:
        chosen = choose_held_out(dataset.prompts, validation.fraction, seed)
        trained, scored = (dataset.select(np.flatnonzero(which)) for which in (~chosen, chosen))
        ledger.hold_out(scored.records)
        log(
            f"{scored.records} of {dataset.records} records are held out, with every record of "
            f"their {len(np.unique(scored.prompts))} prompts; {trained.records} are trained on"
        )
        return trained, HeldOut(scored, None)
    own, scored = prepare()
    count, shared = shared_prompts(dataset.prompts, scored.prompts)
    if not shared:
        return dataset, HeldOut(scored, own)
    warning = (
        f"{shared} of {len(scored)} held-out records have a prompt that {count} training records "
        "have too, so that their scores say less about new prompts; take them out of one of the "
        "two, or hold out with validation.fraction, which divides by prompt"
    )
    return dataset, HeldOut(scored, own, (warning,), shared)


def kept_in_words(settings: TrainingSettings, state: RunState) -> str:
    """Which adapter becomes the stage's, where that was to be chosen; else empty."""
    if settings.keep != "best":
        return ""
    return (
        f"the adapter of step {state.best_step} of {state.step} is kept: the best held-out "
        f"{settings.best_metric}, {state.best:.4f}"
    )


def validation_summary(
    settings: TrainingSettings, held_out: HeldOut | None, state: RunState, folder: Path
) -> dict[str, Any]:
    """What summary.json says about held-out records: their counts, first, last and best scores."""
    if held_out is None:
        return {}
    lines = read_jsonl(folder / "validation.jsonl")
    return {
        "validation": {
            "records": len(held_out.dataset),
            "shared_prompts": held_out.shared,
            "seconds": state.validation_seconds,
            "first": lines[0],
            "last": lines[-1],
            **({} if held_out.ledger is None else {"ledger": held_out.ledger.summary()}),
        },
        "kept_step": state.best_step if settings.keep == "best" else state.step,
        **({"best_metric": settings.best_metric} if settings.keep == "best" else {}),
    }


def kept_warnings(settings: TrainingSettings, state: RunState) -> list[str]:
    """What a user should know about the adapter that was kept."""
    if settings.keep == "best" and state.best_step == 0:
        return [
            f"no score after training is better than the {settings.best_metric} before it, so the "
            "adapter that is kept changes nothing: lower the learning rate, or look at the data"
        ]
    return []
