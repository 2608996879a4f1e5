"""`tandem check`: one pass over a data set, and its findings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from functools import partial
from itertools import islice

from tandem.check import record_signs
from tandem.check.column_signs import Columns
from tandem.check.duplicates import Repeated, look_for_shared
from tandem.check.findings import Severity, Sign, Tally
from tandem.check.inspect_chunk import InspectedChunk, inspection
from tandem.check.record_signs import Roles
from tandem.check.survey_result import CheckTarget, Lengths, Survey
from tandem.check.unread_keys import UnreadKeys
from tandem.data.build_dataset import nothing_left
from tandem.data.encoded.worker_pool import EncodingWork, worked_chunks
from tandem.data.formats.known_formats import format_with
from tandem.data.ledger import Entry, Ledger
from tandem.data.read_records import formatted_chunks, records_of
from tandem.data.records import Origin, Record
from tandem.data.sources.chunks import Chunk
from tandem.data.sources.rows import count_sources, read_rows, renaming_of
from tandem.data.text.contamination import Other
from tandem.data.tokenize.template_omissions import way_out
from tandem.errors import UserError
from tandem.recipe.data_source import DataSource


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
        total = partial(_total, target.sources, limit)
        inspecting = worked_chunks(
            work.chunks(), inspection(target, bool(others), shown), "checking records", total,
            encoding_work,
        )  # fmt: skip
        with closing(inspecting):
            for chunk, known, found in inspecting:
                work.take(chunk, known, found)
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
        self._tally, self._roles = Tally(shown), Roles()
        self._lengths = Lengths("tokens" if target.chat else "characters")
        self._repeated = Repeated(shown)
        self._answers = self._records = self._examples = 0
        self._joined, self._keys = Columns(target.options.kind), UnreadKeys()
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
                    self._joined.joined(
                        islice(read_rows(source), limit), layout, renaming_of(source).fields
                    )
                    self._keys.merge(self._joined.take_keys())
        except UserError as error:
            self.ended = str(error)

    def take(self, chunk: Chunk, known: str, found: InspectedChunk) -> None:
        """Add what was found in a chunk to what was found before.

        Raises `UserError` when some of its records could not be measured.
        """
        self._note_stop(chunk, known, found.entries)
        self.ledger.add(found.entries, found.trained)
        for lengths in found.lengths:
            self._lengths.add(lengths)
        self._tally.merge(found.tally)
        if found.failed is not None:
            raise found.failed
        self._answers += found.answers
        self._examples += found.examples
        self._roles.merge(found.roles)
        self._keys.merge(found.keys)
        prints = found.prints
        if prints is None:
            return
        self._records += len(prints.rows)
        self._repeated.add(prints)
        if self._others:
            look_for_shared(prints, self._others, self._tally, partial(_records, chunk, known))

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
            self._keys.listed,
            self._keys.cut,
            counts,
            self._examples,
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

    def _note_stop(self, chunk: Chunk, known: str, entries: Sequence[Entry]) -> None:
        """Keep a run's error about this chunk's first unparsable row, if it would stop."""
        if self._stop is not None or self._target.options.on_bad_record == "drop":
            return
        if any(entry.reason == "unparsable" for entry in entries):
            try:
                for _ in records_of(chunk, known, "stop"):
                    pass
            except UserError as error:
                self._stop = str(error)

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
                        questions[record.origin] = record_signs.shown_of(record)
                if len(questions) == len(wanted):
                    break
        return questions


def _records(chunk: Chunk, known: str) -> list[Record]:
    return [one for one in records_of(chunk, known, "drop") if not isinstance(one, Entry)]


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
    if entry.outcome == "split":
        hint = "A larger max_length splits fewer; each piece begins without what is before it."
        return Sign("split", f"would be split: {reason}", "note", hint, about=reason)
    severity: Severity = "error" if stops or too_many else "warning"
    mend = way_out(reason) if reason.startswith("the chat template") else "Mend them."
    hint = f"{mend} More than max_dropped of them stop a run."
    if stops:
        hint = "Mend them: the first one stops a run, unless `on_bad_record: drop` is set."
    return Sign("dropped", f"would be dropped: {reason}", severity, hint, about=reason)
