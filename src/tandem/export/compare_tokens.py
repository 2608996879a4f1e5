"""Compares a file's tokenizer, end tokens and chat template with those of the model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tandem.data.records import Turn
from tandem.data.tokenize.chat_template import (
    ChatTemplate,
    find_ending,
    refusals,
    render,
    tokenize,
)
from tandem.data.tokenize.light_tokenizer import compile_template
from tandem.errors import UserError
from tandem.export.file_tokenizer import FileTokenizer, first_difference
from tandem.export.probes import CONVERSATIONS, FINISHED, PADDED, RARE, TEXTS
from tandem.export.vocabulary import FileVocabulary


@dataclass(frozen=True)
class ChatModel:
    """A model as conversations reach it: its tokenizer, its template, and where answers end."""

    tokenizer: Any
    template: ChatTemplate
    stops: tuple[int, ...]  # all tokens that end an answer
    rows: int


@dataclass(frozen=True)
class TokensCompared:
    """What was compared, and what differs on texts that are rare."""

    texts: int
    conversations: int
    remarks: tuple[str, ...]


def compare_tokens(own: FileVocabulary, model: ChatModel) -> TokensCompared:
    """Compare a file's tokenizer and template with the model's.

    Raises UserError where a probe text or conversation has other tokens, or an answer would end
    elsewhere.
    """
    _compare_vocabulary(own, model)
    there = FileTokenizer(own)
    _compare_ends(there, model)
    rendered = _compare_templates(own, there, model)
    remarks = _compare_texts(there, own, model)
    return TokensCompared(len(TEXTS), rendered, tuple(remarks))


def settle_prefix(own: FileVocabulary, model: ChatModel) -> FileVocabulary:
    """The vocabulary that puts a blank in front of pieces where the model's tokenizer does so.

    llama.cpp does so after every special token, or nowhere; transformers' tokenizers can do so at
    the start alone, where a conversation has its BOS. Whether conversations agree decides.
    """
    if own.model != "llama":
        return own
    for prefix in (True, False):
        tried = replace(own, add_space_prefix=prefix)
        try:
            _compare_templates(tried, FileTokenizer(tried), model)
        except UserError:
            continue
        return tried
    return own


def render_from_file(
    own: FileVocabulary, turns: Sequence[Turn], *, prompt: bool, template: str = "default"
) -> str | None:
    """A conversation as the file's template writes it; None where the template refuses it."""
    special = {
        f"{name}_token": own.tokens[index] if index is not None else ""
        for name, index in (("bos", own.bos), ("eos", own.eos))
    }
    try:
        write = compile_template(own.templates[template])
        return write(
            messages=[turn.message() for turn in turns],
            tools=None,
            add_generation_prompt=prompt,
            **special,
        )
    except refusals():
        return None


def model_ids(model: ChatModel, turns: Sequence[Turn], *, prompt: bool) -> list[int] | None:
    """The tokens that the model gets for a conversation; None where its template refuses it."""
    try:
        text = render(model.tokenizer, model.template, turns, prompt=prompt)
    except UserError:
        return None
    return tokenize(model.tokenizer, [text])[0]


def in_words(model: ChatModel, ours: Sequence[int], theirs: Sequence[int]) -> str:
    """Where two lists of tokens part, as a part of a sentence: the model's, and the file's."""
    place = first_difference(ours, theirs)
    named = model.tokenizer.convert_ids_to_tokens
    before, after = max(0, place - 2), place + 4
    show = [" ".join(map(str, named(list(ids[before:after])))) for ids in (ours, theirs)]
    return f"from token {place} on the model has '{show[0]}', the file '{show[1]}'"


def _compare_vocabulary(own: FileVocabulary, model: ChatModel) -> None:
    if len(own.tokens) != model.rows:
        raise UserError(
            f"the file has {len(own.tokens)} tokens, and the model {model.rows} rows: llama.cpp "
            "would not load it. It is not of this model."
        )
    for token, index in model.tokenizer.get_vocab().items():
        if index < model.rows and own.tokens[index] != token:
            raise UserError(
                f"token {index} is {own.tokens[index]!r} in the file and {token!r} in the model: "
                "the file has another tokenizer."
            )
    eos = model.tokenizer.eos_token_id
    if own.eos != eos:
        named = None if own.eos is None else own.tokens[own.eos]
        raise UserError(
            f"the file's end token is {own.eos} ({named!r}), the model's {eos} "
            f"({model.tokenizer.eos_token!r}). Answers would end elsewhere, and templates that "
            "write eos_token would write another one."
        )


def _compare_ends(there: FileTokenizer, model: ChatModel) -> None:
    ending = find_ending(model.tokenizer, model.template)
    if ending is None:
        raise UserError(
            f"chat template {model.template.name!r} does not end an answer with a token, so no "
            "program would know where one ends. Choose another --chat_template."
        )
    if ending.token_id not in there.ends():
        raise UserError(
            f"the chat template ends an answer with {ending.token!r} ({ending.token_id}), and "
            "llama.cpp does not stop there with this file: neither eos_token_id nor eot_token_id "
            "names it. Export the model again."
        )


def _conversations() -> Iterator[tuple[tuple[Turn, ...], bool]]:
    yield from ((turns, True) for turns in (*CONVERSATIONS, PADDED))
    yield from ((turns, False) for turns in FINISHED)


def _compare_templates(own: FileVocabulary, there: FileTokenizer, model: ChatModel) -> int:
    """Compare what both templates render; returns how many conversations both render."""
    if "default" not in own.templates:
        raise UserError(
            "the file has no chat template (tokenizer.chat_template): programs would take one of "
            "their own. Export the model again."
        )
    compared = 0
    for turns, prompt in _conversations():
        ours = model_ids(model, turns, prompt=prompt)
        text = render_from_file(own, turns, prompt=prompt)
        theirs = None if text is None else there.encode_prompt(text)
        if ours == theirs:
            compared += ours is not None
            continue
        roles = ", ".join(turn.role for turn in turns)
        if ours is None or theirs is None:
            refusing = "model" if ours is None else "file"
            raise UserError(
                f"the chat template of the {refusing} refuses the turns {roles}, the other renders "
                "them. The file has another template than the model."
            )
        raise UserError(
            f"the conversation ({roles}) has other tokens by the file's chat template and "
            f"tokenizer: {in_words(model, ours, theirs)}."
        )
    if not compared:
        raise UserError(
            f"chat template {model.template.name!r} renders none of the probe conversations"
        )
    return compared


def _compare_texts(there: FileTokenizer, own: FileVocabulary, model: ChatModel) -> list[str]:
    remarks = []
    for number, text in enumerate((*TEXTS, *RARE)):
        ours, theirs = tokenize(model.tokenizer, [text])[0], there.encode(text)
        if ours == theirs:
            continue
        difference = in_words(model, ours, theirs)
        if number >= len(TEXTS):
            remarks.append(f"llama.cpp cuts {text!r} otherwise: {difference}")
        elif own.model == "llama" and ours == _without_prefix(there, own, text):
            remarks.append(
                "llama.cpp puts no blank in front of a text that has no template, the model's "
                "tokenizer does; conversations are the same"
            )
        else:
            raise UserError(f"the text {text!r} has other tokens in the file: {difference}.")
    return list(dict.fromkeys(remarks))


def _without_prefix(there: FileTokenizer, own: FileVocabulary, text: str) -> list[int] | None:
    """A text's tokens with a blank in front, where the file says that none is put there."""
    return None if own.add_space_prefix else there.encode(f" {text}")
