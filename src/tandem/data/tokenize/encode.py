"""Encode what is trained of a record: its answers, each after the turns before it, or all text."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from tandem.data.records import Conversation, Origin, Preference, Turn
from tandem.data.tokenize import template_capabilities
from tandem.data.tokenize.chat_template import ChatTemplate, Ending, ending_or_none, find_ending
from tandem.data.tokenize.codec import Codec, CodecParts, FastCodec, make_codec
from tandem.data.tokenize.template_capabilities import Refused, TemplateCapabilities, Thought
from tandem.data.tokenize.template_omissions import Omissions
from tandem.data.tokenize.vocabulary import NoRow
from tandem.errors import UserError
from tandem.recipe.choices import LossOn

UNTRAINED = "every answer has weight 0"


def trained_exchanges(conversation: Conversation) -> list[Exchange]:
    """Return the trained answers of a conversation, each with the turns before it."""
    turns, tools = conversation.turns, conversation.tools
    return [
        Exchange(turns[:index], turn.content, conversation.origin, turn.extra, tools)
        for index, turn in enumerate(turns)
        if is_trained(turn)
    ]


def until_last_trained(turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
    """Return the turns up to the last trained answer; later ones cannot influence training."""
    return turns[: 1 + max((i for i, turn in enumerate(turns) if is_trained(turn)), default=-1)]


def is_answer(turn: Turn, loss_on: LossOn) -> bool:
    """Return whether a turn is an answer that is trained, alone or with the text."""
    return turn.role == "assistant" and (turn.trained or loss_on == "text")


def is_trained(turn: Turn) -> bool:
    """Return whether a turn is an answer without weight 0."""
    return turn.role == "assistant" and turn.trained


def answer_exchanges(record: Preference) -> list[Exchange]:
    """Return the answers of a preference record after their prompt, the best one first."""
    return [
        Exchange(record.prompt, text, record.origin, tools=record.tools) for text in record.answers
    ]


def encode_conversation(
    chat: ChatTokenizer, conversation: Conversation, limit: int, loss_on: LossOn = "answers"
) -> list[Encoded | Refused]:
    """Encode a conversation's trained answers, each after its prompt; or its whole text as one."""
    if loss_on == "text":
        return [encode_text(chat, conversation, limit)]
    return encode_exchanges(chat, trained_exchanges(conversation), limit)


END_INSIDE = "the answer's text contains the end-of-turn token"
DOUBLED_BOS = "the prompt's text begins with a second BOS token"
# Tokens beyond a limit that are tokenised as well, so that the cut changes no token within it.
_MARGIN = 64


@dataclass(frozen=True, slots=True)
class ChatTokenizer:
    """A tokenizer with its chat template."""

    codec: Codec  # renders, encodes and decodes
    template: ChatTemplate
    ending: Ending  # how the template ends an answer, or why it does not
    # how a separate template for records with tools does, if there is one
    tool_ending: Ending | None
    # what is rendered of tools and calls of records with a list of tools
    with_tools: TemplateCapabilities
    without_tools: TemplateCapabilities  # what is rendered of calls of records without one
    omissions: Omissions  # what the template leaves out
    thought: Thought | None  # the tag with which its prompts open the reasoning, if they do
    parts: CodecParts | None  # plain values that make the same in another process, if there are any

    @classmethod
    def of(cls, tokenizer: Any, template: ChatTemplate, rows: int | None = None) -> ChatTokenizer:
        """Make one for a model with `rows` rows in its embedding; None: enough for every token.

        Raises `UserError` when the template writes a token without row.
        """
        ending = ending_or_none(tokenizer, template)
        tool_ending = None
        if template.for_tools is not None:
            with suppress(UserError):  # the first record with tools, if there is one, reports it
                tool_ending = find_ending(tokenizer, template, template_capabilities.PROBE_TOOLS)
        codec, parts = make_codec(tokenizer, template, ending, tool_ending, rows)
        return cls._probed(codec, template, ending, tool_ending, parts)

    @classmethod
    def from_parts(cls, parts: CodecParts) -> ChatTokenizer:
        """Make the chat tokenizer that `parts` came from."""
        return cls._probed(FastCodec(parts), parts.template, parts.ending, parts.tool_ending, parts)

    @classmethod
    def _probed(
        cls,
        codec: Codec,
        template: ChatTemplate,
        ending: Ending,
        tool_ending: Ending | None,
        parts: CodecParts | None,
    ) -> ChatTokenizer:
        def render(turns: Sequence[Turn], tools: str) -> str:
            return codec.render(turns, prompt=False, tools=tools)

        with_tools = template_capabilities.probe_template(render)
        own = template.for_tools is not None
        return cls(
            codec,
            template,
            ending,
            tool_ending,
            with_tools,
            template_capabilities.probe_template(render, given="") if own else with_tools,
            Omissions(lambda turns, tools, p: codec.render(turns, prompt=p, tools=tools)),
            template_capabilities.open_thought(codec.render([Turn("user", "Which?")], prompt=True)),
            parts,
        )

    def capabilities(self, tools: str) -> TemplateCapabilities:
        """Return what the template renders of these tools and of calls."""
        return self.with_tools if tools else self.without_tools

    def ending_for(self, tools: str) -> Ending:
        """Return how the template ends an answer of turns with these tools; UserError if none."""
        if tools and self.tool_ending is not None:
            return self.tool_ending
        if self.ending.missing:
            raise UserError(self.ending.missing)
        return self.ending


@dataclass(frozen=True, slots=True)
class Exchange:
    """An answer to encode, and the turns before it. `extra` is the answer's, see `Turn`."""

    before: tuple[Turn, ...]
    answer: str
    origin: Origin
    extra: str = ""
    tools: str = ""


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids of prompt and answer; the answer, end token included, starts at `start`.

    `whole` is False where only a part of a very long text was tokenised. Then there are more `ids`
    than the limit; up to the limit they are the text's, if `start` is within it.
    """

    ids: list[int]
    start: int
    whole: bool = True

    @property
    def size(self) -> int:
        """Tokens of the answer."""
        return len(self.ids) - self.start

    def cut(self, length: int) -> Encoded:
        """Return the first `length` tokens; an answer that loses its end loses its end token."""
        return Encoded(self.ids[:length], self.start)


def encode_exchanges(
    chat: ChatTokenizer, exchanges: Sequence[Exchange], limit: int | None = None
) -> list[Encoded | Refused]:
    """Encode answers after their prompts, in one tokenizer call.

    Of a text that surely has more than `limit` tokens only a part is tokenised, see `Encoded`. The
    prompt's ids are those of the rendered prompt alone. Where the tokenizer would merge its end
    with the answer's beginning, the answer is tokenised as a continuation instead, and kept only if
    the text survives decoding. Raises `UserError` when the template refuses the turns.
    """
    texts: list[_Texts | Refused] = []
    prompt, same = "", None
    for exchange in exchanges:
        if same is None or (same.before, same.tools) != (exchange.before, exchange.tools):
            prompt = render(chat, exchange, exchange.before, prompt=True)
            same = exchange
        texts.append(_delimit(chat, exchange, prompt, limit))
    wanted = dict.fromkeys(
        text
        for pair in texts
        if not isinstance(pair, Refused)
        for text in (pair.prompt, pair.prompt + pair.answer)
    )
    try:
        ids = dict(zip(wanted, chat.codec.tokenize(list(wanted)), strict=True))
    except NoRow as error:
        raise _of_record(chat, exchanges, texts, error) from None
    return [
        pair
        if isinstance(pair, Refused)
        else _join(chat, ids[pair.prompt], ids[pair.prompt + pair.answer], pair)
        for pair in texts
    ]


def _of_record(
    chat: ChatTokenizer,
    exchanges: Sequence[Exchange],
    texts: Sequence[_Texts | Refused],
    error: NoRow,
) -> NoRow:
    """Return the error of the first record that has it, with its file and row."""
    for exchange, text in zip(exchanges, texts, strict=True):
        try:
            if not isinstance(text, Refused):
                chat.codec.tokenize([text.prompt, text.prompt + text.answer])
        except NoRow as own:
            return NoRow(f"{exchange.origin}: {own}")
    return error


def encode_text(
    chat: ChatTokenizer, conversation: Conversation, limit: int | None = None
) -> Encoded | Refused:
    """Encode a whole conversation as the template renders it; all its tokens are trained.

    `limit` is as in `encode_exchanges`. Raises `UserError` when the template refuses the turns.
    """
    turns = conversation.turns
    end = chat.ending_for(conversation.tools).token
    if any(turn.role == "assistant" and end in turn.content for turn in turns):
        return Refused(END_INSIDE, end)
    text = render(chat, conversation, turns, prompt=False)
    room = room_for(chat, text, limit)
    try:
        (ids,) = chat.codec.tokenize([text[:room]])
    except NoRow as error:
        raise NoRow(f"{conversation.origin}: {error}") from None
    bos = chat.codec.bos_token_id
    if bos is not None and ids[:2] == [bos, bos]:
        return Refused(DOUBLED_BOS)
    return Encoded(ids, 0, whole=room is None)


def render(
    chat: ChatTokenizer,
    record: Conversation | Preference | Exchange,
    turns: Sequence[Turn],
    *,
    prompt: bool,
) -> str:
    """Render some turns of a record; raise `UserError` with its origin when that is refused."""
    try:
        return chat.codec.render(turns, prompt=prompt, tools=record.tools)
    except UserError as error:
        raise UserError(f"{record.origin}: {error}") from error


def room_for(chat: ChatTokenizer, text: str, limit: int | None) -> int | None:
    """Return how many characters of a text show that it has more than `limit` tokens; None: all.

    Some more than needed, because the text near a token can change the token.
    """
    if limit is None or len(text) <= limit:
        return None
    room = chat.codec.most_characters(limit + _MARGIN)
    return None if room is None or len(text) <= room else room


@dataclass(frozen=True, slots=True)
class _Texts:
    """A rendered prompt and the answer behind it; parts of them if `whole` is False."""

    prompt: str
    answer: str
    end: int  # the id of the end token
    whole: bool
    clipped: bool  # whether the answer's end, with its end token, is left out


def _delimit(
    chat: ChatTokenizer, exchange: Exchange, prompt: str, limit: int | None
) -> _Texts | Refused:
    """Return the prompt, and what the template writes for the answer up to the end token."""
    answered = Turn("assistant", exchange.answer, extra=exchange.extra)
    turns = (*exchange.before, answered)
    text = render(chat, exchange, turns, prompt=False)
    ending = chat.ending_for(exchange.tools)
    reasoned = bool(chat.capabilities(exchange.tools).reasoning)
    answer = template_capabilities.text_behind(answered, prompt, text, ending, reasoned=reasoned)
    if isinstance(answer, Refused):
        return answer
    if ending.token in answer[: -len(ending.token)]:
        return Refused(END_INSIDE, ending.token)
    before, behind = room_for(chat, prompt, limit), room_for(chat, answer, limit)
    if before is None and behind is None:
        return _Texts(prompt, answer, ending.token_id, whole=True, clipped=False)
    # The end of a long prompt, because the answer's length depends on the text before it.
    return _Texts(
        prompt if before is None else prompt[-before:],
        answer[:behind],
        ending.token_id,
        whole=False,
        clipped=behind is not None,
    )


def _join(
    chat: ChatTokenizer, prompt: list[int], whole: list[int], texts: _Texts
) -> Encoded | Refused:
    bos = chat.codec.bos_token_id
    if bos is not None and prompt[:2] == [bos, bos]:
        return Refused(DOUBLED_BOS)
    if not _continues(whole, prompt):
        continuation = _continuation(chat, prompt, whole, texts.answer)
        if continuation is None:
            return Refused("the tokenizer merges prompt and answer, and not reversibly")
        whole = prompt + continuation
    if len(whole) <= len(prompt) or (whole[-1] != texts.end and not texts.clipped):
        return Refused("the answer does not end with the end-of-turn token")
    return Encoded(whole, len(prompt), texts.whole)


def _continuation(
    chat: ChatTokenizer, prompt: list[int], whole: list[int], answer: str
) -> list[int] | None:
    """Return ids of `answer` that, behind `prompt`, decode to what the whole decodes to.

    Candidates: the text by itself (byte-level BPE), and behind a line break that is taken off again
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
