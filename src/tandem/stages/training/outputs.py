"""What a training stage leaves behind: the adapter folder and the summary's figures."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from tandem.data.encoded.dataset import EncodedDataset
from tandem.data.tokenize.chat_template import find_ending
from tandem.model.companion_files import write_ends
from tandem.stages.training.context import TrainContext
from tandem.storage.atomic_files import atomic_folder, spelled
from tandem.storage.hashing import hash_bytes
from tandem.train.checkpoint import RunState, copy_adapter


def save_result(
    context: TrainContext, model: Any, trained: Mapping[str, Tensor], checkpoint: Path | None = None
) -> tuple[list[str], list[str]]:
    """Put adapter or model, tokenizer and chat template at the folder's root.

    Inference then uses the template of training, and ends answers as it does. The weights are
    those that were `trained`, or a checkpoint's. Returns the names of the files, and warnings.
    """
    tokenizer, template = context.base.tokenizer, context.base.template
    with atomic_folder(context.job.folder / "saving") as aside:
        if checkpoint is None:
            context.weights.save(model, aside, trained)
        else:
            copy_adapter(checkpoint, aside)
        warning = context.weights.finish(aside)
        tokenizer.chat_template = template.saved
        with spelled(aside) as named:
            tokenizer.save_pretrained(str(named))
        ending = find_ending(tokenizer, template)
        if ending and (line := write_ends(aside, context.base.folder, tokenizer, template, ending)):
            context.log(line)
    return move_up(context.job.folder / "saving"), [warning] if warning else []


def move_up(folder: Path) -> list[str]:
    """Move a complete folder's tree into its parent, and remove it; returns the files' names."""
    names = []
    for path in sorted(folder.rglob("*"), key=lambda path: path.parts):
        name = path.relative_to(folder)
        if path.is_dir():
            (folder.parent / name).mkdir(exist_ok=True)
        else:
            path.replace(folder.parent / name)
            names.append(name.as_posix())
    shutil.rmtree(folder)
    return names


def training_summary(state: RunState, dataset: EncodedDataset) -> dict[str, Any]:
    """Time, counts and lengths of a finished run, for summary.json.

    `train_seconds` includes collating and packing. `fill` is the mean share of the token budget
    that micro-batches fill, `imbalance` the costliest process's share of a step by the mean one.
    """
    return {
        "train_seconds": state.seconds,
        "examples": state.examples,
        "tokens": state.tokens,
        "padded_tokens": state.padded_tokens,
        "shared_tokens": state.shared_tokens,
        "steps": state.step,
        "micro_batches": state.micro_batches,
        "fill": state.fill / max(1, state.step),
        "imbalance": state.imbalance / max(1, state.step),
        "lengths": {
            "sequence": dataset.sequence_lengths.tolist(),
            "prompt": dataset.prompt_lengths.tolist(),
        },
        "examples_hash": examples_hash(dataset),
    }


def examples_hash(dataset: EncodedDataset) -> str:
    """Hash everything that is trained on: token ids, targets, and scores where there are any."""
    scores = dataset.scores
    scored = () if np.isnan(scores).all() else (scores.tobytes(),)
    return hash_bytes(dataset.branches.tobytes(), *dataset.all_digests(), *scored)


def packing_in_words(summary: Mapping[str, Any]) -> str:
    """Say how full micro-batches were, and how evenly the work was shared."""
    text = f"micro-batches {summary['fill']:.0%} full"
    if summary["processes"] > 1:
        text += f", the busiest process {summary['imbalance'] - 1:.1%} above the mean"
    return text
