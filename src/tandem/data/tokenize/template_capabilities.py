"""What a chat template does with tools, calls, reasoning, and an answer behind its prompt.

A probe finds in which form it takes them. A template that does not know them renders the turns
without them and reports nothing; then a record that has some is refused.

An answer is trained as the model has to write it behind the prompt. That is what the template
renders there, if its renderings with and without the answer agree. Templates of reasoning models
may open the reasoning in the prompt, or take it out of every answer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product

from tandem.data.formats.tool_calls import REASONING_KEYS
from tandem.data.records import REASONING, ChatRecord, Conversation, Turn
from tandem.data.tokenize.chat_template import Ending

# Words that no template contains.
_TOOL, _CALLED, _KEY, _VALUE, _RESULT, _THOUGHT = (
    f"zqprobe{word}zq" for word in ("tool", "called", "key", "value", "result", "thought")
)
_SCHEMA = {"type": "object", "properties": {_KEY: {"type": "string"}}}
_FUNCTION = {"name": _TOOL, "description": "A probe.", "parameters": _SCHEMA}
PROBE_TOOLS = json.dumps([{"type": "function", "function": _FUNCTION}])

NO_TOOLS = "the chat template does not render tools"
NO_CALLS = "the chat template does not render tool calls"
NO_RESULTS = "the chat template does not render tool results"
NO_REASONING = "the chat template does not render reasoning"


@dataclass(frozen=True, slots=True)
class ToolCallForm:
    """How a template takes a tool call: its arguments as JSON text instead of an object (`text`);
    a missing content beside it as null instead of an empty text (`null`)."""

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
    """Find what a template renders of tools; `render` returns the text of turns with some tools.

    With `given` empty, this is about a separate template for turns without tools.
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


def reason_unsupported(taken: TemplateCapabilities, record: ChatRecord) -> str:
    """Return what a template does not render of a record beside its texts; empty for nothing."""
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
    """Return the turns with their tool calls and reasoning in the form that the template takes."""
    if taken.reasoning not in ("", REASONING):
        turns = tuple(_under(turn, taken.reasoning) if turn.reasoned else turn for turn in turns)
    if taken.calls is None or not any(turn.calls for turn in turns):
        return turns
    return tuple(_formed(turn, taken.calls) if turn.calls else turn for turn in turns)


def _under(turn: Turn, key: str) -> Turn:
    """Return the turn with its reasoning under another key."""
    more = turn.more()
    more[key] = more.pop(REASONING)
    return replace(turn, extra=json.dumps(more, ensure_ascii=False))


def _formed(turn: Turn, form: ToolCallForm) -> Turn:
    """Return the turn in a form; its calls' arguments are objects where they are JSON objects."""
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


PARTED = "the chat template does not continue its own prompt with the answer"
UNCLOSED = "the chat template opens the answer with reasoning, which the answer does not close"
CHANGED = "the chat template changes the answer's text"
_SHOWN = 30  # characters of a text that a message quotes
# How models mark reasoning: DeepSeek-R1 and Qwen, Magistral, and others.
_NAMES = "think|thinking|thought|thoughts|reason|reasoning|THINK"
_OPENED = re.compile(rf"(?:<({_NAMES})>|\[({_NAMES})\])\s*$")
_CLOSED = re.compile(rf"</(?:{_NAMES})>|\[/(?:{_NAMES})\]")


@dataclass(frozen=True, slots=True)
class Refused:
    """Why an answer cannot be encoded."""

    reason: str
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Thought:
    """The tag that opens reasoning at a prompt's end, at `start`, and the one that closes it."""

    start: int
    opener: str
    closer: str
    blanks: str

    def behind(self, answer: Turn) -> str | None:
        """Return what a model writes behind the opened reasoning; None if nothing would close it.

        Reasoning beside the answer is put in front of it.
        """
        text = answer.content
        if answer.reasoned:
            reasoning = str(answer.more()[REASONING]).strip("\n")
            text = f"{reasoning}\n{self.closer}\n\n{text}"
        elif text.lstrip().startswith(self.opener):
            text = text.lstrip()[len(self.opener) :].removeprefix(self.blanks)
        return text if self.closer in text else None


def open_thought(prompt: str) -> Thought | None:
    """Return the reasoning that a prompt opens at its end, if it does."""
    tag = _OPENED.search(prompt)
    if tag is None:
        return None
    opener = tag[0].rstrip()
    return Thought(tag.start(), opener, opener[0] + "/" + opener[1:], tag[0][len(opener) :])


def closed_thought(answer: str) -> str | None:
    """Return the last tag in an answer that closes reasoning, if there is one."""
    return next(reversed(_CLOSED.findall(answer)), None)


def text_behind(
    answered: Turn, prompt: str, text: str, ending: Ending, *, reasoned: bool
) -> str | Refused:
    """Return what follows a prompt up to the end token: the answer as the template renders it.

    It is the answer's own text where the template takes out of it the reasoning that a model has to
    write behind the prompt.

    Args:
        answered: the answer's turn.
        prompt: as inference feeds it.
        text: prompt and answer as the template renders them together.
        ending: how the template closes answers.
        reasoned: whether the template renders reasoning that stands beside an answer.
    """
    # Text that the template puts before the end token may be elsewhere where there is a call.
    closing = (ending.token if answered.calls else ending.closing) + ending.trailer
    rendered = text[len(prompt) :]
    follows = text.startswith(prompt) and rendered.endswith(closing)
    beside = answered.reasoned and not reasoned
    if follows and not beside and _has(rendered, answered.content):
        return rendered[: len(rendered) - len(ending.trailer)]
    thought = open_thought(prompt)
    if thought is not None and not answered.calls and text.startswith(prompt[: thought.start]):
        written = thought.behind(answered)
        if written is None:
            return Refused(
                UNCLOSED,
                f"its prompt ends with {prompt[thought.start :]!r}; write the reasoning and "
                f"`{thought.closer}` in front of the answer, or take `{thought.opener}` out of the "
                "template's prompt",
            )
        return written + ending.closing
    if not follows:
        return Refused(PARTED, _parting(prompt, text, closing))
    if (closer := closed_thought(answered.content)) is not None:
        rest = answered.content.rpartition(closer)[2]
        # A prompt that closes the reasoning itself wants answers without.
        if _has(rest + closing, rendered) and not prompt.rstrip().endswith(closer):
            return answered.content + ending.closing
        return Refused(NO_REASONING, f"it takes what stands before `{closer}` out of the answer")
    return Refused(CHANGED, f"it renders {_start(rendered)!r} of {_start(answered.content)!r}")


def _has(text: str, part: str) -> bool:
    """Return whether a text has another in it, whatever blanks and line breaks there are."""
    return part.strip() in text or "".join(part.split()) in "".join(text.split())


def _parting(prompt: str, text: str, closing: str) -> str:
    """Describe where a prompt and the text with its answer begin to differ."""
    if text.startswith(prompt):
        return f"the text with the answer ends with {text[-_SHOWN:]!r}, not with {closing!r}"
    pairs = enumerate(zip(prompt, text, strict=False))
    at = next((i for i, (a, b) in pairs if a != b), min(len(prompt), len(text)))
    return (
        f"behind {prompt[max(0, at - _SHOWN) : at]!r} the prompt goes on with "
        f"{_start(prompt[at:])!r}, the text with the answer with {_start(text[at:])!r}"
    )


def _start(text: str) -> str:
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."
