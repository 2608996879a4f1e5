"""Tools, tool calls and reasoning: in which form a chat template takes them, found by a probe.

Templates that do not know them render the turns without them and say nothing; a record that has
some is then refused, never trained without them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product

from tandem.data.formats.tool_calls import REASONING_KEYS
from tandem.data.records import REASONING, Conversation, PreferencePair, Turn

# Words that no template contains.
_TOOL, _CALLED, _KEY, _VALUE, _RESULT, _THOUGHT = (
    f"zqprobe{word}zq" for word in ("tool", "called", "key", "value", "result", "thought")
)
PROBE_TOOLS = json.dumps(
    [
        {
            "type": "function",
            "function": {
                "name": _TOOL,
                "description": "A probe.",
                "parameters": {"type": "object", "properties": {_KEY: {"type": "string"}}},
            },
        }
    ]
)

NO_TOOLS = "the chat template does not render tools"
NO_CALLS = "the chat template does not render tool calls"
NO_RESULTS = "the chat template does not render tool results"
NO_REASONING = "the chat template does not render reasoning"


@dataclass(frozen=True, slots=True)
class ToolCallForm:
    """How a template takes a tool call.

    `text`: its arguments as JSON text instead of an object. `null`: no content beside a call is
    null instead of an empty text.
    """

    text: bool
    null: bool


@dataclass(frozen=True, slots=True)
class TemplateCapabilities:
    """What a template renders: a list of tools, calls (in a form, if at all), tool turns.

    `reasoning` is the key under which it takes an answer's reasoning, or empty.
    """

    tools: bool
    calls: ToolCallForm | None
    results: bool
    reasoning: str = ""


def probe_template(
    render: Callable[[Sequence[Turn], str], str], given: str = PROBE_TOOLS
) -> TemplateCapabilities:
    """What of tools a template renders; `render` gives the text of turns with some tools.

    Without tools `given`, it is what the template for turns without tools renders, where a model
    has one for each.
    """

    def shown(turns: Sequence[Turn], *words: str, tools: str = given) -> bool:
        try:
            text = render(turns, tools)
        except Exception:
            return False
        return all(word in text for word in words) and "None" not in text

    asked = Turn("user", "Which?")
    calls = next(
        (
            form
            for text, null in product((False, True), (True, False))
            if shown((asked, _call(form := ToolCallForm(text, null))), _CALLED, _KEY, _VALUE)
        ),
        None,
    )
    called = _call(calls or ToolCallForm(text=False, null=False))
    extra = json.dumps({"name": _CALLED, "tool_call_id": "probe0000"})
    result = Turn("tool", _RESULT, extra=extra)
    answered = (asked, called, result, Turn("assistant", "That."))
    thought = (
        (key, Turn("assistant", "That.", extra=json.dumps({key: _THOUGHT})))
        for key in REASONING_KEYS
    )
    reasoning = next((k for k, turn in thought if shown((asked, turn), _THOUGHT, tools="")), "")
    return TemplateCapabilities(shown((asked,), _TOOL), calls, shown(answered, _RESULT), reasoning)


def reason_unsupported(taken: TemplateCapabilities, record: Conversation | PreferencePair) -> str:
    """Why a template does not suit what a record holds beside its texts; empty when it does."""
    turns = record.turns if isinstance(record, Conversation) else record.prompt
    if record.tools and not taken.tools:
        return NO_TOOLS
    if taken.calls is None and any(turn.calls for turn in turns):
        return NO_CALLS
    if not taken.results and any(turn.role == "tool" for turn in turns):
        return NO_RESULTS
    if not taken.reasoning and any(turn.reasoned for turn in turns):
        return NO_REASONING
    return ""


def in_form(taken: TemplateCapabilities, turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
    """The turns with their tool calls and reasoning in the form that the template takes."""
    if taken.reasoning not in ("", REASONING):
        turns = tuple(_under(turn, taken.reasoning) if turn.reasoned else turn for turn in turns)
    if taken.calls is None or not any(turn.calls for turn in turns):
        return turns
    return tuple(_formed(turn, taken.calls) if turn.calls else turn for turn in turns)


def _under(turn: Turn, key: str) -> Turn:
    """The turn with its reasoning under another key."""
    more = turn.more()
    more[key] = more.pop(REASONING)
    return replace(turn, extra=json.dumps(more, ensure_ascii=False))


def _formed(turn: Turn, form: ToolCallForm) -> Turn:
    """The turn; its arguments arrive as objects where they are JSON objects."""
    extra = turn.more()
    calls = extra["tool_calls"]
    if form.text:
        for call in calls:
            arguments = call["function"]["arguments"]
            if not isinstance(arguments, str):
                call["function"]["arguments"] = json.dumps(arguments, ensure_ascii=False)
    if form.null and not turn.content:
        extra["content"] = None
    return replace(turn, extra=json.dumps(extra, ensure_ascii=False))


def _call(form: ToolCallForm) -> Turn:
    function = {"name": _CALLED, "arguments": {_KEY: _VALUE}}
    # Mistral's templates refuse ids of another length.
    call = {"type": "function", "id": "probe0000", "function": function}
    return _formed(Turn("assistant", "", extra=json.dumps({"tool_calls": [call]})), form)
