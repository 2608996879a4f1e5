"""All formats of rows. A row's keys decide its format; other keys may lie beside them.

A row that cannot be used raises `InvalidRecord` with a short reason. Rows with the same fault have
the same reason, so that reasons can be counted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from tandem.data.formats import conversations, documents, preferences, tokens
from tandem.data.formats.conversations import INSTRUCTION, QUERY, QUESTION
from tandem.data.formats.format import Fields, Format, Kind, Reader, ToUnpaired
from tandem.data.formats.unpaired import (
    both_answers,
    good_answers,
    is_labelled,
    joined_pairs,
    labelled_answers,
    split_instruction,
    split_last_turn,
    split_prompt,
)
from tandem.errors import UserError, nearest


def _known(
    kind: Kind, name: str, keys: str, read: Reader, optional: str = "", **more: Any
) -> Format:
    return Format(name, kind, frozenset(keys.split()), read, frozenset(optional.split()), **more)


_conversations = partial(_known, "conversations")
_labels = partial(_known, "labelled answers")


def _pairs(name: str, keys: str, read: Reader, optional: str = "", **more: Any) -> list[Format]:
    """Return two formats of pairs: as pairs, and as a good and a bad answer."""
    return [
        _known("preference pairs", name, keys, read, optional, **more),
        _labels(name, keys, both_answers(read), optional, **more),
    ]


# How the rows of a format with scored answers are read, by a recipe's `completions`.
_OF_SCORES: dict[str, Reader] = {
    "best_vs_worst": preferences.read_best_vs_worst,
    "best_vs_rest": preferences.read_best_vs_rest,
    "all_pairs": preferences.read_all_pairs,
    "best_vs_all": preferences.read_best_vs_all,
    "ranked": preferences.read_all_pairs,
}


def _scored(name: str, keys: str, around: Callable[[Reader], Reader]) -> list[Format]:
    """Return a format of scored answers for each way to read it."""
    return [
        _known("preference pairs", name, keys, around(read), "system", completions=completions)
        for completions, read in _OF_SCORES.items()
    ]


def _labelled(
    name: str,
    keys: str,
    optional: str,
    split: ToUnpaired,
    suits: Callable[[Fields], bool] | None = is_labelled,
) -> tuple[Format, ...]:
    """Return three formats of labelled answers: as they are, the good ones, and joined pairs."""
    more = " ".join({"system", "label", "kto_tag", *optional.split()} - set(keys.split()))
    how: dict[str, Any] = {"turns": True, "suits": suits, "to_unpaired": split}
    return (
        _conversations(name, keys, good_answers(split), more, **how),
        _known("preference pairs", name, keys, joined_pairs(split), more, joins=True, **how),
        _labels(name, keys, labelled_answers(split), more, **how),
    )


# The first whose keys are all there is the format, so what needs more keys comes first.
# `messages` often lie beside prompt/chosen/rejected; pairs are then what is meant. Tokens may lie
# beside the texts that they were made of.
FORMATS: tuple[Format, ...] = (
    _conversations("tokens", "input_ids labels", tokens.read_token_row, "attention_mask",
                   chat=False),
    *_pairs("token pairs", "prompt_ids chosen_ids rejected_ids", tokens.read_token_pair,
            chat=False),
    *_pairs("orca_dpo_pairs", "question chosen rejected", preferences.read_orca_pair, "system",
           suits=preferences.answers_as_texts),
    *_pairs("explicit preference", "prompt chosen rejected", preferences.read_explicit_pair,
           "system", turns=True),
    *_pairs("ShareGPT preference", "conversations chosen rejected",
           preferences.read_sharegpt_pair, "system", turns=True),
    *_pairs("Alpaca preference", "instruction chosen rejected", preferences.read_alpaca_pair,
           "input system history", turns=True),
    *_pairs("input preference", "input chosen rejected", preferences.read_input_pair, "system",
           suits=preferences.answers_as_texts),
    # Without a prompt of its own: the prompt is what both dialogues have in common.
    *_pairs("implicit preference", "chosen rejected", preferences.read_implicit_pair, "system",
           turns=True),
    *_pairs("response preference", "instruction chosen_response rejected_response",
           preferences.read_response_pair, "input system history"),
    *_scored("UltraFeedback", "instruction completions", lambda read: read),
    *_scored("scored answers", "prompt answers scores", preferences.read_scored_answers),
    *_labelled("labelled ShareGPT", "conversations", "", split_last_turn("conversations")),
    *_labelled("labelled messages", "messages", "", split_last_turn("messages")),
    _conversations("ShareGPT", "conversations", conversations.read_sharegpt, "system", turns=True),
    _conversations("messages", "messages", conversations.read_messages, "system", turns=True),
    *_labelled("unpaired preference", "prompt completion label", "", split_prompt("completion"),
               None),
    _conversations("prompt and completion", "prompt completion", conversations.read_completion,
                   "system", turns=True),
    *_labelled("labelled Alpaca", "instruction output", "input history",
               split_instruction("output")),
    _conversations("Alpaca", "instruction output", conversations.read_alpaca,
                   "input system history"),
    _conversations("conversation", "conversation", conversations.read_exchanges, "system",
                   turns=True),
    *_labelled("labelled instruction and response", "instruction response", "context history",
               split_instruction("response", **INSTRUCTION)),
    _conversations("instruction and response", "instruction response",
                   conversations.read_instruction_and_response, "context system history"),
    *_labelled("labelled prompt and response", "prompt response", "", split_prompt("response")),
    _conversations("prompt and response", "prompt response",
                   conversations.read_prompt_and_response, "system", turns=True),
    *_labelled("labelled query and response", "query response", "history",
               split_instruction("response", **QUERY)),
    _conversations("query and response", "query response",
                   conversations.read_query_and_response, "system history"),
    _conversations("question and response", "question response",
                   conversations.read_question_and_response, "system_prompt", turns=True),
    *_labelled("labelled question and answer", "question answer", "context history",
               split_instruction("answer", **QUESTION)),
    _conversations("question and answer", "question answer",
                   conversations.read_question_and_answer, "context system history"),
    _conversations("raw text", "text", documents.read_document, chat=False,
                   suits=documents.is_document),
)  # fmt: skip


# Whose rows are tokens already, of whatever vocabulary.
OF_TOKENS = frozenset({"tokens", "token pairs"})

_BY_ID = {one.id: one for known in FORMATS for one in (known, replace(known, stated=True))}


def detect(fields: Fields) -> Format | None:
    """Return the format of a row by its keys and what they hold, or None."""
    return next((known for known in FORMATS if known.fits(fields)), None)


def overlooked(keys: Sequence[str], known: Format) -> tuple[Format, ...]:
    """Return the formats before `known` that rows with these keys may have.

    Their rows have a label on their answer, or a better and a worse answer. When a source's first
    row lacks those, its format is another, and a later row that has them does not belong to it.
    """
    if known.stated or known.joins:
        return ()
    names = frozenset(keys)
    before = FORMATS[: [one.name for one in FORMATS].index(known.name)]
    possible = (one for one in before if one.keys <= names)
    return tuple(one for one in possible if one.to_unpaired or one.kind != known.kind)


def variant(known: Format, kind: Kind, completions: str | None) -> Format:
    """Return the format of the same name that makes records of `kind`, else `known` itself.

    `completions` chooses among those of scored answers; None means `best_vs_worst`.
    """
    wanted = (None, completions or "best_vs_worst")
    same = (one for one in FORMATS if one.name == known.name and one.kind == kind)
    chosen = next((one for one in same if one.completions in wanted), known)
    return replace(chosen, stated=True) if known.stated else chosen


def format_with(id_: str) -> Format:
    """Return the known format with that `id`."""
    return _BY_ID[id_]


def format_called(name: str) -> Format:
    """Return the format that a recipe names, in any case and with `_` or `-` for spaces.

    Raises `UserError` for an unknown name, with the nearest one.
    """
    for known in FORMATS:
        if _plain(known.name) == _plain(name):
            return replace(known, stated=True)
    names = list(dict.fromkeys(known.name for known in FORMATS))
    raise UserError(
        f"data: there is no format {name!r}.{nearest(name, names)} "
        f"Known formats: {', '.join(names)}."
    )


def _plain(name: str) -> str:
    return name.lower().replace("_", " ").replace("-", " ").strip()


def describe_formats(kind: Kind) -> str:
    """Return the known formats of a kind and their keys for messages."""
    keys = {
        (known.name, *sorted(known.keys | ({"label"} if known.to_unpaired else set()))): None
        for known in FORMATS
        if known.kind == kind
    }
    return "; ".join(f"{name} ({', '.join(some)})" for name, *some in keys)
