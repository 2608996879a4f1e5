"""Exports a model to a GGUF file, and compares a file with a model before anybody relies on it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from tandem.data.tokenize.chat_template import tokenize
from tandem.export.choices import ExportJob, check_request
from tandem.export.compare_tokens import (
    TokensCompared,
    compare_tokens,
    model_ids,
    settle_prefix,
)
from tandem.export.compare_weights import (
    WeightsCompared,
    compare_logps,
    compare_settings,
    compare_tensors,
)
from tandem.export.converter import convert
from tandem.export.families import family_of, remarks, settings_of
from tandem.export.gguf_file import GgufFile
from tandem.export.probes import CONVERSATIONS, TEXTS, sequences
from tandem.export.source import SourceModel, read_source
from tandem.export.vocabulary import FileVocabulary, vocabulary_of
from tandem.export.write_gguf import check_room, file_bytes, file_tensors, write_gguf
from tandem.runtime.console import log, phase
from tandem.storage.atomic_files import atomic_file
from tandem.wording import size

Report = Callable[..., None]
"""Puts a line on the console, in a style."""


@dataclass(frozen=True)
class Compared:
    """What was compared of a file, and what differs without being a mistake."""

    tokens: TokensCompared
    weights: WeightsCompared

    def lines(self) -> list[str]:
        """The result in words."""
        formats = ", ".join(f"{count} {name}" for name, count in self.weights.formats.items())
        return [
            f"{sum(self.weights.formats.values())} tensors compared ({formats}), "
            f"{self.weights.exact} of them bit for bit",
            f"log-probs of {self.weights.tokens} tokens, computed from the file alone: within "
            f"{self.weights.from_rounded:.2g} nats of the model with the same rounding, and within "
            f"{self.weights.from_model:.2g} nats of the model as it is (KL {self.weights.kl:.2g})",
            f"{self.tokens.texts} texts and {self.tokens.conversations} conversations have the "
            "same tokens by the file's tokenizer and chat template",
        ]


def export_gguf(job: ExportJob, console: Console) -> Path:
    """Write a model as a GGUF file that was read back and compared; returns its path.

    Raises UserError, and leaves no file, for a model that cannot be written, a disk without room,
    an output that exists, and a file that does not agree with the model.
    """
    report = reporter(console)
    check_request(job.output)
    source = read_source(job.model, job.chat_template, report)
    began = time.perf_counter()
    write_compared(job, source, plan_vocabulary(job, source, report), job.output, console)
    seconds = time.perf_counter() - began
    report(f"{size(job.output.stat().st_size)}, {seconds:.1f} s -> {job.output}")
    return job.output


def reporter(console: Console) -> Report:
    """What puts a line of an export on a console."""

    def report(text: str, style: str = "") -> None:
        log(console, f"export: {text}", style=style)

    return report


def plan_vocabulary(job: ExportJob, source: SourceModel, report: Report) -> FileVocabulary:
    """The vocabulary of a file that is to be written, compared before anything is.

    Raises UserError for a model, or a tokenizer, that a GGUF file cannot be made of.
    """
    settings_of(source.config)  # refuses what the format cannot say
    vocabulary, notices = vocabulary_of(
        source.chat.tokenizer, source.chat.template, source.chat.rows, job.name or source.name
    )
    for notice in (*notices, *remarks(source.config)):
        report(notice, "yellow")
    named = _named_for_phi3(vocabulary, source)
    if named.name != vocabulary.name:
        report(
            f"the file calls the model {named.name!r}: llama.cpp takes Phi-3's way with blanks "
            "after special tokens from the name",
            "yellow",
        )
    settled = settle_prefix(named, source.chat)
    compare_tokens(settled, source.chat)
    return settled


def write_compared(
    job: ExportJob, source: SourceModel, vocabulary: FileVocabulary, path: Path, console: Console
) -> None:
    """Write a file, and give it its name once it was compared; see `export_gguf`."""
    report = reporter(console)
    wanted = job.format or source.stored_format
    tensors = file_tensors(source.model, wanted)
    check_room(file_bytes(tensors, vocabulary), path.parent)
    kept = [one.name for one in tensors if one.format == "F16"] if wanted == "q8_0" else []
    if kept:
        report(
            f"{len(kept)} tensors are f16, as their rows are no multiple of 32 numbers: {kept[0]}"
            f"{', ...' if len(kept) > 1 else ''}",
            "yellow",
        )
    with atomic_file(path) as file:
        aside = Path(str(file.name))
        if job.converter is not None:
            convert(job.converter, source.folder, aside, wanted)
        else:
            total = sum(one.nbytes for one in tensors)
            with phase(console, "export: bytes written", total) as done:
                write_gguf(aside, source.folder, source.model, vocabulary, wanted, done)
        compared = _compare(GgufFile(aside), source, console)
    for line in compared.lines():
        report(line)
    for remark in compared.tokens.remarks:
        report(remark, "yellow")


def check_gguf(path: Path, model: str, chat_template: str | None, console: Console) -> Compared:
    """Compare a GGUF file, whoever wrote it, with a model; raises UserError where they disagree."""
    report = reporter(console)
    check_request(None)
    file = GgufFile(path)
    source = read_source(model, chat_template, report)
    for remark in remarks(source.config):
        report(remark, "yellow")
    compared = _compare(file, source, console)
    for remark in compared.tokens.remarks:
        report(remark, "yellow")
    return compared


def _compare(file: GgufFile, source: SourceModel, console: Console) -> Compared:
    """Compare all of a file, the quickest first; raises UserError where it disagrees."""
    compare_settings(file, source.config)
    tokens = compare_tokens(file.vocabulary(), source.chat)
    with phase(console, "export: tensors read back", None) as done:
        formats, exact = compare_tensors(file, source.folder, source.model, done)
    probes = sequences(
        tokenize(source.chat.tokenizer, list(TEXTS)),
        model_ids(source.chat, CONVERSATIONS[0], prompt=True) or [],
        sum(weight.numel() for weight in source.model.parameters()),
    )
    from_rounded, from_model, kl = compare_logps(file, source.folder, source.model, probes)
    count = sum(len(ids) - 1 for ids in probes)
    return Compared(
        tokens, WeightsCompared(dict(formats), exact, from_rounded, from_model, kl, count)
    )


def _named_for_phi3(vocabulary: FileVocabulary, source: SourceModel) -> FileVocabulary:
    """A name with Phi-3 in it where, and only where, the tokenizer strips what follows its tokens.

    llama.cpp knows that by the name alone.
    """
    if family_of(source.config).architecture != "phi3":
        return vocabulary
    added: dict[int, Any] = source.chat.tokenizer.added_tokens_decoder
    strips = any(token.rstrip for token in added.values())
    named = any(form in vocabulary.name.lower() for form in ("phi-3", "phi3"))
    if strips and not named:
        return replace(vocabulary, name=f"{vocabulary.name} (Phi-3)")
    if named and not strips:
        return replace(vocabulary, name="model")
    return vocabulary
