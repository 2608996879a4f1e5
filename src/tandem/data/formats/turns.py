"""Read the turns of a conversation from lists of objects, from transcripts, from single texts."""

from __future__ import annotations

import re
from collections.abc import Mapping

from tandem.data.formats import tool_calls
from tandem.data.formats.format import Fields, InvalidRecord, sound, text, texts_in
from tandem.data.formats.tool_calls import REASONING_KEYS, Malformed
from tandem.data.records import Turn
from tandem.recipe.choices import Role

_NAMES_OF_ROLES: dict[Role, str] = {
    "system": "system developer",
    "user": "human user prompter",
    "assistant": "gpt chatgpt assistant bot model function_call",
    "tool": "tool function observation",
}
_ROLES = {name: role for role, names in _NAMES_OF_ROLES.items() for name in names.split()}
UNKNOWN_ROLE = "unknown role (the recipe's `roles` can say what it means)"
# Which turn may follow which; a `call` is an assistant's turn that calls tools.
_NEXT = {
    "": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "call": ("tool",),
    "tool": ("tool", "assistant"),
}

# Keys that say whether an answer is trained: of SlimOrca and OpenAI; of Axolotl; of ms-swift.
_WEIGHTS = ("weight", "train", "loss")
# Columns of images, films and sounds, and the marks of their places in a text.
_MEDIA = ("images", "image", "videos", "video", "audios", "audio")
_PLACES = re.compile(r"<(?:image|video|audio)(?:_?\d+)?>")

# How Anthropic's HH-RLHF marks who speaks.
_SPEAKER = re.compile(r"(?:^|\n\n)(Human|Assistant):")
_SPEAKERS: dict[str, Role] = {"Human": "user", "Assistant": "assistant"}


def known_role(name: str) -> Role | None:
    """Return the role that a name has in every data set, or None for an unknown name."""
    return _ROLES.get(name.lower())


def turns_in(value: object, key: str, role_key: str, text_key: str) -> tuple[Turn, ...]:
    """Return the turns of a list of objects, without an empty system turn."""
    if isinstance(value, str):
        raise InvalidRecord(f"`{key}` is a text, not a list of turns")
    if not isinstance(value, list) or not value:
        raise InvalidRecord(f"`{key}` is not a list of turns")
    turns = [_turn(item, key, role_key, text_key) for item in value]
    if turns[0].role == "system" and not turns[0].content.strip():
        del turns[0]
    if not turns:
        raise InvalidRecord("no assistant turn")
    return tuple(turns)


def after_system(fields: Fields, turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
    """Return the turns, behind the text in `system` if there is one."""
    before = system_turn(fields.get("system"))
    if not before or turns[0] == before[0]:
        return turns
    return (*before, *turns)


def read_keys(role: Role | None) -> frozenset[str]:
    """Return the keys that are read of a turn of some role; None is an unknown role."""
    keys = {"role", "content", "from", "value", *_WEIGHTS, "train_detail"}
    if role == "assistant":
        keys |= {"tool_calls", "function_call", *REASONING_KEYS}
    if role == "tool":
        keys |= {"name", "tool_call_id"}
    return frozenset(keys)


def system_turn(system: object) -> tuple[Turn, ...]:
    """Return a system turn, or nothing for an empty text."""
    if system is None or system == "":
        return ()
    if not isinstance(system, str):
        raise InvalidRecord("`system` is not a text")
    return (Turn("system", sound(system)),)


def prompt_of(system: object, question: str) -> tuple[Turn, ...]:
    """Return a system turn, if there is one, and a user turn."""
    return (*system_turn(system), Turn("user", question))


def prompt_in(fields: Fields) -> tuple[Turn, ...]:
    """Return the turns in `prompt`: a text, messages, or HH-RLHF's transcript up to the answer."""
    prompt = fields.get("prompt")
    if isinstance(prompt, list):
        return after_system(fields, turns_in(prompt, "prompt", "role", "content"))
    if _awaits_answer(prompt):
        return after_system(fields, _transcript(text(fields, "prompt"), "prompt")[:-1])
    return prompt_of(fields.get("system"), text(fields, "prompt"))


def instruction_in(fields: Fields) -> tuple[Turn, ...]:
    """Return the turns of Alpaca's keys: `instruction`, `input`, after `system` and `history`."""
    context = fields.get("input")
    if context is not None and not isinstance(context, str):
        raise InvalidRecord("`input` is not a text")
    if context and context.strip():
        # Some rows have all of the question there.
        asked = "" if fields.get("instruction") == "" else text(fields, "instruction") + "\n\n"
        question = asked + sound(context)
    else:
        question = text(fields, "instruction")
    history = fields.get("history") or []
    if not isinstance(history, list):
        raise InvalidRecord("`history` is not a list of question and answer")
    before = [turn for pair in history for turn in _exchange(pair)]
    return (*system_turn(fields.get("system")), *before, Turn("user", question))


def _exchange(pair: object) -> tuple[Turn, Turn]:
    if isinstance(pair, list | tuple) and len(pair) == 2:
        asked, answered = pair
        if isinstance(asked, str) and isinstance(answered, str):
            return Turn("user", sound(asked)), Turn("assistant", sound(answered))
    raise InvalidRecord("`history` is not a list of question and answer")


def answer_in(fields: Fields, key: str, prompt: tuple[Turn, ...]) -> tuple[tuple[Turn, ...], str]:
    """Return the prompt and the answer in `key`: a text, a turn, or messages with the prompt."""
    value = fields.get(key)
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, list):
        answer = text(fields, key)
        return prompt, answer.strip() if _awaits_answer(fields.get("prompt")) else answer
    turns = turns_in(value, key, "role", "content")
    if turns[-1].role != "assistant":
        raise InvalidRecord(f"`{key}` does not end with an assistant turn")
    before = turns[:-1]
    # A repeated prompt may add a system turn or history that a prompt given as text cannot hold:
    # the text is then the last question, or the first.
    shorter, longer = sorted((before, prompt), key=len)
    if shorter and longer[-len(shorter) :] != shorter and not _begins(before, prompt):
        raise InvalidRecord(f"`{key}` repeats another prompt than `prompt`")
    return longer, said(turns[-1])


def _begins(turns: tuple[Turn, ...], prompt: tuple[Turn, ...]) -> bool:
    """Return whether some turns begin with a prompt, apart from a system turn that it lacks."""
    if prompt[0].role != "system" and turns[0].role == "system":
        turns = turns[1:]
    return turns[: len(prompt)] == prompt


def said(answer: Turn) -> str:
    """Return the text of an answer beside a prompt; only conversations hold more."""
    if answer.calls:
        raise InvalidRecord("an answer that calls tools, outside of a conversation")
    if answer.reasoned:
        raise InvalidRecord("an answer with reasoning beside it, outside of a conversation")
    return answer.content


def tools_in(fields: Fields) -> str:
    """Return the functions in `tools`, or in OpenAI's older `functions`."""
    try:
        return tool_calls.read_tools(fields.get("tools")) or tool_calls.read_functions(
            fields.get("functions")
        )
    except Malformed as reason:
        raise InvalidRecord(str(reason)) from reason


def dialogue_in(fields: Fields, key: str) -> tuple[Turn, ...]:
    """Return the turns in `key`, messages or a transcript of HH-RLHF's kind, the answer last."""
    value = fields.get(key)
    if isinstance(value, list):
        turns = turns_in(value, key, "role", "content")
    else:
        turns = _transcript(text(fields, key), key)
    if turns[-1].role != "assistant":
        raise InvalidRecord(f"`{key}` does not end with an assistant turn")
    if len(turns) == 1:
        raise InvalidRecord(f"`{key}` holds an answer without a question")
    return after_system(fields, turns)


def check_order(turns: tuple[Turn, ...]) -> None:
    """Raise `InvalidRecord` unless the order is [system], user, assistant, user, ... with texts.

    After an assistant that calls tools come their results, and then an assistant.
    """
    spoken = turns[1:] if turns[0].role == "system" else turns
    before = ""
    for turn in spoken:
        if turn.role not in _NEXT[before]:
            order = " ".join(t.role for t in turns)
            if turn.role == "system" and len(spoken) < len(turns):
                raise InvalidRecord("more than one system turn", order)
            raise InvalidRecord("roles out of order", order)
        before = "call" if turn.calls else turn.role
        if not turn.content.strip() and turn.role != "tool" and not turn.calls:
            raise InvalidRecord("empty answer" if turn.role == "assistant" else "empty user turn")


def check_text_alone(fields: Fields) -> None:
    """Raise `InvalidRecord` where a text has places for the images, films or sounds of its row."""
    media = next((key for key in _MEDIA if fields.get(key)), None)
    if media is not None and any(map(_PLACES.search, texts_in(fields))):
        raise InvalidRecord(f"the text has places for `{media}`, and only text is read")


def _awaits_answer(prompt: object) -> bool:
    """Return whether a prompt is HH-RLHF's kind of transcript, up to where the answer begins."""
    return (
        isinstance(prompt, str)
        and prompt.lstrip().startswith("Human:")
        and prompt.rstrip().endswith("\n\nAssistant:")
    )


def _transcript(whole: str, key: str) -> tuple[Turn, ...]:
    before, *parts = _SPEAKER.split(whole)
    if before.strip() or not parts:
        raise InvalidRecord(
            f"`{key}` is neither messages nor a transcript (Human: ... Assistant: ...)"
        )
    return tuple(
        Turn(_SPEAKERS[speaker], words.strip())
        for speaker, words in zip(parts[::2], parts[1::2], strict=True)
    )


def _turn(item: object, key: str, role_key: str, text_key: str) -> Turn:
    if isinstance(item, str):
        raise InvalidRecord(f"`{key}` holds texts that do not say who speaks")
    if not isinstance(item, Mapping):
        raise InvalidRecord(f"`{key}` holds a turn that is not an object")
    # Some sets use role/content where others have from/value, and the other way round.
    if role_key not in item:
        other = ("role", "content") if role_key == "from" else ("from", "value")
        role_key, text_key = other if other[0] in item else (role_key, text_key)
    name = str(item.get(role_key))
    role = known_role(name)
    if role is None:
        raise InvalidRecord(UNKNOWN_ROLE, repr(item.get(role_key)))
    content, extra = item.get(text_key), ""
    try:
        if name.lower() == "function_call":
            content, extra = None, tool_calls.read_answer(content, item)
        elif role == "assistant":
            calls = item.get("tool_calls") or item.get("function_call")
            extra = tool_calls.read_answer(calls, item)
        elif role == "tool":
            extra = tool_calls.read_result(item)
    except Malformed as reason:
        raise InvalidRecord(str(reason)) from reason
    trained = role != "assistant" or _trained(item)
    if content is None and (role == "system" or Turn(role, "", trained, extra).calls):
        content = ""
    return Turn(role, _content(content, text_key), trained, extra)


def _trained(item: Mapping[str, object]) -> bool:
    """Return whether an answer's weight says it is trained; without a weight it is."""
    weights = {key: item[key] for key in _WEIGHTS if item.get(key) is not None}
    for key, weight in weights.items():
        if weight not in (0, 1):
            raise InvalidRecord(f"an answer's {key} is neither 0 nor 1", repr(weight))
    if item.get("train_detail"):
        raise InvalidRecord("an answer's `train_detail` is about parts of it; it is trained or not")
    if len(set(weights.values())) > 1:
        raise InvalidRecord(f"an answer's {' and '.join(f'`{key}`' for key in weights)} differ")
    return all(weights.values())


def _content(content: object, key: str) -> str:
    """Return a turn's text, which may be a list of text parts."""
    if isinstance(content, list) and content:
        parts = [
            part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None
            for part in content
        ]
        if not all(isinstance(part, str) for part in parts):
            kinds = (part.get("type") if isinstance(part, Mapping) else part for part in content)
            others = dict.fromkeys(repr(kind)[:40] for kind in kinds if kind != "text")
            raise InvalidRecord(f"a turn's `{key}` has a part that is no text", ", ".join(others))
        content = "".join(str(part) for part in parts)
    if content is None:
        raise InvalidRecord(f"a turn's `{key}` is null or missing")
    if not isinstance(content, str):
        raise InvalidRecord(f"a turn's `{key}` is not a text")
    return sound(content)


def is_turn(item: object) -> bool:
    """Return whether a value is an object with a role and a text, under either pair of names."""
    keys = item.keys() if isinstance(item, Mapping) else set()
    return {"role", "content"} <= keys or {"from", "value"} <= keys
