"""From a row to a conversation, a preference pair or a question.

Formats are told apart by their keys; extra keys are fine. A row that cannot be used raises
`Unusable` with a short reason, the same for all rows with the same fault, so that reasons count.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from tandem.data.calls import Malformed, read_calls, read_result, read_tools
from tandem.data.records import Conversation, Origin, PreferencePair, Role, Turn

Kind = Literal["conversations", "preference pairs"]
Fields = Mapping[str, object]

_ROLES: dict[str, Role] = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
# Which turn may follow which; a `call` is an assistant's turn that calls tools.
_NEXT = {
    "": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "call": ("tool",),
    "tool": ("tool", "assistant"),
}

_ANSWERS = ("chosen", "rejected", "output", "completion")
# How Anthropic's HH-RLHF marks who speaks.
_SPEAKER = re.compile(r"(?:^|\n\n)(Human|Assistant):")
_SPEAKERS: dict[str, Role] = {"Human": "user", "Assistant": "assistant"}


class Unusable(ValueError):  # noqa: N818  (not an error of the program: a verdict on a record)
    """A parsable record that cannot be trained on; the message is the reason."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True, slots=True)
class Format:
    """A known layout of rows: the keys that tell it, and how one row is read."""

    name: str
    kind: Kind
    keys: frozenset[str]
    read: Callable[[Fields, Origin], Conversation | PreferencePair]


@dataclass(frozen=True, slots=True)
class Question:
    """An evaluation record: what is asked, the right answer, and how a base model is asked it.

    `accepted` are texts any of which makes an answer right (never empty); `completion` is the
    beginning of a text that a base model completes with the answer.
    """

    turns: tuple[Turn, ...]
    answer: str
    accepted: tuple[str, ...]
    completion: str | None
    origin: Origin


def detect(fields: Fields) -> Format | None:
    """The format of a row by its keys, or None."""
    return next((known for known in FORMATS if known.keys <= fields.keys()), None)


def format_named(name: str) -> Format:
    """The known format of that name."""
    return next(known for known in FORMATS if known.name == name)


def describe_formats(kind: Kind) -> str:
    """The known formats of a kind and their keys, for messages."""
    return "; ".join(
        f"{known.name} ({', '.join(sorted(known.keys))})" for known in FORMATS if known.kind == kind
    )


def read_question(fields: Fields, origin: Origin) -> Question:
    """Read `{"question", "answer", "system"?, "accepted"?, "completion"?}`.

    Raises `Unusable` for missing or empty texts.
    """
    answer = _text(fields, "answer")
    accepted = fields.get("accepted")
    if accepted is None:
        accepted = [answer]
    if not isinstance(accepted, list) or not all(isinstance(a, str) and a for a in accepted):
        raise Unusable("`accepted` is not a list of texts")
    completion = None if fields.get("completion") is None else _text(fields, "completion")
    turns = _prompt(fields.get("system"), _text(fields, "question"))
    return Question(turns, answer, tuple(accepted) or (answer,), completion, origin)


def _read_sharegpt(fields: Fields, origin: Origin) -> Conversation:
    return _conversation(fields, "conversations", origin, "from", "value")


def _read_messages(fields: Fields, origin: Origin) -> Conversation:
    return _conversation(fields, "messages", origin, "role", "content")


def _read_alpaca(fields: Fields, origin: Origin) -> Conversation:
    question = _text(fields, "instruction")
    given = fields.get("input")
    if given is not None and not isinstance(given, str):
        raise Unusable("`input` is not a text")
    if given and given.strip():
        question = f"{question}\n\n{_sound(given)}"
    turns = _prompt(fields.get("system"), question)
    return _answered(turns, _text(fields, "output"), origin)


def _read_completion(fields: Fields, origin: Origin) -> Conversation:
    prompt, answer = _answer(fields, "completion", _prompt_in(fields))
    return replace(_answered(prompt, answer, origin), tools=_tools(fields))


def _answered(prompt: tuple[Turn, ...], answer: str, origin: Origin) -> Conversation:
    turns = (*prompt, Turn("assistant", answer))
    _check_order(turns)
    return Conversation(turns, origin)


def _read_orca_pair(fields: Fields, origin: Origin) -> PreferencePair:
    prompt = _prompt(fields.get("system"), _text(fields, "question"))
    return _pair(prompt, _text(fields, "chosen"), _text(fields, "rejected"), origin)


def _read_explicit_pair(fields: Fields, origin: Origin) -> PreferencePair:
    turns = _prompt_in(fields)
    chosen_prompt, chosen = _answer(fields, "chosen", turns)
    rejected_prompt, rejected = _answer(fields, "rejected", turns)
    if chosen_prompt != rejected_prompt:
        raise Unusable("chosen and rejected follow different prompts")
    return replace(_pair(chosen_prompt, chosen, rejected, origin), tools=_tools(fields))


def _read_implicit_pair(fields: Fields, origin: Origin) -> PreferencePair:
    chosen, rejected = (_dialogue(fields, key) for key in ("chosen", "rejected"))
    if chosen[:-1] != rejected[:-1]:
        raise Unusable("chosen and rejected follow different prompts")
    pair = _pair(chosen[:-1], _said(chosen[-1]), _said(rejected[-1]), origin)
    return replace(pair, tools=_tools(fields))


def _dialogue(fields: Fields, key: str) -> tuple[Turn, ...]:
    """The turns in `key`, messages or a transcript of HH-RLHF's kind, the answer last."""
    value = fields.get(key)
    if isinstance(value, list):
        turns = _turns(value, key, "role", "content")
    else:
        turns = _transcript(_text(fields, key), key)
    if turns[-1].role != "assistant":
        raise Unusable(f"`{key}` does not end with an assistant turn")
    if len(turns) == 1:
        raise Unusable(f"`{key}` holds an answer without a question")
    return turns


def _transcript(text: str, key: str) -> tuple[Turn, ...]:
    before, *parts = _SPEAKER.split(text)
    if before.strip() or not parts:
        raise Unusable(f"`{key}` is neither messages nor a transcript (Human: ... Assistant: ...)")
    return tuple(
        Turn(_SPEAKERS[speaker], said.strip())
        for speaker, said in zip(parts[::2], parts[1::2], strict=True)
    )


def _prompt_in(fields: Fields) -> tuple[Turn, ...]:
    """The turns in `prompt`, a text beside an optional system text, or messages."""
    prompt = fields.get("prompt")
    if isinstance(prompt, list):
        return _turns(prompt, "prompt", "role", "content")
    return _prompt(fields.get("system"), _text(fields, "prompt"))


def _answer(fields: Fields, key: str, prompt: tuple[Turn, ...]) -> tuple[tuple[Turn, ...], str]:
    """The answer in `key`, a text or messages that may repeat the prompt, and its prompt."""
    value = fields.get(key)
    if not isinstance(value, list):
        return prompt, _text(fields, key)
    turns = _turns(value, key, "role", "content")
    if turns[-1].role != "assistant":
        raise Unusable(f"`{key}` does not end with an assistant turn")
    before = turns[:-1]
    # A repeated prompt may add a system turn or history that a prompt given as text cannot hold.
    shorter, longer = sorted((before, prompt), key=len)
    if shorter and longer[-len(shorter) :] != shorter:
        raise Unusable(f"`{key}` repeats another prompt than `prompt`")
    return longer, _said(turns[-1])


def _said(answer: Turn) -> str:
    """The text of an answer that stands beside a prompt; only conversations hold tool calls."""
    if answer.calls:
        raise Unusable("an answer that calls tools, outside of a conversation")
    return answer.content


def _tools(fields: Fields) -> str:
    """The functions in `tools`, see `calls`."""
    try:
        return read_tools(fields.get("tools"))
    except Malformed as reason:
        raise Unusable(str(reason)) from reason


# `messages` often lie beside prompt/chosen/rejected; pairs are then what is meant.
FORMATS: tuple[Format, ...] = (
    Format(
        "orca_dpo_pairs",
        "preference pairs",
        frozenset({"question", "chosen", "rejected"}),
        _read_orca_pair,
    ),
    Format(
        "explicit preference",
        "preference pairs",
        frozenset({"prompt", "chosen", "rejected"}),
        _read_explicit_pair,
    ),
    # Without a prompt of its own: what both have in common.
    Format(
        "implicit preference",
        "preference pairs",
        frozenset({"chosen", "rejected"}),
        _read_implicit_pair,
    ),
    Format("ShareGPT", "conversations", frozenset({"conversations"}), _read_sharegpt),
    Format("messages", "conversations", frozenset({"messages"}), _read_messages),
    Format(
        "prompt and completion",
        "conversations",
        frozenset({"prompt", "completion"}),
        _read_completion,
    ),
    Format("Alpaca", "conversations", frozenset({"instruction", "output"}), _read_alpaca),
)


def _conversation(
    fields: Fields, key: str, origin: Origin, role_key: str, text_key: str
) -> Conversation:
    turns = _turns(fields.get(key), key, role_key, text_key)
    # Nothing after the last answer can influence training.
    answers = [i for i, turn in enumerate(turns) if turn.role == "assistant"]
    if not answers:
        raise Unusable("no assistant turn")
    turns = turns[: answers[-1] + 1]
    _check_order(turns)
    return Conversation(turns, origin, _tools(fields))


def _pair(prompt: tuple[Turn, ...], chosen: str, rejected: str, origin: Origin) -> PreferencePair:
    _check_order((*prompt, Turn("assistant", chosen)))
    if not rejected.strip():
        raise Unusable("empty answer", "rejected")
    if chosen.strip() == rejected.strip():
        raise Unusable("identical answers")
    return PreferencePair(prompt, chosen, rejected, origin)


def _prompt(system: object, question: str) -> tuple[Turn, ...]:
    """System and user turn; an empty system text means that there is none."""
    if system is None or system == "":
        return (Turn("user", question),)
    if not isinstance(system, str):
        raise Unusable("`system` is not a text")
    return (Turn("system", _sound(system)), Turn("user", question))


def _turns(value: object, key: str, role_key: str, text_key: str) -> tuple[Turn, ...]:
    if not isinstance(value, list) or not value:
        raise Unusable(f"`{key}` is not a list of turns")
    turns = [_turn(item, key, role_key, text_key) for item in value]
    if turns[0].role == "system" and not turns[0].content.strip():
        del turns[0]
    if not turns:
        raise Unusable("no assistant turn")
    return tuple(turns)


def _turn(item: object, key: str, role_key: str, text_key: str) -> Turn:
    if not isinstance(item, Mapping):
        raise Unusable(f"`{key}` holds a turn that is not an object")
    # Some ShareGPT sets use role/content under `conversations`.
    if role_key not in item and "role" in item:
        role_key, text_key = "role", "content"
    name = str(item.get(role_key)).lower()
    role = _ROLES.get(name)
    if role is None:
        raise Unusable("unknown role", f"{item.get(role_key)!r}")
    content, extra = item.get(text_key), ""
    try:
        if name == "function_call":
            content, extra = None, read_calls(content)
        elif role == "assistant":
            extra = read_calls(item.get("tool_calls"))
        elif role == "tool":
            extra = read_result(item)
    except Malformed as reason:
        raise Unusable(str(reason)) from reason
    if content is None and (role == "system" or (role == "assistant" and extra)):
        content = ""
    return Turn(role, _content(content, text_key), role != "assistant" or _trained(item), extra)


def _trained(item: Mapping[str, object]) -> bool:
    """Whether an answer's weight says it is trained; without a weight it is."""
    weight = item.get("weight")
    if weight is None:
        return True
    if weight not in (0, 1):
        raise Unusable("an answer's weight is neither 0 nor 1", repr(weight))
    return bool(weight)


def _content(content: object, key: str) -> str:
    """A turn's text, also when given as a list of text parts."""
    if isinstance(content, list) and content:
        parts = [
            part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None
            for part in content
        ]
        if all(isinstance(part, str) for part in parts):
            content = "".join(str(part) for part in parts)
    if content is None:
        raise Unusable(f"a turn's `{key}` is null or missing")
    if not isinstance(content, str):
        raise Unusable(f"a turn's `{key}` is not a text")
    return _sound(content)


def _text(fields: Fields, key: str) -> str:
    value = fields.get(key)
    if value is None:
        raise Unusable(f"`{key}` is null or missing")
    if not isinstance(value, str):
        raise Unusable(f"`{key}` is not a text")
    if not value.strip():
        raise Unusable("empty answer" if key in _ANSWERS else f"empty `{key}`", key)
    return _sound(value)


def _sound(text: str) -> str:
    """The text itself, if it can be encoded (JSON can spell half a surrogate pair)."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise Unusable("a text holds half of a surrogate pair") from error
    return text


def _check_order(turns: tuple[Turn, ...]) -> None:
    """Raise `Unusable` unless it is [system], user, assistant, user, ... with texts.

    An assistant that calls tools is followed by their results, and those by an assistant.
    """
    spoken = turns[1:] if turns[0].role == "system" else turns
    before = ""
    for turn in spoken:
        if turn.role not in _NEXT[before]:
            raise Unusable("roles out of order", " ".join(t.role for t in turns))
        before = "call" if turn.calls else turn.role
        if not turn.content.strip() and turn.role != "tool" and not turn.calls:
            raise Unusable("empty answer" if turn.role == "assistant" else "empty user turn")
