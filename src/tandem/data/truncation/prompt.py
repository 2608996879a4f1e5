"""Cut a prompt until it fits: the oldest text first, the system turn last.

Cuts are between tokens of a text, and the turns are rendered anew each time, so that headers stay
whole and counts are those of the real prompt.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from tandem.data.records import ChatRecord, Turn
from tandem.data.tokenize.encode import ChatTokenizer, render, room_for

Turns = tuple[Turn, ...]
Record = ChatRecord


def prompt_tokens(chat: ChatTokenizer, record: Record, turns: Turns, limit: int) -> int:
    """Count the tokens of some turns as a prompt; a very long one has any number above `limit`."""
    text = render(chat, record, turns, prompt=True)
    room = room_for(chat, text, limit)
    return len(chat.codec.tokenize([text if room is None else text[-room:]])[0])


def cut_prompt(
    chat: ChatTokenizer, record: Record, turns: Turns, limit: int, *, by_text: bool
) -> tuple[Turns, str] | None:
    """Return the turns of a prompt within `limit` tokens and what was cut; None if impossible.

    The oldest exchanges go first (`by_text`: only as much of the oldest as necessary), then the
    beginning of the last user turn; calls and results behind it stay. Only when the system turn
    leaves no room at all, its end is cut so that the question keeps up to half the limit.
    """

    def over(turns: Turns) -> int:
        return prompt_tokens(chat, record, turns, limit) - limit

    shown = partial(render, chat, record, prompt=True)
    turns, skipped = skip_hopeless(chat, turns, limit, shown, by_text=by_text)
    reasons = ["old turns dropped"] if skipped else []
    while over(turns) > 0 and users(turns) > 1:
        if by_text and (cut := cut_turn(chat, turns, first_user(turns), limit, over)):
            return cut, " and ".join([*reasons, "prompt cut"])
        turns = without_oldest(turns)
        reasons = ["old turns dropped"]
    if over(turns) <= 0:
        return turns, " and ".join(reasons)
    index = first_user(turns)
    question = turns[index]
    shortened = cut_turn(chat, turns, index, limit, over)
    if shortened is None and turns[0].role == "system":
        room = limit - min(len(_spans(chat, question.content, limit, end=True)), limit // 2)
        empty = (turns[0], replace(question, content=""), *turns[index + 1 :])
        bare = cut_turn(chat, empty, 0, room, lambda turns: over(turns) + limit - room, end=False)
        turns = ((bare or empty)[0], *turns[1:])
        reasons.append("system turn cut")
        if over(turns) <= 0:
            return turns, " and ".join(reasons)
        shortened = cut_turn(chat, turns, index, limit, over)
    if shortened is None:
        return None
    return shortened, " and ".join([*reasons, "prompt cut"])


def cut_turn(
    chat: ChatTokenizer,
    turns: Turns,
    index: int,
    limit: int,
    over: Callable[[Turns], int],
    *,
    end: bool = True,
) -> Turns | None:
    """Shorten one turn's text until the turns are not `over` a limit; return None if impossible.

    The text keeps its `end`, or else its beginning: at most `limit` tokens of it.
    """
    text = turns[index].content
    if over(turns) <= 0:
        return turns if text.strip() else None
    spans = _spans(chat, text, limit, end=end)
    kept = min(len(spans), limit)
    while kept > 0:
        part = text[spans[-kept][0] :] if end else text[: spans[kept - 1][1]]
        turns = (*turns[:index], replace(turns[index], content=part), *turns[index + 1 :])
        excess = over(turns)
        if excess <= 0:
            return turns if part.strip() else None
        kept -= excess
    return None


def _spans(chat: ChatTokenizer, text: str, limit: int, *, end: bool) -> list[tuple[int, int]]:
    """Return the spans of a text's tokens, or only of those in the part that `limit` could keep."""
    room = room_for(chat, text, limit)
    if room is None:
        return chat.codec.spans(text)
    if not end:
        return chat.codec.spans(text[:room])
    start = len(text) - room
    return [(a + start, b + start) for a, b in chat.codec.spans(text[start:])]


def skip_hopeless(
    chat: ChatTokenizer, turns: Turns, limit: int, render: Callable[[Turns], str], *, by_text: bool
) -> tuple[Turns, int]:
    """Return the turns without the oldest exchanges that cannot fit, and the number of those.

    The last exchange stays. Bisection finds in a few renderings what dropping one at a time would
    give, because a text never grows when an exchange is taken out. `by_text`: a first question
    counts as empty, because it may be cut.
    """
    starts = [index for index, turn in enumerate(turns) if turn.role == "user"]

    def from_exchange(number: int) -> Turns:
        return turns[: starts[0]] + turns[starts[number] :]

    def hopeless(number: int) -> bool:
        kept = from_exchange(number)
        if by_text:
            short = replace(kept[starts[0]], content=kept[starts[0]].content[:1])
            kept = (*kept[: starts[0]], short, *kept[starts[0] + 1 :])
        return room_for(chat, render(kept), limit) is not None

    low, high = 0, len(starts) - 1
    while low < high:
        middle = (low + high) // 2 if low else 0  # mostly there is nothing to skip
        if hopeless(middle):
            low = middle + 1
        elif middle == 0:
            break
        else:
            high = middle
    return from_exchange(low), low


def without_oldest(turns: Turns) -> Turns:
    """Return the turns without the first user turn and all that follows it up to the next one."""
    start = first_user(turns)
    following = (i for i in range(start + 1, len(turns)) if turns[i].role == "user")
    return turns[:start] + turns[next(following, len(turns)) :]


def users(turns: Turns) -> int:
    """Count the exchanges; a user begins each."""
    return sum(turn.role == "user" for turn in turns)


def first_user(turns: Turns) -> int:
    """Return the index of the oldest user turn."""
    return next(index for index, turn in enumerate(turns) if turn.role == "user")
