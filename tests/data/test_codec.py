"""The quick way to ids and texts gives exactly what transformers' tokenizer gives."""

from __future__ import annotations

import random
from typing import Any

import pytest

from tandem.data.codec import FastCodec, TransformersCodec, make_codec
from tandem.data.encode import Chat
from tandem.data.records import Turn
from tandem.data.template import (
    ChatTemplate,
    require_ending,
    resolve_template,
    template_names,
)
from tandem.errors import UserError

# Pieces that tokenizers treat specially: blanks, line breaks, end tokens, halves of end tokens.
PIECES = [
    "Hello", " there", "  ", "\n", "\n\n", "\t", ".", "é", "世界", "🙂", "<", "</", "</s", "</s>",
    "s>", "<s>", "<|im_end|>", "<|im_end", "|>", "<|im_start|>", "<|endoftext|>", "user", "▁",
    "a" * 40, "",
]  # fmt: skip
TOKENIZERS = ["mistral_tokenizer", "stories_tokenizer", "byte_tokenizer"]


def texts(count: int) -> list[str]:
    draw = random.Random(3)
    return ["".join(draw.choices(PIECES, k=draw.randrange(12))) for _ in range(count)]


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("template", template_names())
def test_ids_texts_and_spans_are_transformers_own(
    name: str, template: str, request: pytest.FixtureRequest
) -> None:
    tokenizer = request.getfixturevalue(name)
    try:
        chat = Chat.of(tokenizer, resolve_template(tokenizer, template))
    except UserError:  # no such end token
        return
    ours, theirs = chat.codec, TransformersCodec(tokenizer, chat.template)
    assert isinstance(ours, FastCodec)
    assert ours._cut == chat.ending.token
    given = texts(1500)
    ids = theirs.tokenize(given)
    assert ours.tokenize(given) == ids
    assert [ours.decode(one) for one in ids] == [theirs.decode(one) for one in ids]
    assert [ours.spans(text) for text in given[:200]] == [theirs.spans(t) for t in given[:200]]
    for first, second, third in zip(given[::3], given[1::3], given[2::3], strict=True):
        turns = [Turn("system", first), Turn("user", second), Turn("assistant", third)]
        for some in (turns, turns[:2], turns[1:]):
            for prompt in (False, True):
                assert ours.render(some, prompt=prompt) == theirs.render(some, prompt=prompt)


def test_refusals_are_told_alike(mistral_tokenizer: Any) -> None:
    template = resolve_template(mistral_tokenizer, "neural-chat")
    chat = Chat.of(mistral_tokenizer, template)
    turns = [Turn("user", "Q"), Turn("system", "S")]
    messages = []
    for codec in (chat.codec, TransformersCodec(mistral_tokenizer, template)):
        with pytest.raises(UserError, match="cannot render the turns") as refused:
            codec.render(turns, prompt=True)
        messages.append(str(refused.value))
    assert messages[0] == messages[1]


@pytest.mark.parametrize(
    "beside",
    [
        {"content": "</s>x", "special": True, "normalized": False},  # contains the end token
        {"content": "Z</", "special": True, "normalized": False},  # begins where it may end
    ],
)
def test_texts_are_not_cut_at_a_token_that_may_be_part_of_another(
    beside: dict[str, Any], mistral_tokenizer: Any
) -> None:
    import copy

    from tokenizers import AddedToken

    tokenizer = copy.deepcopy(mistral_tokenizer)
    tokenizer.add_tokens([AddedToken(beside.pop("content"), **beside)])
    template = resolve_template(tokenizer, "neural-chat")
    codec = Chat.of(tokenizer, template).codec
    assert isinstance(codec, FastCodec)
    assert codec._cut is None
    given = [*texts(300), "a</s>x b", "aZ</s>b"]
    assert codec.tokenize(given) == TransformersCodec(tokenizer, template).tokenize(given)


def test_a_tokenizer_that_says_otherwise_keeps_its_own_way(mistral_tokenizer: Any) -> None:
    template = resolve_template(mistral_tokenizer, "neural-chat")
    ending = require_ending(mistral_tokenizer, template)

    class Otherwise(type(mistral_tokenizer)):  # type: ignore[misc]
        def _encode_plus(self, *arguments: Any, **named: Any) -> Any:
            encoded = super()._encode_plus(*arguments, **named)
            encoded["input_ids"] = [[5, *ids] for ids in encoded["input_ids"]]
            return encoded

    own = mistral_tokenizer.__class__
    mistral_tokenizer.__class__ = Otherwise
    try:
        codec, parts = make_codec(mistral_tokenizer, template, ending)
    finally:
        mistral_tokenizer.__class__ = own
    assert isinstance(codec, TransformersCodec)
    assert parts is None


def test_a_template_that_writes_the_date_has_another_identity_every_day(
    mistral_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = resolve_template(mistral_tokenizer, "zephyr").source
    dated = ChatTemplate("dated", "{{ strftime_now('%d') }}" + plain)
    first = Chat.of(mistral_tokenizer, dated).parts
    import transformers.utils.chat_template_utils as theirs

    class Tomorrow:
        @staticmethod
        def now() -> Any:
            from datetime import datetime, timedelta

            return datetime.now() + timedelta(days=1)

    assert first is not None
    before = first.identity
    again = Chat.of(mistral_tokenizer, dated).parts
    assert again is not None
    assert again.identity == before
    monkeypatch.setattr(theirs, "datetime", Tomorrow)
    other = Chat.of(mistral_tokenizer, dated).parts
    assert other is not None
    assert other.identity != before
