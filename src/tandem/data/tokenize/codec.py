"""What encoding needs of a tokenizer and a chat template: rendered texts, token ids, and back.

`FastCodec` gives exactly what transformers' tokenizer gives, without its objects: it is made from
plain values, so that another process can have it, and identified by them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, Protocol

from tandem.data.records import Turn
from tandem.data.tokenize import chat_template
from tandem.data.tokenize.chat_template import ChatTemplate, Ending
from tandem.data.tokenize.light_tokenizer import compile_template
from tandem.data.tokenize.vocabulary import (
    longest_token,
    require_known,
    require_rows,
    tokens_without_row,
)
from tandem.errors import UserError
from tandem.storage.hashing import hash_json

# Turns that show whether a codec renders and encodes as transformers does.
_PROBE = (
    Turn("system", "Be brief. "),
    Turn("user", " Two and two?\n\nAnd\tthree?"),
    Turn("assistant", "Four, \u00e9\u4e16 ..."),
    Turn("user", "\nMore"),
)


class Codec(Protocol):
    """Renders turns, encodes texts with nothing added, decodes ids."""

    bos_token_id: int | None
    eos_token_id: int | None

    def strange(self, ids: Iterable[int]) -> int | None:
        """Return the first id that the tokenizer does not have; see `require_known`."""
        ...

    def render(self, turns: Sequence[Turn], *, prompt: bool, tools: str = "") -> str:
        """Return the text of some turns; see `chat_template.render`."""
        ...

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of rendered texts; raise `NoRow` if the model lacks one's row."""
        ...

    def decode(self, ids: list[int]) -> str:
        """Return the text of token ids, special tokens included."""
        ...

    def spans(self, text: str) -> list[tuple[int, int]]:
        """Return the character spans of a text's tokens, or of characters if those are unknown."""
        ...

    def most_characters(self, tokens: int) -> int | None:
        """Return how many characters `tokens` tokens can have at most; None if unknown."""
        ...


class TransformersCodec:
    """Any tokenizer of transformers, through its own methods."""

    def __init__(
        self,
        tokenizer: Any,
        template: ChatTemplate,
        rows: int | None = None,
        all_rows: int | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self._rows, self._all_rows = rows, all_rows
        self._known: frozenset[int] = frozenset()  # all ids, once one is asked for
        self.bos_token_id: int | None = tokenizer.bos_token_id
        self.eos_token_id: int | None = tokenizer.eos_token_id

    def strange(self, ids: Iterable[int]) -> int | None:
        self._known = self._known or frozenset(self._tokenizer.get_vocab().values())
        return require_known(ids, self._all_rows, self._known)

    def render(self, turns: Sequence[Turn], *, prompt: bool, tools: str = "") -> str:
        return chat_template.render(
            self._tokenizer, self._template, turns, prompt=prompt, tools=tools
        )

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        encoded = chat_template.tokenize(self._tokenizer, texts)
        for ids in encoded:
            require_rows(ids, self._rows, self.decode)
        return encoded

    def decode(self, ids: list[int]) -> str:
        return str(
            self._tokenizer.decode(
                ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
        )

    def spans(self, text: str) -> list[tuple[int, int]]:
        if not getattr(self._tokenizer, "is_fast", False):
            return [(index, index + 1) for index in range(len(text))]
        encoded = self._tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        return [(int(start), int(end)) for start, end in encoded["offset_mapping"]]

    def most_characters(self, tokens: int) -> int | None:  # noqa: ARG002
        return None


@dataclass(frozen=True)
class CodecParts:
    """The plain values from which a `FastCodec` is made."""

    tokenizer: str  # the `tokenizers` library's JSON
    template: ChatTemplate
    special: tuple[tuple[str, Any], ...]  # the special tokens a template may write, by name
    ending: Ending  # how the template ends an answer
    # how a separate template for turns with tools ends an answer, if it does
    tool_ending: Ending | None
    bos_token_id: int | None
    shown: str  # what a few turns render as; a template may write today's date
    # of the model's embedding, where the tokenizer has more tokens; None: all have a row
    rows: int | None = None
    all_rows: int | None = None  # the same whatever the tokenizer has; None: unknown
    eos_token_id: int | None = None  # one of the `special` tokens

    @property
    def identity(self) -> str:
        """A hash of everything that rendered texts and token ids depend on."""
        import tokenizers

        return hash_json(
            {
                "tokenizer": self.tokenizer,
                "library": tokenizers.__version__,
                "template": self.template.source,
                "special": self.special,
                "bos": self.bos_token_id,
                "shown": self.shown,
                **({"for_tools": self.template.for_tools} if self.template.for_tools else {}),
                **({} if self.rows is None else {"rows": self.rows}),
            }
        )


class FastCodec:
    """A tokenizer of the `tokenizers` library with a compiled template."""

    def __init__(self, parts: CodecParts) -> None:
        from tokenizers import Tokenizer

        self.bos_token_id, self.eos_token_id = parts.bos_token_id, parts.eos_token_id
        self._rows, self._all_rows = parts.rows, parts.all_rows
        self._template = parts.template
        self._special = dict(parts.special)
        self._render = compile_template(parts.template.source, parts.template.now)
        self._render_with_tools: Callable[..., str] | None = None  # compiled when it is needed
        self._tokenizer: Any = Tokenizer.from_str(parts.tokenizer)
        self._cut = parts.ending.token if _separates(self._tokenizer, parts.ending) else None
        self._longest: int | None = None  # found when a text is long enough to ask
        self._known: frozenset[int] = frozenset()  # all ids, once one is asked for

    def strange(self, ids: Iterable[int]) -> int | None:
        self._known = self._known or frozenset(self._tokenizer.get_vocab().values())
        return require_known(ids, self._all_rows, self._known)

    def render(self, turns: Sequence[Turn], *, prompt: bool, tools: str = "") -> str:
        try:
            return self._compiled(tools)(
                messages=[turn.message() for turn in turns],
                tools=json.loads(tools) if tools else None,
                add_generation_prompt=prompt,
                **self._special,
            )
        except chat_template.refusals() as error:
            raise chat_template.cannot_render(self._template, turns, error) from error

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokenize each piece between end-of-turn tokens once; see `Codec.tokenize`.

        Pieces often repeat: a prompt alone and before its answer, a conversation's earlier turns.
        A tokenizer takes such tokens out of a text before it looks at the rest, so the ids are the
        same; each piece keeps the tokens around it, so that its surroundings are the same, too.
        """
        if self._cut is None:
            return self._encode(list(texts))
        pieces = [_cut(text, self._cut) for text in texts]
        distinct = list(dict.fromkeys(chain.from_iterable(pieces)))
        ids = dict(zip(distinct, self._encode(distinct), strict=True))
        # Each piece but the first repeats the token before it.
        return [
            [*ids[first], *chain.from_iterable(ids[piece][1:] for piece in rest)]
            for first, *rest in pieces
        ]

    def decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=False))

    def spans(self, text: str) -> list[tuple[int, int]]:
        offsets = self._tokenizer.encode(text, add_special_tokens=False).offsets
        return [(int(start), int(end)) for start, end in offsets]

    def most_characters(self, tokens: int) -> int | None:
        if self._longest is None:
            self._longest = longest_token(self._tokenizer)
        return self._longest * tokens if self._longest else None

    def _compiled(self, tools: str) -> Callable[..., str]:
        if not tools or self._template.for_tools is None:
            return self._render
        if self._render_with_tools is None:
            self._render_with_tools = compile_template(self._template.for_tools, self._template.now)
        return self._render_with_tools

    def _encode(self, texts: list[str]) -> list[list[int]]:
        encoded = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        ids: list[list[int]] = [one.ids for one in encoded]
        for some in ids:
            require_rows(some, self._rows, self.decode)
        return ids


def make_codec(
    tokenizer: Any,
    template: ChatTemplate,
    ending: Ending,
    tool_ending: Ending | None = None,
    rows: int | None = None,
) -> tuple[Codec, CodecParts | None]:
    """Return the fastest codec of a tokenizer of transformers, and its parts, if it has any.

    A tokenizer written in Python has none, nor has one that renders or encodes a few turns
    differently from a `FastCodec`. `rows` are those of the model's embedding. Raises `NoRow` where
    the template itself writes a token without a row.
    """
    all_rows = rows
    if rows is not None and not tokens_without_row(tokenizer, rows):
        rows = None
    theirs = TransformersCodec(tokenizer, template, rows, all_rows)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    plain = getattr(tokenizer, "is_fast", False) and backend is not None
    if not plain or getattr(tokenizer, "split_special_tokens", False):
        return theirs, None
    shown = [_shown(theirs, prompt) for prompt in (False, True)]
    parts = CodecParts(
        tokenizer=_plain(backend),
        template=replace(template, notices=()),
        special=tuple(sorted(_special(tokenizer.special_tokens_map).items())),
        ending=ending,
        tool_ending=tool_ending,
        bos_token_id=tokenizer.bos_token_id,
        shown=json.dumps(shown),
        rows=rows,
        all_rows=all_rows,
        eos_token_id=tokenizer.eos_token_id,
    )
    texts = [text for text in shown if text] + [turn.content for turn in _PROBE]
    # transformers writes today's date, even if a run began on another day.
    ours = FastCodec(replace(parts, template=replace(parts.template, now=None)))
    encoded = theirs.tokenize(texts)
    same = (
        shown == [_shown(ours, prompt) for prompt in (False, True)]
        and encoded == ours.tokenize(texts)
        and [theirs.decode(ids) for ids in encoded] == [ours.decode(ids) for ids in encoded]
    )
    if not same:
        return theirs, None
    if template.now is not None:
        ours = FastCodec(parts)
        parts = replace(parts, shown=json.dumps([_shown(ours, prompt) for prompt in (False, True)]))
    return ours, parts


def _shown(codec: Codec, prompt: bool) -> str:
    """Render the probe; templates may refuse its system turn, or a prompt."""
    turns = _PROBE if prompt else _PROBE[:3]
    for start in (0, 1):
        try:
            return codec.render(turns[start:], prompt=prompt)
        except UserError:
            continue
    return ""


def _plain(backend: Any) -> str:
    """Return a tokenizer's JSON without the truncation and padding of its last call."""
    if backend.truncation is None and backend.padding is None:
        return str(backend.to_str())
    from tokenizers import Tokenizer

    copy = Tokenizer.from_str(backend.to_str())
    copy.no_truncation()
    copy.no_padding()
    return str(copy.to_str())


def _special(tokens: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: [str(one) for one in value] if isinstance(value, list | tuple) else str(value)
        for name, value in tokens.items()
    }


def _separates(tokenizer: Any, ending: Ending) -> bool:
    """Return whether the end token always splits a text, whatever stands beside it.

    The tokenizer must take it out of the text as it is (not normalised), also within a word, and it
    must overlap with no other such token.
    """
    added = tokenizer.get_added_tokens_decoder()
    own = added.get(ending.token_id)
    token = ending.token
    if own is None or own.content != token or own.normalized or own.single_word:
        return False
    if token != token.strip():
        return False
    others = (one.content for one in added.values() if one.content != token)
    return not any(_overlap(token, other) for other in others)


def _overlap(a: str, b: str) -> bool:
    if a in b or b in a:
        return True
    sizes = range(1, min(len(a), len(b)))
    return any(a[-size:] == b[:size] or b[-size:] == a[:size] for size in sizes)


def _cut(text: str, token: str) -> list[str]:
    """Cut a text at its end tokens into pieces, each with the tokens around it."""
    parts = text.split(token)
    last = len(parts) - 1
    pieces = [
        (token if index else "") + part + (token if index < last else "")
        for index, part in enumerate(parts)
    ]
    return pieces[:-1] if last and not parts[-1] else pieces
