"""Find what a chat template leaves out of a record, by rendering probe words instead of its texts.

Without an error, a template may skip the system turn, render calls only without text beside them,
or render only the last turns. That depends on the record's shape: who speaks in which order, which
texts there are, which tools and calls. Each shape is rendered once.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

from tandem.data.formats.conversations import Question
from tandem.data.records import Turn
from tandem.data.tokenize.chat_template import ChatTemplate, render
from tandem.data.tokenize.template_capabilities import NO_CALLS, NO_REASONING, NO_RESULTS, NO_TOOLS
from tandem.errors import UserError
from tandem.recipe.choices import Role

NO_SYSTEM = "the chat template does not render the system turn"
NO_USER = "the chat template does not render every user turn"
NO_ANSWER = "the chat template does not render every earlier answer"
NO_TEXT = "the chat template does not render the text beside tool calls"
_NOT_RENDERED: dict[Role, str] = {
    "system": NO_SYSTEM, "user": NO_USER, "assistant": NO_ANSWER, "tool": NO_RESULTS,
}  # fmt: skip
_REMEMBERED = 2048  # shapes; long conversations have many


@dataclass(frozen=True, slots=True)
class _Shape:
    """The properties of a turn on which a template's rendering may depend."""

    role: Role  # who speaks
    text: int  # how many lines it has: none, one, or more (2)
    # of each call, whether its arguments are an `object`, a `text` or `none`
    calls: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()  # what else the template gets of the message
    null: bool = False  # whether a missing text is null


@dataclass(slots=True)
class _Twin:
    """A record of the same shape: its turns, its tools, and the words that a rendering must have,
    each with the reason when it lacks one."""

    turns: list[Turn] = field(default_factory=list)
    tools: str = ""
    words: list[tuple[str, str]] = field(default_factory=list)


class Omissions:
    """What a template leaves out of turns; `rendered` returns the text of turns, tools, prompt."""

    def __init__(self, rendered: Callable[[Sequence[Turn], str, bool], str]) -> None:
        self._rendered = rendered
        self._known: dict[Any, str] = {}

    def of_prompt(self, turns: Sequence[Turn], tools: str = "") -> str:
        """Return why turns cannot be a prompt; empty when all of them are rendered."""
        return self._of([_shape(turn) for turn in turns], tools, answered=False, reasoned=False)

    def of_answers(
        self, turns: Sequence[Turn], places: Sequence[int], tools: str = "", *, reasoned: bool
    ) -> str:
        """Return why the answers at some places cannot be trained; empty when they can.

        `reasoned`: the template must render the reasoning of these answers. It may leave out that
        of earlier answers, as inference does.
        """
        shapes = [_shape(turn) for turn in turns]
        for place in places:
            before, whole = shapes[:place], shapes[: place + 1]
            reason = self._of(before, tools, answered=False, reasoned=False) or self._of(
                whole, tools, answered=True, reasoned=reasoned
            )
            if reason:
                return reason
        return ""

    def _of(self, shapes: Sequence[_Shape], tools: str, *, answered: bool, reasoned: bool) -> str:
        # Most templates treat one line and several alike, so all texts count as several lines at
        # first: that makes fewer shapes. Only if something is left out, they count as they are.
        lines = tuple(replace(one, text=2) if one.text == 1 else one for one in shapes)
        reason = self._remembered(lines, tools, answered, reasoned)
        return reason and self._remembered(tuple(shapes), tools, answered, reasoned)

    def _remembered(
        self, shapes: tuple[_Shape, ...], tools: str, answered: bool, reasoned: bool
    ) -> str:
        key = (shapes, _tools_shape(tools), answered, reasoned)
        if key not in self._known:
            if len(self._known) == _REMEMBERED:
                self._known.clear()
            self._known[key] = self._look(*key)
        return self._known[key]

    def _look(
        self, shapes: tuple[_Shape, ...], tools: tuple[bool, ...], answered: bool, reasoned: bool
    ) -> str:
        twin = _twin(shapes, tools, answered=answered, reasoned=reasoned)
        try:
            text = self._rendered(twin.turns, twin.tools, not answered).lower()
        except UserError:  # it refuses the record itself as well, and says why
            return ""
        return next((reason for word, reason in twin.words if word not in text), "")


def omissions_of(tokenizer: Any, template: ChatTemplate) -> Omissions:
    """Return what a tokenizer's template leaves out."""
    return Omissions(
        lambda turns, tools, prompt: render(tokenizer, template, turns, prompt=prompt, tools=tools)
    )


def way_out(reason: str) -> str:
    """Return what to do about records that are dropped for a reason."""
    if reason.startswith("the chat template does not render"):
        return (
            "Choose another `chat_template`, mend this one, or take out of the data what it does "
            "not render."
        )
    if reason.startswith("the chat template"):
        return "Mend the template, or choose another `chat_template`."
    if reason.startswith("no answer to the same prompt is labelled"):
        return "Train on single answers with `dpo.loss: kto`, or add the answers that are missing."
    return "Correct the data or the limits."


def check_asked(
    tokenizer: Any, template: ChatTemplate, questions: Sequence[Question], label: str
) -> None:
    """Raise UserError for a question of which the template of the model `label` omits something."""
    omissions = omissions_of(tokenizer, template)
    for question in questions:
        if reason := omissions.of_prompt(question.turns):
            raise UserError(
                f"{question.origin}: {label} cannot be asked this: {reason} (chat_template: "
                f"{template.name}). {way_out(reason)}"
            )


def _shape(turn: Turn) -> _Shape:
    content = turn.content.strip()
    text = (2 if "\n" in content else 1) if content else 0
    more = turn.more()
    calls = tuple(_arguments(call["function"]["arguments"]) for call in more.get("tool_calls", ()))
    null = "content" in more
    return _Shape(turn.role, 0 if null else text, calls, tuple(sorted(more)), null)


def _arguments(value: object) -> str:
    if not value:
        return "none"
    return "text" if isinstance(value, str) else "object"


@lru_cache(maxsize=64)
def _tools_shape(tools: str) -> tuple[bool, ...]:
    """Return for each tool whether it has a `function`; some are that function themselves."""
    return tuple("function" in tool for tool in json.loads(tools)) if tools else ()


def _twin(
    shapes: Sequence[_Shape], tools: Sequence[bool], *, answered: bool, reasoned: bool
) -> _Twin:
    """Make a record of these shapes; if it is `answered`, the last turn is the answer itself.

    The answer's own text is compared where it is encoded.
    """
    twin = _Twin()
    listed = []
    for number, wrapped in enumerate(tools):
        word = _word("tool", number)
        twin.words.append((word, NO_TOOLS))
        schema = {"type": "object", "properties": {"zqkeyzq": {"type": "string"}}}
        one = {"name": word, "description": "A probe.", "parameters": schema}
        listed.append({"type": "function", "function": one} if wrapped else one)
    twin.tools = json.dumps(listed) if listed else ""
    ids: Iterator[str] = iter(())
    for number, shape in enumerate(shapes):
        content = ""
        last = answered and number == len(shapes) - 1
        if shape.text:
            words = [_word(edge, number) for edge in ("first", "last")]
            content = (" " if shape.text == 1 else "\n\n").join(words)
            if not last or shape.calls:
                reason = NO_TEXT if shape.calls else _NOT_RENDERED[shape.role]
                twin.words += [(word, reason) for word in words]
        extra: dict[str, Any] = {}
        for key in shape.keys:
            if key == "tool_calls":
                extra[key] = _calls(shape, number, twin)
                ids = iter([call["id"] for call in extra[key]])
            elif key == "tool_call_id":
                extra[key] = next(ids, "probe0000")
            elif key == "content":
                extra[key] = None
            else:  # a tool's name, or reasoning under whatever name the template has for it
                extra[key] = _word("more", number)
                if last and reasoned and key != "name":
                    twin.words.append((extra[key], NO_REASONING))
        twin.turns.append(Turn(shape.role, content, extra=json.dumps(extra) if extra else ""))
    return twin


def _calls(shape: _Shape, number: int, twin: _Twin) -> list[dict[str, Any]]:
    calls = []
    for place, arguments in enumerate(shape.calls):
        name, value = (_word(f"{kind}{place}at", number) for kind in ("call", "value"))
        twin.words.append((name, NO_CALLS))
        values: dict[str, str] = {}
        if arguments != "none":
            values = {"zqkeyzq": value}
            twin.words.append((value, NO_CALLS))
        called = {"name": name, "arguments": json.dumps(values) if arguments == "text" else values}
        # Mistral's templates refuse ids of another length.
        calls.append({"id": f"probe{place:04}", "type": "function", "function": called})
    return calls


def _word(kind: str, number: int) -> str:
    """Return a word that no template contains, and no other word."""
    return f"zq{kind}{number}zq"
