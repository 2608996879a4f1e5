"""A training stage's data: read, encoded, divided into trained and held-out records, weighted."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from tandem.data.batching.sampler import WeightedSource
from tandem.data.build_dataset import build_dataset
from tandem.data.encoded.dataset import EncodedDataset
from tandem.data.encoded.dataset_store import EncodedStore
from tandem.data.encoded.encode_chunk import EncodingOptions
from tandem.data.encoded.worker_pool import EncodingWork
from tandem.data.formats.format import Kind
from tandem.data.formats.known_formats import OF_TOKENS
from tandem.data.ledger import Ledger
from tandem.data.sources.rows import looks_like_path, not_read
from tandem.data.tokenize.encode import ChatTokenizer
from tandem.errors import UserError
from tandem.recipe.data_source import DataSource
from tandem.recipe.training_settings import TrainingSettings
from tandem.runtime.console import log, phase
from tandem.stages.training.held_out import HeldOut, hold_out
from tandem.stages.training.outputs import examples_hash
from tandem.storage.hashing import hash_json
from tandem.storage.run_folder import labels_of


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


def names_of(sources: Sequence[DataSource]) -> list[str]:
    """A name for each data set: the end of its path by which it differs from the others.

    Several parts of one path are told apart by subset and split, or else by their numbers.
    """
    paths = list(dict.fromkeys(source.path for source in sources))
    labels = dict(zip(paths, labels_of(paths), strict=True))
    shared = Counter(source.path for source in sources)
    names = [
        labels[one.path]
        if shared[one.path] == 1
        else ":".join(filter(None, (labels[one.path], one.subset, one.split)))
        for one in sources
    ]
    again, seen = Counter(names), Counter[str]()
    for place, name in enumerate(names):
        seen[name] += 1
        if again[name] > 1:
            names[place] = f"{name}:{seen[name]}"
    return names


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
class TrainingData:
    """What a stage trains on and scores."""

    dataset: EncodedDataset  # the examples that are trained on
    ledger: Ledger  # what became of all records that were read for it; not written yet
    parts: tuple[WeightedSource, ...]  # how many of them each data set gave, with its weight
    mixture: list[dict[str, Any]]  # the same for summary.json
    held_out: HeldOut | None  # those that are scored on the way
    sizes: dict[str, int]  # how many examples each data set gave, by its name

    def write_ledgers(self) -> None:
        """Write data-ledger.jsonl, and validation-ledger.jsonl for data sets held out."""
        self.ledger.write()
        if self.held_out is not None and self.held_out.ledger is not None:
            self.held_out.ledger.write()

    def warnings(self) -> tuple[str, ...]:
        """What a reader of the scores should know, as logged before the first step."""
        return () if self.held_out is None else self.held_out.warnings

    def identity(self) -> str:
        """One hash of all examples, trained on or held out."""
        held_out = "" if self.held_out is None else examples_hash(self.held_out.dataset)
        return hash_json([examples_hash(self.dataset), held_out])


@dataclass(frozen=True)
class StageReader:
    """Reads and encodes the data of a training stage."""

    name: str  # the stage's, before each line on the console
    kind: Kind  # of its records
    settings: TrainingSettings
    chat: ChatTokenizer  # the model's tokenizer and template
    folder: Path | None  # the stage's; None where nothing is to be written
    console: Console

    def log(self, text: str) -> None:
        """Log a line of the stage."""
        log(self.console, f"{self.name}: {text}")

    def read(
        self, sources: Sequence[DataSource], held_out: Sequence[DataSource], seed: int
    ) -> TrainingData:
        """All records of the stage, divided into those to train on and those held out.

        `held_out` are data sets that are held out as a whole, `seed` chooses a held-out fraction.
        Raises UserError for bad data, and when more records would be dropped than may be.
        """
        for line in not_read([*sources, *held_out]):
            self.log(line)
        ledger, whole = self.encode(sources)
        dataset, scored = hold_out(
            self.settings, whole, ledger,
            seed=seed, prepare=lambda: self.encode(held_out, held_out=True), log=self.log,
        )  # fmt: skip
        counted = zip(dataset.sources, sources, strict=True)
        parts = tuple(WeightedSource(count, source.weight) for count, source in counted)
        if scored is not None:
            named = held_out or sources
            scored = replace(scored, sizes=_sizes(named, scored.dataset))
        data = TrainingData(
            dataset, ledger, parts, mixture_facts(parts, sources), scored, _sizes(sources, dataset)
        )
        for warning in data.warnings():
            log(self.console, f"{self.name}: {warning}", style="yellow")
        if line := in_one_line(data.mixture):
            self.log(line)
        return data

    def encode(
        self, sources: Sequence[DataSource], *, held_out: bool = False
    ) -> tuple[Ledger, EncodedDataset]:
        """The examples of some sources, and their ledger, which is not written yet."""
        began = time.perf_counter()
        named = f"{'validation' if held_out else 'data'}-ledger.jsonl"
        ledger = Ledger(None if self.folder is None else self.folder / named)
        work = EncodingWork(
            store=EncodedStore(self.log),
            progress=lambda text, total: phase(self.console, f"{self.name}: {text}", total),
        )
        options = EncodingOptions.of(self.kind, self.settings)
        dataset = build_dataset(sources, self.chat, options, ledger, work)
        for line in sources_in_words(ledger):
            self.log(f"{'held out: ' if held_out else ''}{line}")
        if options.loss_on == "text" and set(ledger.formats.values()) <= OF_TOKENS and not held_out:
            raise UserError(
                f"{self.name}: loss_on: text has no effect, because all data is tokens, whose "
                "`labels` say what is trained. Leave it out."
            )
        counts = ledger.summary()
        split = counts.get("split")
        self.log(
            f"{counts['trained']} of {counts['read']} records "
            f"{'to score' if held_out else 'to train on'}, "
            f"{counts['truncated']} truncated, {counts['dropped']} dropped"
            + (f", {split} split, {len(dataset)} examples in all" if split else "")
            + (f" (each in {ledger.path})" if counts["reasons"] and ledger.path else "")
            + f", encoded in {time.perf_counter() - began:.1f} s"
        )
        for reason, count in counts["reasons"].items():
            log(self.console, f"  {count} x {reason}")
        ledger.check_share(self.settings.max_dropped)
        return ledger, dataset


def _sizes(sources: Sequence[DataSource], dataset: EncodedDataset) -> dict[str, int]:
    return dict(zip(names_of(sources), dataset.sources, strict=True))


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
