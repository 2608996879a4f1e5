"""What to advise for rows of no known format."""

from __future__ import annotations

from tandem.data.formats.format import Fields, Kind
from tandem.data.formats.known_formats import detect
from tandem.data.formats.turns import is_turn, known_role

SAYING = "with `fields: {key of the format: key of the data}` in a recipe, or --fields KEY=NAME"

# What trains on records of a kind, where a stage needs another kind.
OTHER_WAYS: dict[tuple[Kind, Kind], str] = {
    ("preference pairs", "labelled answers"): " Take a loss of pairs, such as `dpo.loss: sigmoid`, "
    "or give each answer a label.",
    ("preference pairs", "conversations"): " DPO trains on pairs.",
    ("conversations", "preference pairs"): " SFT trains on conversations.",
}


def _holds_records(value: object) -> bool:
    """Return whether a value is a list of rows of a known format."""
    first = value[0] if isinstance(value, list) and value else None
    return isinstance(first, dict) and detect(first) is not None


def advice_on(fields: Fields, kind: Kind) -> str | None:
    """Return what to advise for rows whose turns or texts are under other names, if it is clear."""
    columns = [
        str(key)
        for key, value in fields.items()
        if isinstance(value, list) and value and all(is_turn(item) for item in value)
    ]
    if len(columns) > 1:
        return (
            f"But {' and '.join(f'`{key}`' for key in columns)} hold turns: say which is what "
            f"{SAYING}: prompt, chosen and rejected of pairs, messages of conversations. Where "
            "each row says which answer is better, write that one into `chosen` first."
        )
    if not columns:
        lists = [key for key, value in fields.items() if _holds_records(value)]
        if len(lists) == 1:
            return f"But `{lists[0]}` holds a list of records: save that list alone."
        if "input_ids" in fields:
            return (
                "But `input_ids` are tokens: `labels` beside them says which are trained, as long "
                "as they are, -100 for the others."
            )
        return None
    column = columns[0]
    answers = "chosen: ..., rejected: ..." if kind == "preference pairs" else "completion: ..."
    if not _ends_with_answer(fields[column]):
        return (
            f"But `{column}` holds turns up to a question: say so, and where its answer is, with "
            f"`fields: {{prompt: {column}, {answers}}}`, or --fields prompt={column} and so on."
        )
    if kind == "preference pairs":
        return None
    return (
        f"But `{column}` holds turns: say so with `fields: {{messages: {column}}}` in a recipe, or "
        f"--fields messages={column}."
    )


def _ends_with_answer(turns: object) -> bool:
    """Return whether the last of some turns is an assistant's, or of an unknown role."""
    assert isinstance(turns, list)
    name = next(turns[-1][key] for key in ("role", "from") if key in turns[-1])
    return known_role(str(name)) in ("assistant", None)
