"""Writes a random model of an architecture, with the tokenizer of the model that it stands for."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from tandem.errors import UserError
from tandem.model.model_folder import first_line, read_config
from tandem.model.stand_in.smaller_config import smaller_values

# What is copied beside the weights, by its suffix; folders hold templates of older transformers.
_COPIED = (".json", ".jinja", ".model", ".tiktoken", ".txt")
_NOT_COPIED = ("config.json", "manifest.json", "summary.json")
_INDEX = ".index.json"
# A small configuration with more numbers than this is not one that a rehearsal can use.
_MOST = 400_000_000
_SEED = 20_231


@dataclass(frozen=True)
class StandIn:
    """A model that stands in for another."""

    folder: Path
    architecture: str  # the class of the model
    layers: tuple[int, int]  # of the stand-in, and of the model that it stands for
    width: tuple[int, int]  # the same
    rows: int  # of its vocabulary
    parameters: int  # all in float32


def make_stand_in(source: Path, folder: Path, *, labels: int | None = None) -> StandIn:
    """Write a small random model of the architecture of `source` into `folder`.

    Args:
        source: a folder with a configuration and a tokenizer; it needs no weights.
        folder: is made; it gets configuration, weights and the tokenizer's files.
        labels: of a sequence classifier; None makes a causal language model.

    Raises UserError for a configuration of which no small model can be made.
    """
    config = read_config(source)
    small = _small(config, source, labels)
    model = _random(small, source, labels)
    transformers_logging.disable_progress_bar()  # tandem draws its own
    folder.mkdir(parents=True)
    # What rounding to narrow numbers would take of random weights says nothing about real ones.
    model.save_pretrained(folder)
    for file in source.iterdir():
        own = file.name in _NOT_COPIED or file.name.endswith(_INDEX)
        if file.is_file() and file.suffix in _COPIED and not own:
            shutil.copyfile(file, folder / file.name)
    before, after = config.get_text_config(), small.get_text_config()
    return StandIn(
        folder, type(model).__name__,
        (int(after.num_hidden_layers), int(before.num_hidden_layers)),
        (int(after.hidden_size), int(before.hidden_size)),
        int(after.vocab_size), sum(p.numel() for p in model.parameters()),
    )  # fmt: skip


def _small(config: Any, source: Path, labels: int | None) -> Any:
    values = smaller_values(config.to_dict())
    values.pop("auto_map", None)  # the architecture is transformers' own
    if labels is not None:
        values |= {"num_labels": labels}
        values.pop("id2label", None)
        values.pop("label2id", None)
    try:
        return type(config).from_dict(values)
    except Exception as error:  # configurations check their values in their own ways
        raise _cannot(source, error) from None


def _random(config: Any, source: Path, labels: int | None) -> Any:
    """The model of a small configuration, the same numbers whenever it is made."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    kind: Any = AutoModelForCausalLM if labels is None else AutoModelForSequenceClassification
    state = torch.get_rng_state()
    try:
        with torch.device("meta"):
            numbers = sum(p.numel() for p in kind.from_config(config).parameters())
        if numbers > _MOST:
            raise ValueError(f"it would still have {numbers:,} parameters")
        torch.manual_seed(_SEED)
        return kind.from_config(config, dtype=torch.float32).eval()
    except Exception as error:  # a strange configuration leads a constructor anywhere
        raise _cannot(source, error) from None
    finally:
        torch.set_rng_state(state)


def _cannot(source: Path, error: Exception) -> UserError:
    return UserError(
        f"{source / 'config.json'}: a small model of this architecture cannot be made "
        f"({first_line(error)}), so that the run cannot be rehearsed. `tandem check --recipe` and "
        "`tandem plan` look at data, template and memory without one."
    )
