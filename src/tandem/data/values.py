"""Values of an Arrow column as Python's, with `Unreadable` for those that Python cannot hold."""

from __future__ import annotations

from typing import Any

from tandem.data.records import Unreadable


def values_of(column: Any) -> list[object]:
    """A column's values; a broken one costs none of the others.

    Args:
        column: a `pyarrow.Array`.
    """
    try:
        values: list[object] = column.to_pylist()
    except Exception:  # each kind of value has errors of its own
        return [_value(column, number) for number in range(len(column))]
    return values


def _value(column: Any, number: int) -> object:
    try:
        scalar = column[number]
    except Exception as error:
        return _unreadable(error)
    return _of_scalar(scalar)


def _of_scalar(scalar: Any) -> object:
    """A value; of one that holds others, as much as can be had."""
    import pyarrow

    try:
        return scalar.as_py()
    except Exception as error:
        kind = scalar.type
        if pyarrow.types.is_struct(kind):
            names = [field.name for field in kind]
            if len(names) == len(set(names)):
                return {name: _of_scalar(scalar[name]) for name in names}
        elif pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind):
            return values_of(scalar.values)
        return _unreadable(error)


def _unreadable(error: Exception) -> Unreadable:
    if isinstance(error, UnicodeDecodeError):
        return Unreadable(f"is not valid UTF-8 (byte {error.start + 1})", text=True)
    said = str(error).strip().partition("\n")[0].rstrip(".")
    return Unreadable(f"Python cannot hold ({type(error).__name__}: {said})")
