"""Inspect one chunk of a data set, in any process: its signs, and a few bytes of each record."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from tandem.check import record_signs
from tandem.check.column_signs import Columns
from tandem.check.duplicates import Fingerprints, fingerprints
from tandem.check.findings import Sign, Tally
from tandem.check.record_signs import Roles
from tandem.check.survey_result import CheckTarget, Measures, token_lengths
from tandem.check.text_signs import TextSigns
from tandem.check.unread_keys import UnreadKeys
from tandem.data.encoded.encode_chunk import (
    EncodingOptions,
    FitRecord,
    entries_of,
    example_of,
    fit_records,
    require_answers,
)
from tandem.data.encoded.example import Example
from tandem.data.encoded.worker_pool import Answer, ChunkWork
from tandem.data.ledger import Entry
from tandem.data.read_records import records_of
from tandem.data.records import Conversation, Document, Origin, Preference, Record
from tandem.data.sources.chunks import Chunk, RenamedChunk, RowChunk
from tandem.data.tokenize.codec import CodecParts
from tandem.data.tokenize.encode import ChatTokenizer
from tandem.data.truncation.limits import Limits
from tandem.errors import UserError

# Tokens of a record beyond which they are not counted: a text of 50 MB would take gigabytes.
_COUNTED = 2**17

_UNCOUNTED = Sign(
    "very_long", f"records of more than {_COUNTED:,} tokens, whose rest was not counted", "note",
    "A record this long is often a whole file by mistake: look at it.",
)  # fmt: skip
_RAW = Sign(
    "raw_text", "rows of a text alone, of which every token would be trained", "note",
    "SFT takes them with `loss_on: text`, and no other stage does.",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class InspectionPlan:
    """How chunks are inspected, apart from tokenizer and template."""

    options: EncodingOptions  # how records are encoded; bad rows are dropped
    limited: bool  # whether the limits are a recipe's
    special: tuple[str, ...]  # the tokenizer's special tokens
    shown: int  # rows of each finding
    compared: bool  # whether there are other sets, with which nothing should be shared


@dataclass(frozen=True, slots=True)
class InspectionSetup:
    """The setup of workers that inspect chunks; `parts` are of tokenizer and template, if any."""

    parts: CodecParts | None
    plan: InspectionPlan

    def ready(self) -> Answer[InspectedChunk]:
        chat = None if self.parts is None else ChatTokenizer.from_parts(self.parts)
        return Inspector(chat, self.plan).inspect


@dataclass(frozen=True, slots=True)
class InspectedChunk:
    """What a survey keeps of a chunk.

    `entries` and `trained` are for the ledger; `examples` is how many a recipe's stage would make.
    Where records could not be measured, `failed` says why, and they were not inspected further.
    """

    entries: tuple[Entry, ...]
    trained: int
    lengths: tuple[Measures, ...]
    tally: Tally
    answers: int = 0
    examples: int = 0
    roles: Roles = field(default_factory=Roles)
    keys: UnreadKeys = field(default_factory=UnreadKeys)
    prints: Fingerprints | None = None
    failed: UserError | None = None


def inspection(target: CheckTarget, compared: bool, shown: int) -> ChunkWork[InspectedChunk]:
    """Return how chunks of some data are inspected; `compared`: there are other sets.

    Bad rows do not end it, and only a recipe's limits cut.
    """
    options = replace(target.options, on_bad_record="drop")
    options = options if target.limited else replace(options, limits=Limits(_COUNTED, None))
    plan = InspectionPlan(options, target.limited, target.special, shown, compared)
    chat = target.chat
    parts = None if chat is None else chat.parts
    setup = InspectionSetup(parts, plan) if chat is None or parts is not None else None
    return ChunkWork(Inspector(chat, plan).inspect, setup)


class Inspector:
    """Inspects chunks; remembers what it found out about their columns' names."""

    def __init__(self, chat: ChatTokenizer | None, plan: InspectionPlan) -> None:
        self._chat, self._plan = chat, plan
        self._texts = TextSigns(plan.special)
        self._columns = Columns(plan.options.kind)

    def inspect(self, chunk: Chunk, known: str) -> InspectedChunk:
        """Read, encode and inspect the records of a chunk, in the format with the id `known`.

        Raises `UserError` for turns that stop a run.
        """
        rows = tuple(chunk.rows())
        parts = list(records_of(RowChunk(chunk.file, chunk.count, rows), known, "drop"))
        records = [one for one in parts if not isinstance(one, Entry)]
        require_answers(self._plan.options, records)
        tally = Tally(self._plan.shown)
        for record in () if self._plan.limited else records:
            if isinstance(record, Document):
                tally.add(_RAW, record.origin, record.text)
        measured = self._measure(parts, records, tally)
        if measured.failed is not None:
            return measured
        names = chunk.renaming.fields if isinstance(chunk, RenamedChunk) else ()
        roles = Roles()
        beside = self._columns.beside(rows, known, names)
        record_signs.look_at(records, self._texts, tally, roles, beside)
        return replace(
            measured,
            answers=sum(map(record_signs.answers_of, records)),
            roles=roles,
            keys=self._columns.take_keys(),
            prints=fingerprints(chunk.file, records, words=self._plan.compared),
        )

    def _measure(
        self, parts: Sequence[Record | Entry], records: Sequence[Record], tally: Tally
    ) -> InspectedChunk:
        """Return what becomes of the records, and their lengths before they are cut or dropped."""
        if self._chat is None:
            entries = entries_of(parts, ())
            characters = record_signs.character_lengths(records)
            return InspectedChunk(entries, len(records), (characters,), tally)
        plan = self._plan
        fits = fit_records(self._chat, plan.options, records)
        entries = entries_of(parts, fits)
        trained = sum(fit.example is not None for fit in fits)
        # A row may have several records, of which only one was cut.
        cut = {one.row for one in entries if one.outcome != "split"} if plan.limited else set()
        kept = [fit.joined for fit in fits if fit.record.origin.row not in cut]
        measures = token_lengths([one for one in kept if one is not None], plan.options.kind)
        if not plan.limited:
            return InspectedChunk(_counted(entries, tally), trained, (measures,), tally)
        some = [one for one in zip(records, fits, strict=True) if one[0].origin.row in cut]
        try:
            whole = token_lengths(self._uncut(some), plan.options.kind)
        except UserError as error:
            return InspectedChunk(entries, trained, (measures,), tally, failed=error)
        examples = sum(len(fit.examples) for fit in fits)
        return InspectedChunk(entries, trained, (measures, whole), tally, examples=examples)

    def _uncut(self, some: Sequence[tuple[Record, FitRecord]]) -> list[Example]:
        """Return the examples of some records as they are before they are cut or dropped.

        Records of which only a part was encoded are encoded once more.
        """
        assert self._chat is not None
        known: list[Example | None] = []
        again: list[Record] = []
        for record, fit in some:
            if fit.entry is None:
                known.append(fit.example)
            elif isinstance(fit.record, Conversation | Preference) and _all_counted(fit):
                known.append(example_of(fit.record, fit.uncut))
            else:
                again.append(record)
        options = replace(self._plan.options, limits=Limits(_COUNTED, None))
        known += [fit.example for fit in fit_records(self._chat, options, again)]
        return [example for example in known if example is not None]


def _all_counted(fit: FitRecord) -> bool:
    """Return whether all tokens of a record that was cut or dropped are known, and not too many."""
    return bool(fit.uncut) and max(len(answer.ids) for answer in fit.uncut) <= _COUNTED


def _counted(entries: Sequence[Entry], tally: Tally) -> tuple[Entry, ...]:
    """Return a run's entries; without limits, a cut record has too many tokens to count.

    Without limits no document is split, either.
    """
    for entry in entries:
        if entry.outcome == "truncated":
            tally.add(_UNCOUNTED, Origin(entry.file, entry.row), entry.detail)
    return tuple(entry for entry in entries if entry.outcome == "dropped")
