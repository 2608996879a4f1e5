"""`tandem check`: one pass over a data set, and its findings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import islice

import numpy as np

from tandem.check import record_signs
from tandem.check.column_signs import Columns
from tandem.check.duplicates import Repeated, look_for_shared, signatures
from tandem.check.findings import Severity, Sign, Tally
from tandem.check.record_signs import Record, Roles
from tandem.check.survey_result import CheckTarget, Lengths, Survey, token_lengths
from tandem.check.text_signs import TextSigns
from tandem.data.build_dataset import nothing_left
from tandem.data.encoded.encode_chunk import EncodedChunk, EncodingOptions, encode_chunk
from tandem.data.encoded.worker_pool import EncodingWork, encoded_chunks
from tandem.data.formats.known_formats import format_with
from tandem.data.ledger import Entry, Ledger
from tandem.data.read_records import formatted_chunks, records_of
from tandem.data.records import Origin, PreferencePair
from tandem.data.sources.chunks import Chunk, RenamedChunk, RowChunk
from tandem.data.sources.rows import count_sources, read_rows, renaming_of
from tandem.data.text.contamination import Other
from tandem.data.text.word_hashes import hash_words
from tandem.data.tokenize.template_omissions import way_out
from tandem.data.truncation.limits import Limits
from tandem.errors import UserError
from tandem.recipe.data_source import DataSource

# Tokens of a record beyond which they are not counted: a text of 50 MB would take gigabytes.
_COUNTED = 2**17

_UNCOUNTED = Sign(
    "very_long", f"records of more than {_COUNTED:,} tokens, whose rest was not counted", "note",
    "A record this long is often a whole file by mistake: look at it.",
)  # fmt: skip


def survey(
    target: CheckTarget,
    *,
    others: Sequence[Other] = (),
    limit: int | None = None,
    shown: int = 3,
    encoding_work: EncodingWork = EncodingWork(),  # noqa: B008 - frozen
) -> Survey:
    """Read a data set once, and return what is in it.

    Args:
        target: the data, and how a run would encode it.
        others: sets with which it should share nothing.
        limit: rows after which to stop.
        shown: rows of each finding.
        encoding_work: who encodes large data, and how that is displayed.

    Data that cannot be used raises nothing: the result's `problem` says so.
    """
    work = _Survey(target, others, limit, shown)
    problem = None
    try:
        options = _options(target)
        total = partial(_total, target.sources, limit)
        encoding = encoded_chunks(
            work.chunks(), target.chat, options, "checking records", total, encoding_work
        )
        for chunk, known, encoded in encoding:
            work.take(chunk, known, encoded)
    except UserError as error:
        problem = str(error)
    return work.finish(problem or work.ended)


class _Survey:
    """The pass: takes chunks, keeps a few bytes of each record."""

    def __init__(
        self, target: CheckTarget, others: Sequence[Other], limit: int | None, shown: int
    ) -> None:
        self.ledger = Ledger(None)
        self._target, self._limit = target, limit
        self._others = tuple(others)
        self._texts = TextSigns(target.special)
        self._tally, self._roles = Tally(shown), Roles()
        self._lengths = Lengths("tokens" if target.chat else "characters")
        self._repeated = Repeated(shown)
        self._answers = self._records = 0
        self._columns = Columns(target.options.kind)
        self._stop: str | None = None
        self.ended: str | None = None
        self._looked_at = 0
        self._joins = False

    def chunks(self) -> Iterator[tuple[Chunk, str]]:
        """Yield the chunks of the data, up to what cannot be read; then `ended` says why.

        Raising the error while chunks are read ahead would lose those chunks.
        """
        left = self._limit
        kind = self._target.options.kind
        try:
            for source in self._target.sources:
                if left == 0:
                    return
                self._looked_at += 1
                limit, layout = left, None
                for chunk, known in formatted_chunks([source], kind, self.ledger, "drop", limit):
                    left = None if left is None else max(0, left - chunk.count)
                    layout = layout or (format_with(known) if known else None)
                    yield chunk, known
                if layout is not None and layout.joins:
                    self._joins = True
                    # Read once more, because the pairs lack the keys that are not read.
                    self._columns.joined(
                        islice(read_rows(source), limit), layout, renaming_of(source).fields
                    )
        except UserError as error:
            self.ended = str(error)

    def take(self, chunk: Chunk, known: str, batch: EncodedChunk | None) -> None:
        """Inspect a chunk's records; `batch` has them encoded, if there is a tokenizer."""
        rows = tuple(chunk.rows())
        names = chunk.renaming.fields if isinstance(chunk, RenamedChunk) else ()
        chunk = RowChunk(chunk.file, chunk.count, rows)
        parts = list(records_of(chunk, known, "drop"))
        records = [one for one in parts if not isinstance(one, Entry)]
        entries = [one for one in parts if isinstance(one, Entry)]
        self._note_stop(chunk, known, entries)
        if batch is None:
            self.ledger.add(entries, len(records))
            self._lengths.add(record_signs.character_lengths(records))
        else:
            self.ledger.add(self._ledger_lines(batch), len(batch.arrays.parts))
            self._measure(chunk, known, batch)
        self._records += len(records)
        self._answers += sum(map(record_signs.answers_of, records))
        beside = self._columns.beside(rows, known, names)
        record_signs.look_at(records, self._texts, self._tally, self._roles, beside)
        self._compare(records)

    def finish(self, problem: str | None) -> Survey:
        """Return the result; `problem` is what ended the pass early."""
        ledger, counts = self.ledger, self.ledger.counts
        too_many = self._too_many()
        problem = self._stop or problem or too_many
        for entry in ledger.entries:
            stops = entry.reason == "unparsable" and self._stop is not None
            sign = _of_ledger(entry, stops=stops, too_many=too_many is not None)
            self._tally.add(sign, Origin(entry.file, entry.row), entry.detail)
        self._repeated.finish(self._tally, self._read_again)
        of = {"records": counts["read"], "pairs": self._records, "answers": self._answers}
        return Survey(
            self._target,
            self._limit,
            self._looked_at,
            dict(ledger.formats),
            self._columns.unread,
            self._columns.cut,
            counts,
            ledger.summary()["reasons"],
            self._roles,
            self._lengths.unit,
            self._lengths.measures(),
            self._lengths.histogram(),
            tuple(self._tally.findings(of)),
            self._others,
            problem,
        )

    def _too_many(self) -> str | None:
        """Return a run's error about the records that it would drop, if they are too many."""
        if not self.ledger.counts["read"]:
            return None
        try:
            if not self.ledger.counts["trained"]:
                raise nothing_left(self._target.sources, self.ledger)
            self.ledger.check_share(self._target.max_dropped)
        except UserError as error:
            if self._joins and self._limit is not None:
                return f"{error} What an answer lacks may be in the rows behind --limit."
            return str(error)
        return None

    def _note_stop(self, chunk: Chunk, known: str, entries: list[Entry]) -> None:
        """Keep a run's error about this chunk's first unparsable row, if it would stop."""
        if self._stop is not None or self._target.options.on_bad_record == "drop":
            return
        if any(entry.reason == "unparsable" for entry in entries):
            try:
                for _ in records_of(chunk, known, "stop"):
                    pass
            except UserError as error:
                self._stop = str(error)

    def _ledger_lines(self, batch: EncodedChunk) -> list[Entry]:
        """Return a run's entries; without limits, a cut record has too many tokens to count."""
        if self._target.limited:
            return list(batch.entries)
        for entry in batch.entries:
            if entry.outcome == "truncated":
                self._tally.add(_UNCOUNTED, Origin(entry.file, entry.row), entry.detail)
        return [entry for entry in batch.entries if entry.outcome != "truncated"]

    def _measure(self, chunk: Chunk, known: str, batch: EncodedChunk) -> None:
        """Note lengths in tokens, before records were cut or dropped."""
        options = self._target.options
        lengths = token_lengths(batch.arrays, options.kind)
        if batch.entries and self._target.limited:
            assert self._target.chat is not None
            numbers = {entry.row for entry in batch.entries}
            # A row may have several records, of which only one was cut.
            kept = ~np.isin(batch.arrays.rows, list(numbers))
            self._lengths.add({name: values[kept] for name, values in lengths.items()})
            rows = tuple(row for row in chunk.rows() if row.origin.row in numbers)
            whole = replace(options, limits=Limits(_COUNTED, None), on_bad_record="drop")
            again = RowChunk(chunk.file, len(rows), rows)
            batch = encode_chunk(self._target.chat, whole, again, known)
            lengths = token_lengths(batch.arrays, options.kind)
        self._lengths.add(lengths)

    def _compare(self, records: list[Record]) -> None:
        words = hash_words([record_signs.body_of(record) for record in records])
        digests = np.array([record_signs.digests_of(one) for one in records], dtype=np.uint64)
        flipped = [isinstance(r, PreferencePair) and r.chosen > r.rejected for r in records]
        origins = [record.origin for record in records]
        self._repeated.add(origins, digests, signatures(words), flipped)
        look_for_shared(records, words, self._others, self._tally)

    def _read_again(self, wanted: set[Origin]) -> dict[Origin, str]:
        """Return the questions of a few records, by reading the data again."""
        questions: dict[Origin, str] = {}
        files = {origin.file for origin in wanted}
        chunks = formatted_chunks(
            self._target.sources, self._target.options.kind, Ledger(None), "drop"
        )
        # The pass itself ended at what cannot be read; wanted records came before that.
        with suppress(UserError):
            for chunk, known in chunks:
                first = getattr(chunk, "first", None)
                if chunk.file not in files or (
                    first is not None
                    and not any(first <= origin.row < first + chunk.count for origin in wanted)
                ):
                    continue
                for record in records_of(chunk, known, "drop"):
                    if not isinstance(record, Entry) and record.origin in wanted:
                        questions[record.origin] = record_signs.question_of(record)
                if len(questions) == len(wanted):
                    break
        return questions


def _options(target: CheckTarget) -> EncodingOptions:
    """Return the pass's options: bad rows do not end it, and nothing is cut without a recipe."""
    options = replace(target.options, on_bad_record="drop")
    return options if target.limited else replace(options, limits=Limits(_COUNTED, None))


def _total(sources: Sequence[DataSource], limit: int | None) -> int | None:
    total = count_sources(sources)
    return total if limit is None or total is None else min(limit, total)


def _of_ledger(entry: Entry, *, stops: bool, too_many: bool) -> Sign:
    """Return a ledger's entry as a sign.

    It is an error if such records stop a run, or if `too_many` records are dropped.
    """
    reason = entry.reason
    if entry.outcome == "truncated":
        hint = "Raise max_length or max_prompt_length, or shorten them."
        return Sign("truncated", f"would be truncated: {reason}", "note", hint, about=reason)
    severity: Severity = "error" if stops or too_many else "warning"
    mend = way_out(reason) if reason.startswith("the chat template") else "Mend them."
    hint = f"{mend} More than max_dropped of them stop a run."
    if stops:
        hint = "Mend them: the first one stops a run, unless `on_bad_record: drop` is set."
    return Sign("dropped", f"would be dropped: {reason}", severity, hint, about=reason)
