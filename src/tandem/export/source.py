"""The model that is exported: its folder, its configuration, and how conversations reach it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tandem.data.tokenize.chat_template import resolve_template
from tandem.errors import UserError
from tandem.export.choices import FileFormat
from tandem.export.compare_tokens import ChatModel
from tandem.export.families import family_of
from tandem.model.companion_files import all_stop_ids
from tandem.model.model_folder import (
    check_unquantized,
    check_whole,
    load_config,
    load_tokenizer,
    model_folder,
    model_without_weights,
)
from tandem.model.weight_files import stored_dtype
from tandem.storage.manifest import check_made
from tandem.storage.run_folder import model_in_run

_FORMATS: dict[torch.dtype, FileFormat] = {torch.bfloat16: "bf16", torch.float16: "f16"}


@dataclass(frozen=True)
class SourceModel:
    """A model that is exported; `model` has no weights."""

    folder: Path
    name: str
    config: Any  # of transformers
    model: Any
    chat: ChatModel
    stored_format: FileFormat  # in which its weights are stored


def read_source(
    name: str, chat_template: str | None, report: Callable[..., None], *, family: bool = True
) -> SourceModel:
    """Look at a model that is to be exported, without reading its weights.

    `family`: whether GGUF must have its family. Raises UserError for an adapter, a quantised model,
    one that is not whole, one of another family, and one without a chat template.
    """
    inside = model_in_run(name)
    if inside != name:
        report(f"{name} is a run; exporting its {inside}")
    folder = model_folder(inside)
    config = load_config(folder)
    check_unquantized(folder, config)
    if family:
        family_of(config)
    model = model_without_weights(config, folder)
    check_whole(folder, model)
    check_made(folder, lambda text: report(text, "yellow"), weights=False)
    tokenizer = load_tokenizer(folder)
    if chat_template is None and not tokenizer.chat_template:
        raise UserError(
            f"{folder} has no chat template, and programs that serve it would take one of their "
            "own. Name the one that it was trained with: --chat_template and a shipped one or a "
            ".jinja file."
        )
    template = resolve_template(tokenizer, chat_template)
    for notice in template.notices:
        report(notice, "yellow")
    stops = tuple(all_stop_ids(folder, tokenizer, template))
    rows = int(config.get_text_config().vocab_size)
    return SourceModel(
        folder,
        _model_name(Path(name), folder),
        config,
        model,
        ChatModel(tokenizer, template, stops, rows),
        _FORMATS.get(stored_dtype(folder), "f32"),
    )


def _model_name(asked: Path, folder: Path) -> str:
    """What a file calls the model: the folder that the user named, else the model's own."""
    return asked.name or folder.resolve().name
