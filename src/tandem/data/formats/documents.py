"""Rows that hold a text alone, for training on every token of it."""

from __future__ import annotations

from tandem.data.formats.format import Fields, text
from tandem.data.formats.turns import is_turn
from tandem.data.records import Document, Origin


def read_document(fields: Fields, origin: Origin) -> list[Document]:
    """`text`, without a question and an answer."""
    return [Document(text(fields, "text"), origin)]


def is_document(fields: Fields) -> bool:
    """Return whether a row has a text, and no turns under another name."""
    lists = (value for value in fields.values() if isinstance(value, list) and value)
    return isinstance(fields.get("text"), str) and not any(all(map(is_turn, one)) for one in lists)
