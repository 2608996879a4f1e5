"""What is known of all records at the end of a pass: which of them repeat another."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from tandem.data.records import Origin
from tandem.data.words import Hashes
from tandem.diagnose.duplicates import Signatures, Twins, exact_twins, near_twins
from tandem.diagnose.findings import Sign, Tally, excerpt

EXACT = Sign(
    "exact_duplicates",
    "records that repeat an earlier one exactly",
    "warning",
    "Each copy counts as one more epoch of it: leave the copies out.",
)
NEAR = Sign(
    "near_duplicates",
    "records with 80 % of an earlier one's runs of three words",
    "note",
    "Look at a few: copies with small changes teach little more than one.",
)
PROMPTS = Sign(
    "duplicate_prompts",
    "records with an earlier one's prompt and another answer",
    "note",
    "May be meant; otherwise keep the best answer.",
)
ANSWERS = Sign(
    "duplicate_answers",
    "records with an earlier one's answer and another prompt",
    "note",
    "Answers that fit every question teach little.",
)
CONTRADICTION = Sign(
    "pairs_contradict",
    "pairs that prefer the answer which an earlier one rejects",
    "warning",
    "One of the two is the wrong way round: leave out one, or both.",
    of="pairs",
)
Look = Callable[[set[Origin]], dict[Origin, str]]


class Repeated:
    """Keeps about 150 bytes of each record, and finds those that repeat another.

    Args:
        shown: rows of each finding.
    """

    def __init__(self, shown: int) -> None:
        self._shown = shown
        self._files: list[str] = []
        self._numbers: dict[str, int] = {}
        self._file_of, self._rows = array("i"), array("q")
        self._digests: list[Hashes] = []
        self._signatures: list[Signatures] = []
        self._flipped: list[NDArray[np.bool_]] = []

    def add(
        self,
        origins: Sequence[Origin],
        digests: Hashes,
        signatures: Signatures,
        flipped: Sequence[bool],
    ) -> None:
        """Note n records.

        Args:
            origins: [n], where they come from.
            digests: [n, 4], see `records.digests_of`.
            signatures: [n, 60], see `duplicates.signatures`.
            flipped: [n], whether a pair's answers are in the other order than in its digest.
        """
        for origin in origins:
            number = self._numbers.setdefault(origin.file, len(self._files))
            if number == len(self._files):
                self._files.append(origin.file)
            self._file_of.append(number)
            self._rows.append(origin.row)
        if origins:
            self._digests.append(digests)
            self._signatures.append(signatures)
            self._flipped.append(np.array(flipped, dtype=np.bool_))

    def finish(self, tally: Tally, look: Look) -> None:
        """Count what repeats; `look` reads the questions of a few records again."""
        if not self._digests:
            return
        digests = np.concatenate(self._digests)
        flipped = np.concatenate(self._flipped)
        found: list[tuple[Sign, Twins]] = []
        same = exact_twins(digests[:, 0])
        turned = flipped[same.later] != flipped[same.earlier]
        found.append((CONTRADICTION, Twins(same.later[turned], same.earlier[turned])))
        found.append((EXACT, Twins(same.later[~turned], same.earlier[~turned])))
        rows = self._row_numbers()
        for sign, column, other in ((PROMPTS, 1, 2), (ANSWERS, 3, 1)):
            twins = exact_twins(digests[:, column])
            # A row's pairs share their prompt, and the best answer, by nature.
            own = (
                ~np.isin(twins.later, same.later)
                & (digests[twins.later, other] != digests[twins.earlier, other])
                & (rows[twins.later] != rows[twins.earlier])
            )
            found.append((sign, Twins(twins.later[own], twins.earlier[own])))
        del digests
        signatures = np.concatenate(self._signatures)
        self._signatures = []
        found.append((NEAR, near_twins(signatures, same.later, rows)))
        shown = {
            self._origin(number)
            for _, twins in found
            for number in twins.later[: self._shown].tolist()
        }
        texts = look(shown) if shown else {}
        for sign, twins in found:
            pairs = zip(
                twins.later[: self._shown].tolist(),
                twins.earlier[: self._shown].tolist(),
                strict=True,
            )
            for later, earlier in pairs:
                at = self._origin(later)
                like = self._origin(earlier)
                where = f"row {like.row}" if like.file == at.file else str(like)
                tally.add_example(sign, at, f"as {where}: {excerpt(texts.get(at, ''))}")
            tally.count_only(sign, len(twins.later) - min(len(twins.later), self._shown))

    def _row_numbers(self) -> NDArray[np.int64]:
        """[n]: one number for all records of a row, which follow each other."""
        files, rows = np.array(self._file_of), np.array(self._rows)
        fresh = (np.diff(files) != 0) | (np.diff(rows) != 0)
        return np.concatenate([[0], np.cumsum(fresh)]).astype(np.int64)

    def _origin(self, number: int) -> Origin:
        return Origin(self._files[self._file_of[number]], self._rows[number])
