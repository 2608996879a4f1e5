"""A JSON array, element by element, without the whole of it in memory."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path

from tandem.data.records import Origin
from tandem.data.sources.chunks import BadLine, Row, object_row
from tandem.data.sources.compression import BrokenStream, read_blocks

_GAP = re.compile(r"[ \t\n\r]*")
# More than the longest word or escape of JSON has: only nearer to a window's end may broken syntax
# be one that is cut off.
_LONGEST_WORD = 16


def array_rows(file: Path) -> Iterator[Row | BadLine]:
    """The elements of the array in a file, one by one; broken syntax ends it.

    What is broken is one bad row: without its punctuation nobody can say where rows begin.
    """
    reader = _Elements(file)
    reader.skip(1)
    row = 1
    while not (row == 1 and reader.at("]")):
        origin = Origin(str(file), row)
        try:
            value = reader.value()
        except (ValueError, RecursionError) as error:
            why = reader.broken or f"is not valid JSON ({error})"
            yield BadLine(origin, f"and what follows {why}")
            return
        yield object_row(value, origin)
        reader.skip(0)
        row += 1
        if reader.at("]"):
            break
        if not reader.at(","):
            why = reader.broken or "the JSON array is cut off"
            yield BadLine(Origin(str(file), row), f"is not reached: {why}")
            return
        reader.skip(1)
    reader.skip(1)
    if reader.broken or not reader.ended:
        why = reader.broken or "it is text behind the end of the JSON array"
        yield BadLine(Origin(str(file), row), f"is not reached: {why}")


class _Elements:
    """A window on a file's text that grows until it holds the next element."""

    def __init__(self, file: Path) -> None:
        self.broken = ""
        self._blocks = read_blocks(file)
        self._decode = codecs.getincrementaldecoder("utf-8-sig")()
        self._parse = json.JSONDecoder().raw_decode
        self._text = ""
        self._place = 0
        self._passed = 0
        self._bytes = 0
        self._ended = False
        self.skip(0)

    def at(self, character: str) -> bool:
        """Whether the text goes on with a character."""
        return self._text.startswith(character, self._place)

    @property
    def ended(self) -> bool:
        """Whether the file has nothing more."""
        return self._ended and self._place == len(self._text)

    def skip(self, count: int) -> None:
        """Pass some characters, and the space after them."""
        self._place += count
        while True:
            match = _GAP.match(self._text, self._place)
            self._place = match.end() if match else self._place
            if self._place < len(self._text) or not self._grow(1):
                return

    def value(self) -> object:
        """Pass an element; raises ValueError when there is none."""
        while True:
            try:
                value, place = self._parse(self._text, self._place)
                # At the window's end a number may go on.
                if place < len(self._text) or self._ended:
                    self._place = place
                    return value
            except json.JSONDecodeError as error:
                cut_off = error.pos + _LONGEST_WORD > len(self._text)
                if self._ended or not (cut_off or error.msg.startswith("Unterminated string")):
                    at = self._passed + error.pos + 1
                    raise ValueError(f"{error.msg}, character {at} of the text") from error
            # Twice as much each time, so that a long element is not parsed over and over.
            self._grow(len(self._text) - self._place)

    def _grow(self, wanted: int) -> bool:
        """Read at least `wanted` more characters and forget what is passed; False at the end."""
        parts = [self._text[self._place :]]
        grown = 0
        while grown < wanted and not self._ended:
            try:
                block = next(self._blocks, b"")
                part = self._decode.decode(block, final=not block)
            except BrokenStream as error:
                self.broken, block, part = f"cannot be read: {error}", b"", ""
            except UnicodeDecodeError as error:
                sound = error.object[: error.start]  # begins with what the last block left over
                place = self._bytes + len(block) - len(error.object) + len(sound) + 1
                self.broken = f"is not valid UTF-8 (byte {place})"
                block, part = b"", sound.decode("utf-8-sig")
            self._bytes += len(block)
            self._ended = not block
            grown += len(part)
            parts.append(part)
        self._passed += self._place
        self._text, self._place = "".join(parts), 0
        return grown > 0
