"""One piece of a data set from its rows to encoded trees and ledger lines, in any process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice

from tandem.data.encoded.dataset import FlatArrays, to_arrays
from tandem.data.formats.format import Kind
from tandem.data.ledger import Entry
from tandem.data.read_records import OnBadRecord, records_of
from tandem.data.records import Conversation, Example, PreferencePair, prompt_key
from tandem.data.sources.chunks import Chunk
from tandem.data.tokenize.behind_prompt import Refused
from tandem.data.tokenize.encode import (
    ChatTokenizer,
    Encoded,
    Exchange,
    LossOn,
    conversation_example,
    encode_exchanges,
    encode_text,
    is_answer,
    pair_example,
    pair_exchanges,
    trained_exchanges,
)
from tandem.data.tokenize.template_capabilities import NO_REASONING, in_form, reason_unsupported
from tandem.data.truncation.conversation import (
    Fitted,
    Light,
    fit_conversation,
    fit_pair,
    skip_old_turns,
)
from tandem.data.truncation.limits import Limits


@dataclass(frozen=True, slots=True)
class EncodingOptions:
    """What is made of every record, apart from tokenizer and template."""

    kind: Kind
    limits: Limits
    on_bad_record: OnBadRecord
    loss_on: LossOn = "answers"


@dataclass(frozen=True, slots=True)
class EncodedChunk:
    """A piece's trees, and an entry for each record that was cut or dropped, by row."""

    file: str
    arrays: FlatArrays
    entries: tuple[Entry, ...]


def encode_chunk(
    chat: ChatTokenizer, plan: EncodingOptions, chunk: Chunk, known: str
) -> EncodedChunk:
    """Read, encode and fit the records of a piece, in the format with the id `known`.

    Raises `UserError` for rows or turns that stop a run.
    """
    found = list(records_of(chunk, known, plan.on_bad_record))
    entries = [one for one in found if isinstance(one, Entry)]
    records = [one for one in found if not isinstance(one, Entry)]
    records = [_in_form(chat, record) for record in records]
    lights = [_lighten(chat, plan, record) for record in records]
    exchanges = [_exchanges(plan, light) for light in lights]
    wanted = [one for some in exchanges for one in some]
    encoded = iter(encode_exchanges(chat, wanted, plan.limits.sequence))
    examples, prompts = [], []
    for record, light, own in zip(records, lights, exchanges, strict=True):
        fitted = _fit(chat, plan, light, list(islice(encoded, len(own))))
        if isinstance(fitted, Refused):
            entries.append(Entry.dropped(record.origin, fitted.reason, fitted.detail))
            continue
        if fitted.reason:
            entries.append(Entry.truncated(record.origin, fitted.reason, fitted.detail))
        examples.append(_tree(record, fitted.encoded))
        prompts.append(prompt_key(record))
    entries.sort(key=lambda entry: entry.row)
    return EncodedChunk(chunk.file, to_arrays(examples, prompts), tuple(entries))


def _in_form(
    chat: ChatTokenizer, record: Conversation | PreferencePair
) -> Conversation | PreferencePair:
    """The record with its tool calls as the template takes them."""
    taken = chat.taken(record.tools)
    if isinstance(record, Conversation):
        return replace(record, turns=in_form(taken, record.turns))
    return replace(record, prompt=in_form(taken, record.prompt))


def _lighten(
    chat: ChatTokenizer, plan: EncodingOptions, record: Conversation | PreferencePair
) -> Light | PreferencePair | Refused:
    """What can be encoded of a record together with others, or why it cannot be trained."""
    taken = chat.taken(record.tools)
    reason = reason_unsupported(taken, record)
    if reason == NO_REASONING and chat.thought is not None and plan.loss_on == "answers":
        reason = ""  # it is written behind the prompt, which opens it
    if isinstance(record, PreferencePair):
        reason = reason or chat.omissions.of_prompt(record.prompt, record.tools)
        return Refused(reason, _named(chat)) if reason else record
    if reason:
        return Refused(reason, _named(chat))
    light = skip_old_turns(chat, record, plan.limits, plan.loss_on)
    if isinstance(light, Refused):
        return light
    turns = light.conversation.turns
    answers = [i for i, turn in enumerate(turns) if is_answer(turn, plan.loss_on)]
    if plan.loss_on == "text":
        answers = answers[-1:]
    reason = chat.omissions.of_answers(
        turns, answers, record.tools, reasoned=bool(taken.reasoning) and plan.loss_on == "answers"
    )
    return Refused(reason, _named(chat)) if reason else light


def _named(chat: ChatTokenizer) -> str:
    """Which template does not render something."""
    return f"chat_template: {chat.template.name}"


def _exchanges(plan: EncodingOptions, light: Light | PreferencePair | Refused) -> list[Exchange]:
    """What to encode of a record together with others; nothing of one that goes another way."""
    if isinstance(light, PreferencePair):
        return pair_exchanges(light)
    if isinstance(light, Refused) or plan.loss_on == "text":
        return []
    return trained_exchanges(light.conversation)


def _fit(
    chat: ChatTokenizer,
    plan: EncodingOptions,
    light: Light | PreferencePair | Refused,
    encoded: Sequence[Encoded | Refused],
) -> Fitted | Refused:
    if isinstance(light, Refused):
        return light
    if isinstance(light, PreferencePair):
        return fit_pair(chat, light, encoded, plan.limits)
    conversation = light.conversation
    if plan.loss_on == "text":
        encoded = [encode_text(chat, conversation, plan.limits.sequence)]
    return fit_conversation(chat, conversation, encoded, plan.limits, plan.loss_on, light.dropped)


def _tree(record: Conversation | PreferencePair, encoded: Sequence[Encoded]) -> Example:
    if isinstance(record, Conversation):
        return conversation_example(encoded, record.origin)
    return pair_example(encoded[0], encoded[1], record.origin)
