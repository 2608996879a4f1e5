"""Exact ids and masks, with tokenizers of every family."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tandem.data.encoded.example import Branch, Example, conversation_example, preference_example
from tandem.data.records import Conversation, Origin, Turn
from tandem.data.tokenize.chat_template import prompt_ids, resolve_template
from tandem.data.tokenize.encode import (
    ChatTokenizer,
    Encoded,
    Exchange,
    encode_exchanges,
    trained_exchanges,
)
from tandem.data.tokenize.template_capabilities import Refused

ORIGIN = Origin("made.jsonl", 1)


def chat_of(tokenizer: Any, template: str | None = None) -> ChatTokenizer:
    return ChatTokenizer.of(tokenizer, resolve_template(tokenizer, template))


def turns(*texts: str) -> tuple[Turn, ...]:
    """user, assistant, user, ... ; a text that ends with ~ is an untrained answer."""
    roles = ("user", "assistant")
    return tuple(
        Turn(roles[i % 2], text.removesuffix("~"), not text.endswith("~"))  # type: ignore[arg-type]
        for i, text in enumerate(texts)
    )


def encode(chat: ChatTokenizer, conversation: tuple[Turn, ...]) -> Example:
    exchanges = trained_exchanges(Conversation(conversation, ORIGIN))
    return conversation_example([sound(one) for one in encode_exchanges(chat, exchanges)], ORIGIN)


def sound(encoded: Encoded | Refused) -> Encoded:
    assert isinstance(encoded, Encoded), encoded
    return encoded


def one_answer(chat: ChatTokenizer, question: str, answer: str) -> Encoded:
    return sound(encode_exchanges(chat, [Exchange(turns(question), answer, ORIGIN)])[0])


def marked(tokenizer: Any, branch: Branch) -> list[str]:
    """Tokens of a branch, trained ones in brackets."""
    tokens = tokenizer.convert_ids_to_tokens(branch.input_ids.tolist())
    return [f"[{t}]" if m else t for t, m in zip(tokens, branch.trained, strict=True)]


def test_sentencepiece_masks_exactly(mistral_tokenizer: Any) -> None:
    chat = chat_of(mistral_tokenizer)
    tree = encode(chat, (Turn("system", "Be."), *turns("Hi", " Yes\n", "Why", "No~", "So", "\nI")))
    assert tree.prefix.input_ids.size == 0
    (path,) = tree.branches
    headed = ["▁###", "▁System", ":", "<0x0A>", "Be", ".", "</s>"]
    user = ["▁", "<0x0A>", "###", "▁User", ":", "<0x0A>"]
    assistant = ["▁", "<0x0A>", "###", "▁Assistant", ":", "<0x0A>"]
    assert marked(mistral_tokenizer, path) == [
        *("<s>", *headed),
        *(*user, "Hi", "</s>", *assistant, "[▁Yes]", "[<0x0A>]", "[</s>]"),
        *(*user, "Why", "</s>", *assistant, "No", "</s>"),
        *(*user, "So", "</s>", *assistant, "[<0x0A>]", "[I]", "[</s>]"),
    ]
    assert path.input_ids.dtype == np.int32
    assert path.trained.dtype == np.bool_


def test_ids_equal_plain_apply_chat_template(stories_tokenizer: Any) -> None:
    chat = chat_of(stories_tokenizer)
    said = turns("Tell me of Tim.", "Tim had a ball.", "And?", "He was happy.")
    messages = [{"role": turn.role, "content": turn.content} for turn in said]
    plain = stories_tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    path = encode(chat, said).branches[0]
    assert path.input_ids.tolist() == plain
    assert plain.count(stories_tokenizer.bos_token_id) == 1
    for answer in ("Tim had a ball.", "He was happy."):
        assert answer + "</s>" in stories_tokenizer.decode(path.input_ids[path.trained])
    assert path.trained.sum() == len(
        stories_tokenizer("\nTim had a ball.</s>\nHe was happy.</s>", add_special_tokens=False)[
            "input_ids"
        ]
    ) - 2 * len(["▁", "<0x0A>"])


def test_byte_level_bpe_masks_exactly_and_leaves_the_trailing_line_break(
    byte_tokenizer: Any,
) -> None:
    chat = chat_of(byte_tokenizer, "chatml")
    path = encode(chat, turns("What is two?", "It is four.", "user", "two")).branches[0]
    assert marked(byte_tokenizer, path) == [
        *("<|im_start|>", "user", "Ċ", "What", "Ġis", "Ġtwo", "?", "<|im_end|>", "Ċ"),
        *("<|im_start|>", "assistant", "Ċ", "[It]", "[Ġis]", "[Ġfour]", "[.]", "[<|im_end|>]"),
        *("Ċ", "<|im_start|>", "user", "Ċ", "user", "<|im_end|>", "Ċ"),
        *("<|im_start|>", "assistant", "Ċ", "[t]", "[wo]", "[<|im_end|>]"),
    ]


def test_a_merge_across_the_boundary_keeps_the_prompt_that_inference_feeds(
    byte_tokenizer: Any,
) -> None:
    chat = chat_of(byte_tokenizer, "chatml")
    whole = byte_tokenizer("assistant\n\nHello there", add_special_tokens=False)["input_ids"]
    assert "ĊĊ" in byte_tokenizer.convert_ids_to_tokens(whole)  # the merge is really there
    answer = one_answer(chat, "user", "\nHello there")
    fed = prompt_ids(byte_tokenizer, chat.template, turns("user"))
    assert answer.ids[: answer.start] == fed
    assert byte_tokenizer.convert_ids_to_tokens(answer.ids[answer.start :]) == [
        *("Ċ", "Hello", "Ġthere", "<|im_end|>")
    ]
    # A later prompt contains the merged token, so each answer follows its own prompt.
    tree = encode(chat, turns("user", "\nHello", "two", "four"))
    assert len(tree.branches) == 2
    assert not tree.prefix.trained.any()
    for branch, said in ((0, turns("user")), (1, turns("user", "\nHello", "two"))):
        sequence = tree.sequence(branch)
        prompt = prompt_ids(byte_tokenizer, chat.template, said)
        assert sequence.input_ids[: len(prompt)].tolist() == prompt
        assert not sequence.trained[: len(prompt)].any()
        assert sequence.trained[len(prompt) :].all()


def test_a_path_that_breaks_late_trains_each_answer_once() -> None:
    encoded = [
        Encoded([1, 2, 7], 2),
        Encoded([1, 2, 7, 3, 8], 4),
        Encoded([1, 2, 7, 3, 9, 4, 5], 6),
    ]
    tree = conversation_example(encoded, ORIGIN)
    assert tree.prefix.input_ids.tolist() == [1, 2]
    assert not tree.prefix.trained.any()
    assert [branch.trained.tolist() for branch in tree.branches] == [
        [True],
        [False, False, True],
        [False, False, False, False, True],
    ]


def test_sentencepiece_answers_behind_a_space(mistral_tokenizer: Any, tmp_path: Path) -> None:
    """A prompt that ends with a space, which SentencePiece would give to the answer's word."""
    file = tmp_path / "spaced.jinja"
    file.write_text(
        "{{ bos_token }}{% for m in messages %}{{ m.role + ': ' + m.content }}"
        "{% if m.role == 'assistant' %}{{ eos_token }}{% else %}{{ '\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    chat = chat_of(mistral_tokenizer, str(file))
    answer = one_answer(chat, "Hi", "Hello")
    tokens = mistral_tokenizer.convert_ids_to_tokens(answer.ids)
    assert tokens[answer.start - 1 :] == ["▁", "Hello", "</s>"]
    assert mistral_tokenizer.decode(answer.ids).endswith("assistant: Hello</s>")


REASONING = (
    "{% for m in messages %}{% set text = m.content %}"
    "{% if m.role == 'assistant' and not loop.last %}{% set text = text.split('</think>')[-1] %}"
    "{% endif %}{{ '<|im_start|>' + m.role + '\n' + text + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_a_template_that_forgets_past_thoughts_is_trained_turn_by_turn(
    byte_tokenizer: Any, tmp_path: Path
) -> None:
    file = tmp_path / "reasoning.jinja"
    file.write_text(REASONING)
    chat = chat_of(byte_tokenizer, str(file))
    said = turns("one", "<think>is</think>Hello", "two", "<think>it</think>four")
    tree = encode(chat, said)
    assert len(tree.branches) == 2
    texts = []
    for index in range(2):
        sequence = tree.sequence(index)
        prompt = prompt_ids(byte_tokenizer, chat.template, said[: 2 * index + 1])
        assert sequence.input_ids[: len(prompt)].tolist() == prompt
        texts.append(byte_tokenizer.decode(sequence.input_ids[sequence.trained]))
    assert texts == ["<think>is</think>Hello<|im_end|>", "<think>it</think>four<|im_end|>"]
    assert "<think>is" not in byte_tokenizer.decode(tree.sequence(1).input_ids)


def test_answers_that_cannot_be_delimited_are_refused(
    mistral_tokenizer: Any, byte_tokenizer: Any, tmp_path: Path
) -> None:
    chat = chat_of(mistral_tokenizer)
    said = encode_exchanges(chat, [Exchange(turns("Q"), "One.</s>Two", ORIGIN)])
    assert said == [Refused("the answer's text contains the end-of-turn token", "</s>")]
    file = tmp_path / "unlike.jinja"
    file.write_text(REASONING.replace("assistant\n' }}{% endif", "bot\n' }}{% endif"))
    chat = chat_of(byte_tokenizer, str(file))
    (refused,) = encode_exchanges(chat, [Exchange(turns("Q"), "A", ORIGIN)])
    assert isinstance(refused, Refused)
    assert "does not continue its own prompt" in refused.reason


def test_a_second_bos_from_the_data_is_refused(mistral_tokenizer: Any) -> None:
    chat = chat_of(mistral_tokenizer, "bare")
    assert one_answer(chat, "Q", "A").ids[0] == mistral_tokenizer.bos_token_id
    (refused,) = encode_exchanges(chat, [Exchange(turns("<s>Q"), "A", ORIGIN)])
    assert refused == Refused("the prompt's text begins with a second BOS token")


def test_a_pair_shares_its_longest_common_token_prefix() -> None:
    tree = preference_example(
        [Encoded([1, 5, 6, 7, 8, 2], 3), Encoded([1, 5, 6, 7, 9, 9, 2], 3)], ORIGIN
    )
    assert tree.prefix.input_ids.tolist() == [1, 5, 6, 7]
    assert tree.prefix.trained.tolist() == [False, False, False, True]
    assert [branch.input_ids.tolist() for branch in tree.branches] == [[8, 2], [9, 9, 2]]
    assert all(branch.trained.all() for branch in tree.branches)
    assert tree.sequence(1).trained.tolist() == [False] * 3 + [True] * 4


def test_each_branch_keeps_a_token_when_one_answer_begins_the_other() -> None:
    tree = preference_example([Encoded([1, 5, 6, 7], 2), Encoded([1, 5, 6, 7, 8], 2)], ORIGIN)
    assert tree.prefix.input_ids.tolist() == [1, 5, 6]
    assert [branch.input_ids.tolist() for branch in tree.branches] == [[7], [7, 8]]


def test_the_first_token_of_a_sequence_is_never_trained() -> None:
    tree = preference_example([Encoded([3, 4], 0), Encoded([5, 4], 0)], ORIGIN)
    assert tree.prefix.input_ids.size == 0
    assert [branch.trained.tolist() for branch in tree.branches] == [[False, True]] * 2
    shared = preference_example([Encoded([3, 4], 0), Encoded([3, 5], 0)], ORIGIN)
    assert shared.prefix.trained.tolist() == [False]


@pytest.mark.parametrize(
    ("fixture", "name"),
    [
        ("mistral_tokenizer", "neural-chat"),
        ("stories_tokenizer", "zephyr"),
        ("byte_tokenizer", "chatml"),
        ("byte_tokenizer", "neural-chat"),
    ],
)
def test_prompts_are_exactly_what_inference_feeds(
    fixture: str, name: str, request: pytest.FixtureRequest
) -> None:
    tokenizer = request.getfixturevalue(fixture)
    chat = chat_of(tokenizer, name)
    asked = ("x", "é 🙂 中文", "tabs\t\tand  spaces ", "</s> quoted")
    answers = ("A", "  A", "\n\nA", "\tA", "🙂 é", "A \n")
    for question, answer in itertools.product(asked, answers):
        encoded = one_answer(chat, question, answer)
        fed = prompt_ids(tokenizer, chat.template, turns(question))
        assert encoded.ids[: encoded.start] == fed
        assert encoded.ids[encoded.start :].count(chat.ending.token_id) == 1
        assert encoded.ids[-1] == chat.ending.token_id
        assert answer in tokenizer.decode(encoded.ids)
