"""An answer stands behind its prompt as a model has to write it, or the message says why not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from tandem.data.ledger import Ledger
from tandem.data.tokenize.chat_template import resolve_template
from tandem.errors import UserError
from tandem.recipe.data_source import DataSource

from .built import prepare_conversations, prepare_pairs

# As DeepSeek-R1's: every answer loses its reasoning, and the prompt opens the next one.
R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[user]{{ m.content }}"
    "{% elif m.role == 'assistant' %}{% set c = m.content %}{% if '</think>' in c %}"
    "{% set c = c.split('</think>')[-1] %}{% endif %}[assistant]{{ c }}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}[assistant]<think>\n{% endif %}"
)
# As QwQ's: the last answer keeps it, but does not begin with the tag unless the data has it.
QWQ = R1.replace("'</think>' in c", "not loop.last")
# As the first edition of R1's: the prompt opens nothing.
FIRST = R1.replace("[assistant]<think>\n", "[assistant]")
# As DeepSeek-V3.1's: the prompt says that there is no reasoning.
CLOSES = R1.replace("[assistant]", "[assistant]</think>").replace("<think>\n", "")
ASKED = {"role": "user", "content": "Two and two?"}


def said(content: str, **more: str) -> dict[str, str]:
    return {"role": "assistant", "content": content, **more}


def trained(tokenizer: Any, folder: Path, source: str, row: Any, prepare: Any = None) -> list[str]:
    """The texts that are trained of a record, each behind a `|` and what is fed before it."""
    (folder / "t.jinja").write_text(source)
    (folder / "rows.jsonl").write_text(json.dumps(row) + "\n")
    (tree,) = (prepare or prepare_conversations)(
        [DataSource(path=str(folder / "rows.jsonl"))], tokenizer=tokenizer,
        template=resolve_template(tokenizer, str(folder / "t.jinja")), ledger=Ledger(None),
        max_length=512,
    )  # fmt: skip
    texts = []
    for number in range(len(tree.branches)):
        sequence = tree.sequence(number)
        start = int(sequence.trained.argmax())
        assert sequence.trained[start:].all()
        ids = sequence.input_ids
        texts.append(tokenizer.decode(ids[:start]) + "|" + tokenizer.decode(ids[start:]))
    return texts


@pytest.mark.parametrize("source", [R1, QWQ])
@pytest.mark.parametrize(
    "answer",
    [
        said("Both are two.\n</think>\n\nFour."),
        said("<think>\nBoth are two.\n</think>\n\nFour."),
        said("Four.", reasoning_content="Both are two."),
    ],
)
def test_behind_a_prompt_that_opens_reasoning_the_answer_closes_it(
    byte_tokenizer: Any, tmp_path: Path, source: str, answer: dict[str, str]
) -> None:
    text = "[user]Two and two?[assistant]<think>\n|Both are two.\n</think>\n\nFour.<|endoftext|>"
    row = {"messages": [ASKED, answer]}
    assert trained(byte_tokenizer, tmp_path, source, row) == [text]


def test_past_answers_are_as_inference_feeds_them(byte_tokenizer: Any, tmp_path: Path) -> None:
    row = {"messages": [ASKED, said("So.</think>Four."), ASKED, said("Again.</think>4.")]}
    assert trained(byte_tokenizer, tmp_path, R1, row) == [
        "[user]Two and two?[assistant]<think>\n|So.</think>Four.<|endoftext|>",
        "[user]Two and two?[assistant]Four.<|endoftext|>[user]Two and two?[assistant]<think>\n"
        "|Again.</think>4.<|endoftext|>",
    ]


def test_both_answers_of_a_pair_stand_behind_the_opened_reasoning(
    byte_tokenizer: Any, tmp_path: Path
) -> None:
    row = {"prompt": "Q", "chosen": "A.</think>Yes.", "rejected": "<think>\nA.</think>No."}
    texts = trained(byte_tokenizer, tmp_path, R1, row, prepare_pairs)
    assert [text.replace("|", "", 1) for text in texts] == [
        "[user]Q[assistant]<think>\nA.</think>Yes.<|endoftext|>",
        "[user]Q[assistant]<think>\nA.</think>No.<|endoftext|>",
    ]


def test_reasoning_that_the_template_takes_out_of_every_answer_is_trained_all_the_same(
    byte_tokenizer: Any, tmp_path: Path
) -> None:
    row = {"messages": [ASKED, said("<think>So.</think>Four.")]}
    text = "[user]Two and two?[assistant]|<think>So.</think>Four.<|endoftext|>"
    assert trained(byte_tokenizer, tmp_path, FIRST, row) == [text]


def test_qwens_template_only_moves_blanks(shared_data: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shared_data / "tokenizers" / "qwen3")
    row = {"messages": [ASKED, said("<think>So.</think>Four.")]}
    (text,) = trained(tokenizer, tmp_path, tokenizer.chat_template, row)
    assert text.endswith("<|im_start|>assistant\n|<think>\nSo.\n</think>\n\nFour.<|im_end|>")


@pytest.mark.parametrize(
    ("source", "content", "needles"),
    [
        (
            R1,
            "Four.",
            [
                "opens the answer with reasoning, which the answer does not close",
                r"its prompt ends with '<think>\n'",
                "write the reasoning and `</think>` in front of the answer, or take `<think>` out",
            ],
        ),
        (
            R1.replace("[assistant]<think>\n", "[model]"),
            "Four.",
            [
                "does not continue its own prompt",
                "behind '[user]Two and two?[' the prompt goes on with 'model]'",
                "the text with the answer with 'assistant]Four.<|endoftext|>'",
            ],
        ),
        (
            FIRST.replace("{{ eos_token }}", "{{ '' if m.content == 'Four.' else eos_token }}"),
            "Four.",
            ["[assistant]Four.', not with '<|endoftext|>'"],
        ),
        (
            FIRST.replace("{{ c }}", "{{ c | replace('Four', 'Five') }}"),
            "Four.",
            ["changes the answer's text", "renders 'Five.<|endoftext|>' of 'Four.'"],
        ),
        (CLOSES, "<think>So.</think>Four.", ["not render reasoning", "before `</think>` out of"]),
    ],
)
def test_where_renderings_part_is_quoted_with_a_way_out_that_is_true(
    byte_tokenizer: Any, tmp_path: Path, source: str, content: str, needles: list[str]
) -> None:
    with pytest.raises(UserError) as raised:
        trained(byte_tokenizer, tmp_path, source, {"messages": [ASKED, said(content)]})
    for needle in [*needles, "another `chat_template`"]:
        assert needle in str(raised.value), str(raised.value)
    assert "limits" not in str(raised.value)


def test_blanks_at_an_answers_edges_are_the_templates_affair(
    byte_tokenizer: Any, tmp_path: Path
) -> None:
    trimmed = FIRST.replace("{{ c }}", "{{ c | trim }}")
    row = {"messages": [ASKED, said("  Four.\n\n")]}
    text = "[user]Two and two?[assistant]|Four.<|endoftext|>"
    assert trained(byte_tokenizer, tmp_path, trimmed, row) == [text]
