"""How a training stage's data sets are mixed: the weight of each, and its share of an epoch."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from tandem.data.batching.sampler import WeightedSource
from tandem.data.encoded.dataset import EncodedDataset
from tandem.data.encoded.dataset_store import EncodedStore
from tandem.data.ledger import Ledger
from tandem.data.sources.rows import looks_like_path, not_read
from tandem.data.tokenize.chat_template import ChatTemplate
from tandem.recipe.data_source import DataSource
from tandem.recipe.training_settings import TrainingSettings
from tandem.runtime.console import log, phase
from tandem.stages.training.held_out import HeldOut, hold_out
from tandem.stages.training.outputs import examples_hash
from tandem.storage.hashing import hash_json


def parts_of(dataset: EncodedDataset, sources: Sequence[DataSource]) -> tuple[WeightedSource, ...]:
    """The records of each source with its weight, in reading order."""
    return tuple(
        WeightedSource(count, source.weight)
        for count, source in zip(dataset.sources, sources, strict=True)
    )


def mixture_facts(
    parts: Sequence[WeightedSource], sources: Sequence[DataSource]
) -> list[dict[str, Any]]:
    """Each source's records, weight, and what the first epoch shows of it, for summary.json."""
    shown = [part.shown(1) for part in parts]
    return [
        {
            "path": source.path,
            "split": source.split,
            "records": part.examples,
            "weight": part.weight,
            "shown": count,
            "share": count / sum(shown),
        }
        for part, source, count in zip(parts, sources, shown, strict=True)
    ]


def in_one_line(facts: Sequence[dict[str, Any]]) -> str:
    """What an epoch shows of each source; empty for a single one that is shown once."""
    if len(facts) == 1 and facts[0]["weight"] == 1.0:
        return ""
    each = ", ".join(
        f"{fact['share']:.1%} {fact['path']} ({fact['records']} records, weight {fact['weight']:g})"
        for fact in facts
    )
    return f"an epoch shows {sum(fact['shown'] for fact in facts)} records: {each}"


@dataclass(frozen=True)
class Records:
    """What a stage trains on and scores.

    Attributes:
        trees: the records that are trained on.
        ledger: what became of all that were read for it; not written yet.
        parts: how many of them each data set gave, with its weight.
        mixture: the same in words, for summary.json.
        held_out: those that are scored on the way.
    """

    dataset: EncodedDataset
    ledger: Ledger
    parts: tuple[WeightedSource, ...]
    mixture: list[dict[str, Any]]
    held_out: HeldOut | None

    def write_ledgers(self) -> None:
        """Write data-ledger.jsonl, and validation-ledger.jsonl for data sets held out."""
        self.ledger.write()
        if self.held_out is not None and self.held_out.ledger is not None:
            self.held_out.ledger.write()

    def warnings(self) -> tuple[str, ...]:
        """What a reader of the scores should know, as said before the first step."""
        return () if self.held_out is None else self.held_out.warnings

    def identity(self) -> str:
        """One hash of all records, trained on or held out."""
        held_out = "" if self.held_out is None else examples_hash(self.held_out.dataset)
        return hash_json([examples_hash(self.dataset), held_out])


def stage_records(
    prepare: Callable[..., EncodedDataset],
    sources: Sequence[DataSource],
    held_out: Sequence[DataSource],
    settings: TrainingSettings,
    *,
    tokenizer: Any,
    template: ChatTemplate,
    folder: Path | None,
    name: str,
    seed: int,
    console: Console,
    rows: int | None = None,
) -> Records:
    """All records of a stage, divided into those to train on and those held out.

    Args:
        held_out: data sets that are held out as a whole.
        seed: of a held-out fraction.

    The others, and what is raised, are those of `prepared_records`.
    """
    prepared = partial(
        prepared_records,
        prepare,
        settings=settings,
        tokenizer=tokenizer,
        template=template,
        folder=folder,
        name=name,
        console=console,
        rows=rows,
    )

    def note(text: str) -> None:
        log(console, f"{name}: {text}")

    for line in not_read([*sources, *held_out]):
        note(line)
    ledger, read = prepared(sources)
    dataset, held = hold_out(
        settings, read, ledger,
        seed=seed, prepare=lambda: prepared(held_out, held_out=True), log=note,
    )  # fmt: skip
    parts = parts_of(dataset, sources)
    records = Records(dataset, ledger, parts, mixture_facts(parts, sources), held)
    for warning in records.warnings():
        log(console, f"{name}: {warning}", style="yellow")
    if line := in_one_line(records.mixture):
        note(line)
    return records


def prepared_records(
    prepare: Callable[..., EncodedDataset],
    sources: Sequence[DataSource],
    settings: TrainingSettings,
    *,
    tokenizer: Any,
    template: ChatTemplate,
    folder: Path | None,
    name: str,
    console: Console,
    held_out: bool = False,
    rows: int | None = None,
) -> tuple[Ledger, EncodedDataset]:
    """A stage's records, and what became of each; the ledger is not written yet.

    Args:
        prepare: reads and encodes one kind of records, see `data.prepare`.
        sources: where they are.
        settings: of the stage.
        tokenizer, template: of the model.
        folder: the stage's, None where nothing is to be written.
        name: the stage's, before each line on the console.
        console: for progress and counts.
        held_out: whether they are scored and not trained on; they have a ledger of their own.
        rows: of the model's embedding; None: every token has one.

    Raises UserError for bad data, and when more records would be dropped than may be.
    """
    began = time.perf_counter()
    named = f"{'validation' if held_out else 'data'}-ledger.jsonl"
    ledger = Ledger(None if folder is None else folder / named)
    dataset = prepare(
        sources,
        tokenizer=tokenizer,
        template=template,
        max_length=settings.max_length,
        max_prompt_length=settings.max_prompt_length,
        too_long=settings.too_long,
        on_bad_record=settings.on_bad_record,
        ledger=ledger,
        store=EncodedStore(lambda text: log(console, f"{name}: {text}")),
        show=lambda text, total: phase(console, f"{name}: {text}", total),
        rows=rows,
    )
    for line in sources_in_words(ledger):
        log(console, f"{name}: {'held out: ' if held_out else ''}{line}")
    counts = ledger.summary()
    log(
        console,
        f"{name}: {counts['trained']} of {counts['read']} records "
        f"{'to score' if held_out else 'to train on'}, "
        f"{counts['truncated']} truncated, {counts['dropped']} dropped"
        + (f" (each in {ledger.path})" if counts["reasons"] and ledger.path else "")
        + f", encoded in {time.perf_counter() - began:.1f} s",
    )
    for reason, count in counts["reasons"].items():
        log(console, f"  {count} x {reason}")
    ledger.check_share(settings.max_dropped)
    return ledger, dataset


def sources_in_words(ledger: Ledger) -> list[str]:
    """A line on each source: its format, and the keys of its rows that nothing reads.

    A file or folder goes by its own name, unless another source has the same.
    """
    named = {path: Path(path).name if looks_like_path(path) else "" for path in ledger.formats}
    names = {path: name or path for path, name in named.items()}  # `.` has no name
    shared = Counter(names.values())
    return [
        f"{name if shared[name] == 1 else path} is {ledger.formats[path]}"
        + (f"; not read: {', '.join(ledger.unread[path])}" if path in ledger.unread else "")
        for path, name in names.items()
    ]
