"""The words that exports choose among, and what one is asked to do."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tandem.errors import UserError, require

FileFormat = Literal["f32", "f16", "bf16", "q8_0"]


@dataclass(frozen=True)
class ExportJob:
    """A model to write for another program."""

    model: str  # a run's folder, a model's folder, or a Hub id
    output: Path  # a file, or for Ollama a folder
    format: FileFormat | None = None  # of matrices; None: as they are stored
    chat_template: str | None = None  # a name or a file; None: the model's own
    name: str | None = None  # what the file calls the model; None: its folder's name
    converter: Path | None = None  # llama.cpp's convert_hf_to_gguf.py; None: tandem writes
    system: str | None = None  # Ollama's system prompt where a request has none


def check_request(output: Path | None) -> None:
    """Raise UserError where the package gguf is missing, or something is at the output already."""
    require("gguf", "gguf", "tandem export")
    if output is not None and output.exists():
        raise UserError(f"{output} exists. Name another --output, or remove it.")
