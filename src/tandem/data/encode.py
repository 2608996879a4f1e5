"""From turns to token ids and the positions that are trained.

Every answer follows exactly the token ids that inference would feed before it; what is trained is
known by position, never by looking at ids.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from tandem.data.codec import Codec, CodecParts, FastCodec, make_codec
from tandem.data.records import Branch, Origin, Tree, Turn
from tandem.data.template import ChatTemplate, Ending, require_ending
from tandem.errors import UserError


@dataclass(frozen=True, slots=True)
class Chat:
    """A tokenizer with its template, and how that template ends an answer.

    `parts` are the plain values that make the same chat in another process, if there are any.
    """

    codec: Codec
    template: ChatTemplate
    ending: Ending
    parts: CodecParts | None = None

    @classmethod
    def of(cls, tokenizer: Any, template: ChatTemplate) -> Chat:
        """Raises `UserError` when the template ends answers with no token."""
        ending = require_ending(tokenizer, template)
        codec, parts = make_codec(tokenizer, template, ending)
        return cls(codec, template, ending, parts)

    @classmethod
    def from_parts(cls, parts: CodecParts) -> Chat:
        """The chat that `parts` came from."""
        return cls(FastCodec(parts), parts.template, parts.ending, parts)


@dataclass(frozen=True, slots=True)
class Exchange:
    """An answer to encode: the turns before it and its text. `origin` is for messages."""

    before: tuple[Turn, ...]
    answer: str
    origin: Origin


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids of prompt and answer; the answer, end token included, starts at `start`."""

    ids: list[int]
    start: int

    def cut(self, length: int) -> Encoded:
        """The first `length` tokens; an answer that loses its end loses its end token."""
        return Encoded(self.ids[:length], self.start)


@dataclass(frozen=True, slots=True)
class Refused:
    """Why an answer cannot be encoded."""

    reason: str
    detail: str = ""


def encode_exchanges(chat: Chat, exchanges: Sequence[Exchange]) -> list[Encoded | Refused]:
    """Encode answers after their prompts, in one tokenizer call.

    The prompt's ids are those of the rendered prompt alone. Where the tokenizer would merge the
    prompt's end with the answer's beginning, the answer is tokenised as a continuation instead,
    and kept only if the text survives decoding. Raises `UserError` when the template refuses
    the turns.
    """
    prompts: dict[tuple[Turn, ...], str] = {}
    texts: list[tuple[str, str] | Refused] = []
    for exchange in exchanges:
        if exchange.before not in prompts:
            prompts[exchange.before] = _render(chat, exchange.before, exchange, prompt=True)
        prompt = prompts[exchange.before]
        answer = _delimit(chat, exchange, prompt)
        texts.append(answer if isinstance(answer, Refused) else (prompt, answer))
    wanted = dict.fromkeys(
        text
        for pair in texts
        if not isinstance(pair, Refused)
        for text in (pair[0], pair[0] + pair[1])
    )
    ids = dict(zip(wanted, chat.codec.tokenize(list(wanted)), strict=True))
    return [
        pair
        if isinstance(pair, Refused)
        else _join(chat, ids[pair[0]], ids[pair[0] + pair[1]], pair[1])
        for pair in texts
    ]


def conversation_tree(encoded: Sequence[Encoded], origin: Origin) -> Tree:
    """The tree of a conversation's trained answers, oldest first.

    When each answer's sequence continues the one before (the usual case) it is a single path;
    otherwise one branch per answer behind the common prefix, in which nothing is trained, so
    that no answer counts twice.
    """
    if all(_continues(b.ids, a.ids) for a, b in pairwise(encoded)):
        last = encoded[-1]
        trained = np.zeros(len(last.ids), dtype=np.bool_)
        for answer in encoded:
            trained[answer.start : len(answer.ids)] = True
        branches = (_branch(last.ids, trained),)
        return Tree(_branch([], np.zeros(0, dtype=np.bool_)), branches, origin)
    shared = min(_common(encoded[0].ids, other.ids) for other in encoded[1:])
    return _split(encoded, min(shared, *(answer.start for answer in encoded)), origin)


def pair_tree(chosen: Encoded, rejected: Encoded, origin: Origin) -> Tree:
    """The tree of a preference pair: longest common token prefix, then chosen and rejected.

    The prefix may reach into the answers; it is shortened so that each branch keeps a token.
    """
    shared = _common(chosen.ids, rejected.ids)
    shared = min(shared, len(chosen.ids) - 1, len(rejected.ids) - 1)
    return _split((chosen, rejected), shared, origin)


def _split(encoded: Sequence[Encoded], shared: int, origin: Origin) -> Tree:
    masks = []
    for answer in encoded:
        mask = np.zeros(len(answer.ids), dtype=np.bool_)
        mask[answer.start :] = True
        masks.append(mask)
    return Tree(
        _branch(encoded[0].ids[:shared], masks[0][:shared]),
        tuple(
            _branch(answer.ids[shared:], mask[shared:], first=shared == 0)
            for answer, mask in zip(encoded, masks, strict=True)
        ),
        origin,
    )


def _branch(ids: Sequence[int], trained: Any, *, first: bool = True) -> Branch:
    """A branch; the `first` token of a sequence has nothing before it to be predicted from."""
    if first and len(trained):
        trained[0] = False
    return Branch(np.frombuffer(array("i", ids), dtype=np.int32), trained)


def _render(chat: Chat, turns: tuple[Turn, ...], exchange: Exchange, *, prompt: bool) -> str:
    try:
        return chat.codec.render(turns, prompt=prompt)
    except UserError as error:
        raise UserError(f"{exchange.origin}: {error}") from error


def _delimit(chat: Chat, exchange: Exchange, prompt: str) -> str | Refused:
    """What the template writes after the prompt for this answer, up to the end token."""
    turns = (*exchange.before, Turn("assistant", exchange.answer))
    text = _render(chat, turns, exchange, prompt=False)
    closing = chat.ending.closing + chat.ending.trailer
    if not text.startswith(prompt) or not text.endswith(closing):
        return Refused("the chat template does not continue its own prompt with the answer")
    answer = text[len(prompt) : len(text) - len(chat.ending.trailer)]
    if chat.ending.token in answer[: -len(chat.ending.token)]:
        return Refused("the answer's text contains the end-of-turn token", chat.ending.token)
    return answer


def _join(chat: Chat, prompt: list[int], whole: list[int], answer: str) -> Encoded | Refused:
    bos = chat.codec.bos_token_id
    if bos is not None and prompt[:2] == [bos, bos]:
        return Refused("the prompt's text begins with a second BOS token")
    end = chat.ending.token_id
    if not _continues(whole, prompt):
        continuation = _continuation(chat, prompt, whole, answer)
        if continuation is None:
            return Refused("the tokenizer merges prompt and answer, and not reversibly")
        whole = prompt + continuation
    if len(whole) <= len(prompt) or whole[-1] != end:
        return Refused("the answer does not end with the end-of-turn token")
    return Encoded(whole, len(prompt))


def _continuation(chat: Chat, prompt: list[int], whole: list[int], answer: str) -> list[int] | None:
    """Token ids for `answer` behind `prompt` that decode to what the whole decodes to.

    Tried: the text by itself (byte-level BPE), and behind a line break that is taken off again
    (SentencePiece puts a space before a text, but not inside one).
    """
    alone, anchor, anchored = chat.codec.tokenize([answer, "\n", "\n" + answer])
    candidates = [alone]
    if _continues(anchored, anchor):
        candidates.append(anchored[len(anchor) :])
    text = chat.codec.decode(whole)
    return next((ids for ids in candidates if chat.codec.decode(prompt + ids) == text), None)


def _continues(ids: list[int], start: list[int]) -> bool:
    return ids[: len(start)] == start


def _common(a: list[int], b: list[int]) -> int:
    """Length of the longest common prefix."""
    length = min(len(a), len(b))
    same = 0
    # Blocks compare much faster than their elements, and prompts are long.
    for step in (64, 1):
        while same < length and a[same : same + step] == b[same : same + step]:
            same += step
        same = min(same, length)
    return same
