"""What each length policy keeps, with real tokenizers and for inputs that nobody thought of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tandem.data.records import Conversation, Origin, Preference, Turn
from tandem.data.tokenize.chat_template import prompt_ids, resolve_template
from tandem.data.tokenize.encode import (
    ChatTokenizer,
    Encoded,
    answer_exchanges,
    encode_conversation,
    encode_exchanges,
)
from tandem.data.tokenize.template_capabilities import Refused
from tandem.data.truncation import prompt
from tandem.data.truncation.conversation import fit_conversation, skip_old_turns
from tandem.data.truncation.limits import Fitted, Limits, TooLong
from tandem.data.truncation.pair import fit_pair

ORIGIN = Origin("made.jsonl", 1)
POLICIES: tuple[TooLong, ...] = ("drop", "keep_start", "keep_end", "drop_old_turns")
FAMILIES = ("mistral", "stories", "bytes")


@pytest.fixture(scope="module")
def chats() -> dict[str, tuple[ChatTokenizer, Any]]:
    """Those that were made before: each is a copy of a tokenizer."""
    return {}


@pytest.fixture(params=FAMILIES)
def chat(
    request: pytest.FixtureRequest, chats: dict[str, tuple[ChatTokenizer, Any]]
) -> tuple[ChatTokenizer, Any]:
    """A chat of each tokenizer family, and its tokenizer."""
    if request.param in chats:
        return chats[request.param]
    name = {"mistral": "mistral_tokenizer", "stories": "stories_tokenizer"}
    tokenizer = request.getfixturevalue(name.get(request.param, "byte_tokenizer"))
    template = "chatml" if request.param == "bytes" else "neural-chat"
    made = ChatTokenizer.of(tokenizer, resolve_template(tokenizer, template))
    return chats.setdefault(request.param, (made, tokenizer))


def talk(*texts: str, system: str = "") -> Conversation:
    """System, user, assistant, user, ...; a text that ends with ~ is an untrained answer."""
    turns = [
        Turn(("user", "assistant")[i % 2], text.removesuffix("~"), not text.endswith("~"))  # type: ignore[arg-type]
        for i, text in enumerate(texts)
    ]
    return Conversation((*([Turn("system", system)] if system else []), *turns), ORIGIN)


def fit(chat: ChatTokenizer, record: Conversation, limits: Limits, loss_on: Any = "answers") -> Any:
    shorter = skip_old_turns(chat, record, limits, loss_on)
    if isinstance(shorter, Refused):
        return shorter
    encoded = encode_conversation(chat, shorter[0], limits.sequence, loss_on)
    return fit_conversation(chat, shorter[0], encoded, limits, loss_on, shorter[1])


def fit_two(chat: ChatTokenizer, pair: Preference, limits: Limits) -> Any:
    encoded = encode_exchanges(chat, answer_exchanges(pair), limits.sequence)
    return fit_pair(chat, pair, encoded, limits)


def words(letter: str, count: int) -> str:
    return " ".join(f"{letter}{i}" for i in range(count))


def last(fitted: Fitted, tokenizer: Any) -> str:
    return str(tokenizer.decode(fitted.encoded[-1].ids))


def whole(chat: ChatTokenizer, record: Conversation) -> int:
    return max(
        len(one.ids) for one in encode_conversation(chat, record, 10**6) if isinstance(one, Encoded)
    )


@pytest.mark.parametrize("policy", POLICIES)
def test_what_fits_is_never_touched(chat: tuple[ChatTokenizer, Any], policy: TooLong) -> None:
    record = talk("one", "two", "three", "four", system="Be.")
    limits = Limits(whole(chat[0], record), 5, policy)
    fitted = fit(chat[0], record, limits)
    assert isinstance(fitted, Fitted)
    assert fitted.reason == ""
    assert len(fitted.encoded) == 2


def test_drop_leaves_the_record_out_with_its_length(chat: tuple[ChatTokenizer, Any]) -> None:
    record = talk("one", "two", "three", words("w", 30))
    size = whole(chat[0], record)
    assert fit(chat[0], record, Limits(size - 1, None, "drop")) == Refused(
        "longer than max_length", f"sequence {size} tokens, max_length {size - 1}"
    )


def test_keep_start_cuts_the_end_and_its_end_token(chat: tuple[ChatTokenizer, Any]) -> None:
    codec, tokenizer = chat
    record = talk("first", words("a", 40), "second", "gone", system="Stay.")
    everything = encode_conversation(codec, record, 10**6)
    (first, second) = everything
    assert isinstance(first, Encoded)
    assert isinstance(second, Encoded)
    limit = len(first.ids) - 5
    fitted = fit(codec, record, Limits(limit, None, "keep_start"))
    assert [one.ids for one in fitted.encoded] == [second.ids[:limit]]
    assert fitted.encoded[0].ids[-1] != codec.ending.token_id
    assert fitted.reason == "answer cut and later turns dropped"
    # Between two answers: the first stays whole, with its end token.
    fitted = fit(codec, record, Limits(len(first.ids) + 2, None, "keep_start"))
    assert [one.ids for one in fitted.encoded] == [first.ids]
    assert fitted.reason == "later turns dropped"
    # In the first prompt: nothing is left.
    fitted = fit(codec, record, Limits(first.start, None, "keep_start"))
    assert fitted.reason == "nothing left to train"
    assert "Stay." in last(Fitted((first,)), tokenizer)


def test_keep_start_keeps_a_prompt_within_its_own_limit(chat: tuple[ChatTokenizer, Any]) -> None:
    codec, tokenizer = chat
    record = talk(words("q", 60), words("a", 60), "more", "gone", system="Stay.")
    fitted = fit(codec, record, Limits(160, 80, "keep_start"))
    assert 60 <= fitted.encoded[0].start <= 80
    text = last(fitted, tokenizer)
    assert "Stay." in text
    assert "q59" in text
    assert "q1 " not in text
    assert "gone" not in text


def test_keep_start_counts_no_prompt_without_a_limit_of_its_own(
    chat: tuple[ChatTokenizer, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    record = talk("question " * 10, "answer " * 50)
    length = whole(chat[0], record) - 10
    counted = []

    def count(*arguments: Any) -> int:
        counted.append(arguments)
        return 0

    monkeypatch.setattr(prompt, "prompt_tokens", count)
    fitted = fit(chat[0], record, Limits(length, None, "keep_start"))
    assert (fitted.reason, counted) == ("answer cut", [])
    fit(chat[0], record, Limits(length, length, "keep_start"))
    assert len(counted) == 1


def test_keep_end_takes_only_as_much_old_text_as_must_go(chat: tuple[ChatTokenizer, Any]) -> None:
    codec, tokenizer = chat
    record = talk(words("q", 30), "first answer", "second", "last answer", system="Stay.")
    size = whole(codec, record)
    fitted = fit(codec, record, Limits(size - 6, None, "keep_end"))
    text = last(fitted, tokenizer)
    assert len(fitted.encoded) == 2
    assert fitted.reason == "prompt cut"
    assert size - 12 <= len(fitted.encoded[-1].ids) <= size - 6
    assert "Stay." in text
    assert "first answer" in text
    assert "q29" in text
    assert "q0" not in text
    assert fitted.encoded[-1].ids[-1] == codec.ending.token_id
    # With no room for the first question its exchange goes, and nothing more.
    alone = whole(codec, talk("second", "last answer", system="Stay."))
    fitted = fit(codec, record, Limits(alone, None, "keep_end"))
    assert fitted.reason == "old turns dropped"
    assert len(fitted.encoded[-1].ids) == alone


def test_keep_end_never_cuts_an_answer(chat: tuple[ChatTokenizer, Any]) -> None:
    codec, tokenizer = chat
    record = talk(words("q", 60), words("a", 20), system="Stay.")
    (answer,) = encode_conversation(codec, record, 10**6)
    assert isinstance(answer, Encoded)
    size = len(answer.ids) - answer.start
    fitted = fit(codec, record, Limits(size + 90, None, "keep_end"))
    assert size + 80 <= len(fitted.encoded[0].ids) <= size + 90
    assert tokenizer.decode(fitted.encoded[0].ids[fitted.encoded[0].start :]) == tokenizer.decode(
        answer.ids[answer.start :]
    )
    assert "q59" in last(fitted, tokenizer)
    limits = Limits(size + 90, 80, "keep_end")
    assert 70 <= fit(codec, record, limits).encoded[0].start <= 80
    refused = fit(codec, record, Limits(size, None, "keep_end"))
    assert refused == Refused(
        "the answer alone is longer than max_length", f"answer {size} tokens, max_length {size}"
    )


def test_pairs_by_policy(chat: tuple[ChatTokenizer, Any]) -> None:
    codec, tokenizer = chat
    pair = Preference(
        (Turn("system", "Stay."), Turn("user", words("q", 40))),
        (words("c", 30), words("r", 20)),
        ORIGIN,
    )
    full = [
        one for one in encode_exchanges(codec, answer_exchanges(pair)) if isinstance(one, Encoded)
    ]
    start, size = full[0].start, len(full[0].ids)
    limit = size - 10
    dropped = fit_two(codec, pair, Limits(limit, None, "drop"))
    assert dropped.reason == "longer than max_length"
    dropped = fit_two(codec, pair, Limits(size, start - 1, "drop"))
    assert dropped == Refused(
        "prompt longer than max_prompt_length",
        f"prompt {start} tokens, max_prompt_length {start - 1}",
    )
    kept = fit_two(codec, pair, Limits(limit, None, "keep_start"))
    assert [one.ids for one in kept.encoded] == [one.ids[:limit] for one in full]
    assert kept.encoded[0].ids[-1] != codec.ending.token_id
    assert fit_two(codec, pair, Limits(start, None, "keep_start")).reason == "nothing left to train"
    kept = fit_two(codec, pair, Limits(limit, None, "keep_end"))
    assert all(one.ids[-1] == codec.ending.token_id for one in kept.encoded)
    assert limit - 6 <= len(kept.encoded[0].ids) <= limit
    assert kept.reason == "prompt cut"
    prompts = [one.ids[: one.start] for one in kept.encoded]
    assert prompts[0] == prompts[1]
    assert "Stay." in tokenizer.decode(prompts[0])
    assert "q39" in tokenizer.decode(prompts[0])
    refused = fit_two(codec, pair, Limits(size - start, None, "keep_end"))
    assert refused.reason == "the answer alone is longer than max_length"


def test_keep_end_of_a_pair_cuts_old_questions_by_text(mistral_tokenizer: Any) -> None:
    chat = ChatTokenizer.of(mistral_tokenizer, resolve_template(mistral_tokenizer, "neural-chat"))
    turns = talk(words("q", 30), "old answer", "new question").turns
    pair = Preference(turns, ("Yes", "No"), ORIGIN)
    start = len(prompt_ids(mistral_tokenizer, chat.template, turns))
    kept = fit_two(chat, pair, Limits(start, None, "keep_end"))
    assert "old answer" in last(kept, mistral_tokenizer)
    assert "q0" not in last(kept, mistral_tokenizer)
    kept = fit_two(chat, pair, Limits(start, None, "drop_old_turns"))
    assert "old answer" not in last(kept, mistral_tokenizer)


TEXTS = st.lists(st.sampled_from(["Tim", " was", "\n", "aaa", "é", " 7", "~", " "]), max_size=24)
SAID = TEXTS.map("".join).filter(lambda text: bool(text.strip("~ \n")))


@pytest.mark.parametrize("policy", POLICIES)
@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    said=st.lists(SAID, min_size=2, max_size=6),
    system=st.sampled_from(["", "Be brief."]),
    length=st.integers(20, 120),
    prompt=st.none() | st.integers(10, 60),
)
def test_any_conversation_is_within_the_limit_after_its_own_prompt(
    chat: tuple[ChatTokenizer, Any],
    policy: TooLong,
    said: Sequence[str],
    system: str,
    length: int,
    prompt: int | None,
) -> None:
    """Ids end where an answer does or where it was cut, and begin as inference feeds them."""
    codec, tokenizer = chat
    record = talk(*said[: len(said) // 2 * 2], system=system)
    limits = Limits(length, prompt if prompt is None or prompt < length else None, policy)
    fitted = fit(codec, record, limits)
    if isinstance(fitted, Refused):
        return
    end = codec.ending.token_id
    originals = {turn.content for turn in record.turns if turn.role == "assistant" and turn.trained}
    texts = [tokenizer.decode(codec.codec.tokenize([text])[0]) for text in originals]
    for one in fitted.encoded:
        assert one.start < len(one.ids) <= length
        own = one.ids[one.start :]
        assert own.count(end) == (own[-1] == end)
        if own[-1] != end:
            assert policy in ("keep_start", "drop_old_turns")
            assert len(one.ids) == length
        elif policy == "keep_end":
            answer = tokenizer.decode(own[:-1]).strip()
            assert any(answer == text.strip() for text in texts)
    if policy == "drop":
        assert fitted.reason == ""
    fed = prompt_ids(tokenizer, codec.template, _turns_of(fitted, codec, record, tokenizer))
    assert fitted.encoded[0].ids[: fitted.encoded[0].start] == fed


def _turns_of(
    fitted: Fitted, chat: ChatTokenizer, record: Conversation, tokenizer: Any
) -> list[Turn]:
    """The kept turns before the first answer, found by trying: the oracle knows only suffixes."""
    first = fitted.encoded[0]
    prompt = first.ids[: first.start]
    turns = record.turns
    system = list(turns[:1]) if turns[0].role == "system" else []
    spoken = list(turns[len(system) :])
    while spoken:
        for until in range(1, len(spoken), 2):
            for start in range(len(spoken[0].content)):
                kept = Turn("user", spoken[0].content[start:])
                tried = [*system, kept, *spoken[1:until]]
                if prompt_ids(tokenizer, chat.template, tried) == prompt:
                    return tried
        spoken = spoken[2:]
    raise AssertionError(tokenizer.decode(prompt))
