"""Rows that hold one answer and a label, true for a good one, as for KTO.

TRL has the answer beside its prompt; others have rows of another format with `label` or
LLaMA-Factory's `kto_tag` beside them.
"""

from __future__ import annotations

import json
import pickle
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from hashlib import blake2b
from itertools import groupby, islice
from tempfile import SpooledTemporaryFile

from tandem.data.formats import format as formats
from tandem.data.formats.conversations import read_completion
from tandem.data.formats.format import Fields, InvalidRecord, Reader, ToUnpaired, text
from tandem.data.formats.preferences import read_explicit_pair
from tandem.data.formats.turns import instruction_in, tools_in
from tandem.data.records import (
    Conversation,
    Origin,
    Preference,
    Record,
    TokenPair,
    TokenRow,
    Turn,
)
from tandem.data.sources.chunks import BadLine, Chunk, Row, RowChunk

# The keys of what stands before a labelled answer, once the row is split.
BEFORE = ("prompt", "system", *sorted(formats.TOOL_KEYS))

_LABELS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}


def label_of(fields: Fields) -> bool:
    """Return whether a row's answer is a good one: a truth value, 0 or 1, also as text."""
    key = _label_key(fields)
    label = _LABELS.get(str(fields.get(key)).strip().lower())
    if label is None:
        raise InvalidRecord(f"`{key}` is neither true nor false", repr(fields.get(key))[:80])
    return label


def is_labelled(fields: Fields) -> bool:
    """Return whether a row has `kto_tag`, or a `label` that is true or false, also as text.

    In formats other than TRL's, other labels mean other things.
    """
    label = str(fields.get("label")).strip().lower()
    return fields.get("kto_tag") is not None or label in ("true", "false")


def split_last_turn(key: str) -> ToUnpaired:
    """Split rows whose answer is the last of the turns in `key`."""

    def split(fields: Fields) -> Fields:
        turns = fields.get(key)
        if not isinstance(turns, list) or len(turns) < 2:
            raise InvalidRecord(f"`{key}` is not a list of a question and its answer")
        return _answered(fields, turns[:-1], turns[-1:])

    return split


def split_prompt(answer: str) -> ToUnpaired:
    """Split rows whose answer has a key of its own beside `prompt`."""

    def split(fields: Fields) -> Fields:
        for key in ("prompt", answer):
            if not isinstance(fields.get(key), list | Mapping):
                text(fields, key)
        return _answered(fields, fields["prompt"], fields[answer])

    return split


def split_instruction(answer: str, **names: str) -> ToUnpaired:
    """Split rows whose answer stands beside Alpaca's keys, some of which may have other names."""

    def split(fields: Fields) -> Fields:
        turns = instruction_in(formats.named(fields, names))
        before = [{"role": turn.role, "content": turn.content} for turn in turns]
        return _answered({**fields, "system": None}, before, text(fields, answer))

    return split


def good_answers(split: ToUnpaired) -> Reader:
    """Return a reader of good answers as conversations; it raises `InvalidRecord` for bad ones."""

    def read(fields: Fields, origin: Origin) -> list[Conversation]:
        if not label_of(fields):
            raise InvalidRecord("the answer is labelled false")
        return read_completion(split(fields), origin)

    return read


def labelled_answers(split: ToUnpaired) -> Reader:
    """Return a reader of answers with their labels; only the last answer of a row is trained."""

    def read(fields: Fields, origin: Origin) -> list[Conversation]:
        good = label_of(fields)
        return [
            replace(_last_alone(one), good=good) for one in read_completion(split(fields), origin)
        ]

    return read


def both_answers(read: Reader) -> Reader:
    """Return a reader of pairs as two answers, a good one and a bad one."""

    def answers(fields: Fields, origin: Origin) -> list[Record | InvalidRecord]:
        both: list[Record | InvalidRecord] = []
        for one in read(fields, origin):
            if isinstance(one, TokenPair):
                both += _as_rows(one)
                continue
            if not isinstance(one, Preference):
                assert isinstance(one, InvalidRecord)
                both.append(one)
                continue
            before = tuple(replace(turn, trained=False) for turn in one.prompt)
            both += [
                Conversation((*before, Turn("assistant", text)), origin, good=good)
                for text, good in ((one.chosen, True), (one.rejected, False))
            ]
        return both

    return answers


def _as_rows(pair: TokenPair) -> list[TokenRow]:
    return [
        TokenRow(
            pair.prompt + answer,
            (False,) * len(pair.prompt) + (True,) * len(answer),
            pair.origin,
            good,
        )
        for answer, good in ((pair.chosen, True), (pair.rejected, False))
    ]


def _last_alone(conversation: Conversation) -> Conversation:
    *before, last = conversation.turns
    turns = (*(replace(turn, trained=False) for turn in before), replace(last, trained=True))
    return replace(conversation, turns=turns)


def joined_pairs(split: ToUnpaired) -> Reader:
    """Return a reader of pairs of rows that `joined` put together, or of why a row is alone."""

    def read(fields: Fields, origin: Origin) -> list[Preference]:
        if "chosen" in fields and "rejected" in fields:
            return read_explicit_pair(fields, origin)
        label = label_of(fields)
        read_completion(split(fields), origin)
        raise InvalidRecord(f"no answer to the same prompt is labelled {str(not label).lower()}")

    return read


def _answered(fields: Fields, prompt: object, answer: object) -> Fields:
    kept = {key: fields[key] for key in BEFORE if key in fields}
    label = fields.get(_label_key(fields))
    return {**kept, "prompt": prompt, "completion": answer, "label": label}


def _label_key(fields: Fields) -> str:
    return "kto_tag" if fields.get("kto_tag") is not None else "label"


_IN_MEMORY = 2**26
_ROWS = 256


def joined(chunks: Iterable[Chunk], known: formats.Format) -> Iterator[Chunk]:
    """Yield chunks in which each good answer is joined with a bad one to the same prompt.

    The rows are in the labelled format `known`. A pair takes the place of its later row, and has
    `chosen` and `rejected`. Rows without a partner come last; unusable rows stay in their place.
    """
    with _Waiting(known) as waiting:
        for chunk in chunks:
            rows = [row for row in map(waiting.meet, chunk.rows()) if row is not None]
            yield RowChunk(chunk.file, chunk.count, tuple(rows))
        for file, alone in groupby(waiting.left(), key=lambda row: row.origin.file):
            while some := tuple(islice(alone, _ROWS)):
                yield RowChunk(file, 0, some)


class _Waiting:
    """Rows without a partner, as a context manager that closes their file."""

    def __init__(self, known: formats.Format) -> None:
        assert known.to_unpaired is not None
        self._split, self._keys = known.to_unpaired, known.read_keys
        self._file = SpooledTemporaryFile(max_size=_IN_MEMORY)  # noqa: SIM115  (closed by exit)
        # By prompt and label, places in the file, the first come first. Lists, because an empty
        # deque takes more memory than all else of an answer, and most prompts have few.
        self._places: defaultdict[tuple[bytes, bool], list[int]] = defaultdict(list)
        self._end = 0

    def __enter__(self) -> _Waiting:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def meet(self, row: Row | BadLine) -> Row | BadLine | None:
        """Return a row's pair, the row itself if it can have none, or None when it now waits."""
        if isinstance(row, BadLine):
            return row
        try:
            label = label_of(row.fields)
            own = self._split(row.fields)
            # Checked here, or its partner would be lost with it.
            tools_in(row.fields)
            read_completion(own, row.origin)
            prompt = _digest(own)
            others = self._places.get((prompt, not label))
            if others is None:
                self._places[prompt, label].append(self._keep(row))
                return None
        except (InvalidRecord, RecursionError):
            return row
        other = self._split(self._read(others.pop(0)).fields)
        if not others:
            del self._places[prompt, not label]
        good, bad = (own, other) if label else (other, own)
        answers = {"chosen": good["completion"], "rejected": bad["completion"]}
        # A label as text might be taken for the name of the preferred answer.
        return Row({**own, **answers, "label": label}, row.origin)

    def left(self) -> Iterator[Row]:
        """Yield the rows that still wait, in reading order."""
        for place in sorted(place for places in self._places.values() for place in places):
            yield self._read(place)

    def _keep(self, row: Row) -> int:
        place = self._end
        self._file.seek(place)
        kept = {key: value for key, value in row.fields.items() if key in self._keys}
        pickle.dump(Row(kept, row.origin, row.broken), self._file, protocol=pickle.HIGHEST_PROTOCOL)
        self._end = self._file.tell()
        return place

    def _read(self, place: int) -> Row:
        self._file.seek(place)
        row: Row = pickle.load(self._file)
        return row


def _digest(fields: Fields) -> bytes:
    """Hash all that stands before an answer; an empty text is the same as none."""
    prompt = [fields.get(key) or None for key in BEFORE]
    text = json.dumps(prompt, sort_keys=True, default=repr)
    return blake2b(text.encode(), digest_size=16).digest()
