"""Print what `tandem show` shows: tokens in colours, or lines with a word before each."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import groupby
from operator import itemgetter

from rich.console import Console
from rich.text import Text

from tandem.check import show_record
from tandem.check.findings import visible as escaped
from tandem.check.inputs import StageChat, require_context
from tandem.check.show_record import Encodings, Place, TokenSection, TokenUse
from tandem.check.survey_result import CheckTarget
from tandem.data.records import (
    REASONING,
    Conversation,
    Document,
    Record,
    TokenPair,
    TokenRow,
    Turn,
)
from tandem.runtime.console import notice_console

# Two shades each, in turn, to separate tokens; of the 16 colours that every terminal has.
_STYLES: dict[TokenUse, tuple[str, str]] = {
    "prompt": ("black on white", "black on bright_white"),
    "trained": ("black on green", "black on bright_green"),
    "shared": ("black on cyan", "black on bright_cyan"),
    "shared and trained": ("black on yellow", "black on bright_yellow"),
}
_MEANS: dict[TokenUse, str] = {
    "prompt": "fed, not trained",
    "trained": "a target of the loss",
    "shared": "fed once for {all} answers, not trained",
    "shared and trained": "fed once, a target for {all} answers",
}
_LABELS: dict[TokenUse, str] = {use: use.replace(" and ", "+") for use in _STYLES}
_SHOWN = {"\n": "\u23ce\n", "\t": "\u2192   ", "\u00a0": "\u237d", "\r": "\u240d"}


def visible(text: str) -> str:
    """Return a text with signs for characters that print nothing; a line break stays as well."""
    return "".join(_SHOWN[c] if c in _SHOWN else escaped(c) for c in text)


def print_turns(console: Console, record: Record) -> None:
    """Print a record's texts, tools, calls and reasoning under their roles, or its tokens."""
    if isinstance(record, Document):
        _print_text(console, "text", record.text)
        return
    if isinstance(record, TokenRow | TokenPair):
        for name, ids in _ids_of(record):
            _print_text(console, name, " ".join(map(str, ids)))
        return
    if record.tools:
        _print_text(console, "tools", record.tools)
    if isinstance(record, Conversation):
        labels = {None: "", True: " (good)", False: " (bad)"}
        for turn in record.turns:
            note = labels[record.good] if turn is record.turns[-1] else ""
            _print_turn(console, turn, note if turn.trained else " (weight 0)")
        return
    for turn in record.prompt:
        _print_turn(console, turn)
    for number, (name, text) in enumerate(record.named):
        score = f" (score {record.scores[number]:g})" if record.scores else ""
        _print_text(console, f"{name}{score}", text)


def _ids_of(record: TokenRow | TokenPair) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the ids of a record of tokens, part by part."""
    if isinstance(record, TokenPair):
        yield "prompt", record.prompt
        yield "chosen", record.chosen
        yield "rejected", record.rejected
        return
    for trained, some in groupby(zip(record.trained, record.ids, strict=True), key=itemgetter(0)):
        yield "trained" if trained else "prompt", tuple(index for _, index in some)


def _print_turn(console: Console, turn: Turn, note: str = "") -> None:
    more = turn.more()
    if turn.reasoned:
        _print_text(console, f"{turn.role} reasons{note}", more[REASONING])
    if turn.content or not turn.calls:
        _print_text(console, f"{turn.role}{note}", turn.content)
    if turn.calls:
        calls = [json.dumps(call["function"], ensure_ascii=False) for call in more["tool_calls"]]
        _print_text(console, f"{turn.role} calls{note}", "\n".join(calls))


def _print_text(console: Console, head: str, text: str) -> None:
    console.print(Text(f"{head}:", "bold"))
    for line in visible(text).split("\n"):
        console.print(Text(f"  {line}"), soft_wrap=True)


def show_turns(console: Console, place: Place) -> None:
    """Print the turns of a row's records, and what a run would drop."""
    records, entries = show_record.records_in(place)
    for entry in entries:
        console.print(show_record.outcome(entry), markup=False, soft_wrap=True)
    for number, record in enumerate(records, start=1):
        if len(records) > 1:
            console.print(f"\nrecord {number} of {len(records)}", highlight=False)
        print_turns(console, record)


def show_tokens(
    console: Console, place: Place, target: CheckTarget, chat: StageChat, *, ids: bool
) -> None:
    """Print the tokens of a row as a run would train them; raise UserError if it would not."""
    require_context(chat, target)
    for notice in chat.notices:
        notice_console().print(notice, markup=False, soft_wrap=True)
    found = show_record.encode_row(chat.chat, target.options, place)
    limits = target.options.limits
    bounds = "no limits; give --recipe to see what a run would cut"
    if target.limited:
        prompt = "" if limits.prompt is None else f", max_prompt_length {limits.prompt}"
        bounds = f"max_length {limits.sequence}{prompt}"
    lines = [f"tokenizer {chat.model}, template {chat.template}, {bounds}"]
    lines += map(show_record.outcome, found.entries)
    if not found.entries:
        lines.append("trained whole")
    for line in lines:
        console.print(line, markup=False, soft_wrap=True)
    if not found.examples:
        raise show_record.would_be_dropped(found.entries)
    print_encodings(console, found, ids=ids)


def print_encodings(console: Console, found: Encodings, *, ids: bool) -> None:
    """Print the tokens of a row: coloured in a terminal that has colours, with words elsewhere.

    With `ids`, one token a line.
    """
    sections = [section for example in found.examples for section in example]
    parts = {token.part for section in sections for token in section.tokens}
    every = "both" if any(section.name == "chosen" for section in sections) else "all"
    # A dumb terminal, or one with NO_COLOR, has no colours.
    coloured = console.is_terminal and console.color_system is not None and not console.no_color
    for line in _legend([part for part in _STYLES if part in parts], every, coloured):
        console.print(line, soft_wrap=True)
    for section in sections:
        console.print()
        console.print(_head(section, every), soft_wrap=True)
        if ids:
            lines = _listed(section, coloured)
        elif coloured:
            lines = iter([_coloured(section)])
        else:
            lines = _labelled(section)
        for line in lines:
            console.print(line, soft_wrap=not coloured or ids)


def _legend(parts: Sequence[TokenUse], every: str, coloured: bool) -> Iterator[Text]:
    for part in parts:
        style = _STYLES[part][0] if coloured else ""
        yield Text.assemble((f" {_LABELS[part]} ", style), f" {_MEANS[part].format(all=every)}")


def _head(section: TokenSection, every: str) -> Text:
    titles = {"record": "the record", "shared": f"what {every} answers share"}
    what = titles.get(section.name, section.name)
    count = len(section.tokens)
    tokens = "1 token" if count == 1 else f"{count} tokens"
    return Text.assemble((what, "bold"), f": {tokens}, {section.trained} trained")


def _coloured(section: TokenSection) -> Text:
    text = Text()
    for number, token in enumerate(section.tokens):
        text.append(visible(token.text), _STYLES[token.part][number % 2])
    return text


def _labelled(section: TokenSection) -> Iterator[Text]:
    """Yield lines of text, each with the use of its tokens; another use begins a new line."""
    wide = max((len(_LABELS[token.part]) for token in section.tokens), default=0)
    for part, tokens in groupby(section.tokens, key=lambda token: token.part):
        text = visible("".join(token.text for token in tokens))
        for line in text.removesuffix("\n").split("\n"):
            yield Text(f"{_LABELS[part]:<{wide}} | {line}")


def _listed(section: TokenSection, coloured: bool) -> Iterator[Text]:
    """Yield one token a line: its position, id, use, and its text between bars."""
    wide = max((len(_LABELS[token.part]) for token in section.tokens), default=0)
    for number, token in enumerate(section.tokens):
        style = _STYLES[token.part][0] if coloured else ""
        text = visible(token.text).replace("\n", "")
        yield Text.assemble(
            f"{number:>6} {token.id:>7}  ", (f"{_LABELS[token.part]:<{wide}}", style), f"  |{text}|"
        )
