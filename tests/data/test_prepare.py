"""From files to trees: nothing is lost, mixed up or cut without a line in the ledger."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from tandem.data.encoded import worker_pool
from tandem.data.encoded.example import Example
from tandem.data.ledger import Ledger
from tandem.data.read_records import read_conversations, read_pairs, read_questions
from tandem.data.sources import file_chunks
from tandem.data.tokenize.chat_template import resolve_template
from tandem.errors import UserError
from tandem.recipe.data_source import DataSource

from .built import prepare_conversations, prepare_pairs


def write(path: Path, rows: list[Any]) -> DataSource:
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_text("".join(line + "\n" for line in lines))
    return DataSource(path=str(path))


def pair(question: str, chosen: str, rejected: str, system: str = "Be brief.") -> dict[str, str]:
    return {"system": system, "question": question, "chosen": chosen, "rejected": rejected}


def talk(*texts: str, system: str | None = None) -> dict[str, Any]:
    roles = ("user", "assistant")
    said = [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
    return {"messages": [{"role": "system", "content": system}, *said] if system else said}


def prepare(
    kind: Any, source: DataSource, tokenizer: Any, **options: Any
) -> tuple[list[Example], Ledger]:
    template = resolve_template(tokenizer, options.pop("template", "neural-chat"))
    ledger = Ledger(None)
    options.setdefault("max_length", 512)
    trees = kind([source], tokenizer=tokenizer, template=template, ledger=ledger, **options)
    counts = ledger.counts
    assert counts["read"] == counts["trained"] + counts["dropped"]
    assert counts["trained"] == len(trees)
    return trees, ledger


def text_of(tokenizer: Any, tree: Example, branch: int, *, trained: bool) -> str:
    sequence = tree.sequence(branch)
    return str(tokenizer.decode(sequence.input_ids[sequence.trained == trained]))


def test_marked_pairs_stay_together(mistral_tokenizer: Any, tmp_path: Path) -> None:
    """Trap 1: prompt, chosen, rejected and origin of a record never get mixed up."""
    marks = random.Random(0).sample(range(100_000, 1_000_000), 400)
    rows = [pair(f"Question {m}?", f"Good {m}.", f"Bad {m}.", f"Role {m}.") for m in marks]
    trees, _ = prepare(prepare_pairs, write(tmp_path / "p.jsonl", rows), mistral_tokenizer)
    assert [tree.origin.row for tree in trees] == list(range(1, 401))
    for tree, mark in zip(trees, marks, strict=True):
        for branch, word in enumerate(("Good", "Bad")):
            assert text_of(mistral_tokenizer, tree, branch, trained=True).startswith(
                f"{word} {mark}."
            )
            prompt = text_of(mistral_tokenizer, tree, branch, trained=False)
            assert f"Role {mark}." in prompt
            assert f"Question {mark}?" in prompt


@pytest.mark.parametrize("few", [1, 32])
def test_only_the_first_so_many_are_read(
    byte_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, few: int
) -> None:
    """As the first of all of them; what lies far behind is never looked at."""
    rows: list[Any] = [talk(f"Question {i}", f"Answer {i}") for i in range(300)]
    for dropped in (2, 5, 40):
        rows[dropped] = talk("Question", "")
    whole = write(tmp_path / "whole.jsonl", rows)
    # A few pieces are read ahead by those who share the work.
    monkeypatch.setattr(file_chunks, "_ROWS", 32)
    begun = write(tmp_path / "begun.jsonl", [*rows[:175], "{", *rows[176:]])
    options: dict[str, Any] = {"template": "chatml", "workers": 1 if few > 1 else 2}
    trees, _ = prepare(prepare_conversations, whole, byte_tokenizer, template="chatml")
    monkeypatch.setattr(worker_pool, "_FEW", few)
    for limit, lost in ((3, 1), (38, 2), (39, 3), (50, 3)) if few > 1 else ((38, 2), (50, 3)):
        first, ledger = prepare(
            prepare_conversations, begun, byte_tokenizer, limit=limit, **options
        )
        assert len(first) == limit
        for one, same in zip(first, trees, strict=False):
            assert one.sequence(0).input_ids.tolist() == same.sequence(0).input_ids.tolist()
            assert one.origin.row == same.origin.row
        assert ledger.counts["dropped"] == lost
    with pytest.raises(UserError, match="row 176"):
        prepare(prepare_conversations, begun, byte_tokenizer, limit=170, **options)
    if few > 1:
        all_of_them, _ = prepare(
            prepare_conversations, whole, byte_tokenizer, limit=5000, **options
        )
        assert len(all_of_them) == len(trees)


def test_marked_conversations_stay_together(byte_tokenizer: Any, tmp_path: Path) -> None:
    rows = [talk(f"Question {i}", f"First {i}", f"More {i}", f"Second {i}") for i in range(300)]
    source = write(tmp_path / "c.jsonl", rows)
    trees, _ = prepare(prepare_conversations, source, byte_tokenizer, template="chatml")
    for i, tree in enumerate(trees):
        assert tree.origin.row == i + 1
        trained = text_of(byte_tokenizer, tree, 0, trained=True)
        assert trained == f"First {i}<|im_end|>Second {i}<|im_end|>"


def test_a_long_prompt_loses_its_oldest_text_after_the_system_turn(
    mistral_tokenizer: Any, tmp_path: Path
) -> None:
    words = " ".join(f"w{i}" for i in range(200))
    source = write(tmp_path / "p.jsonl", [pair(words, "Yes", "No", "Keep this system turn.")])
    trees, ledger = prepare(
        prepare_pairs, source, mistral_tokenizer, max_length=128, max_prompt_length=64
    )
    sequence = trees[0].sequence(0)
    prompt = mistral_tokenizer.decode(sequence.input_ids[~sequence.trained])
    assert "### System:\nKeep this system turn.</s>" in prompt
    assert prompt.endswith("w198 w199</s> \n### Assistant:\n")
    assert "w100" not in prompt
    assert 60 <= (~sequence.trained).sum() <= 64
    assert sequence.input_ids[-1] == mistral_tokenizer.eos_token_id
    (entry,) = ledger.entries
    assert (entry.row, entry.outcome, entry.reason) == (1, "truncated", "prompt cut")
    assert entry.detail.endswith(f"-> {(~sequence.trained).sum()} tokens")


def test_a_prompt_of_several_turns_loses_the_oldest_first(
    mistral_tokenizer: Any, tmp_path: Path
) -> None:
    said = talk("old question", "old answer", "new question", system="Stay.")["messages"]
    source = write(tmp_path / "p.jsonl", [{"prompt": said, "chosen": "Yes", "rejected": "No"}])
    (tree,), ledger = prepare(
        prepare_pairs, source, mistral_tokenizer, max_length=64, max_prompt_length=36
    )
    prompt = text_of(mistral_tokenizer, tree, 0, trained=False)
    assert "Stay." in prompt
    assert "new question" in prompt
    assert "old" not in prompt
    assert ledger.entries[0].reason == "old turns dropped"


def test_both_answers_are_cut_at_the_limit_without_an_end_token(
    stories_tokenizer: Any, tmp_path: Path
) -> None:
    long = pair("Q", "good day " * 200, "bad day " * 200)
    mixed = pair("Q", "good", "bad day " * 200)
    source = write(tmp_path / "p.jsonl", [long, mixed])
    (first, second), ledger = prepare(prepare_pairs, source, stories_tokenizer, max_length=128)
    end = stories_tokenizer.eos_token_id
    for branch in (0, 1):
        assert len(first.sequence(branch).input_ids) == 128
        assert first.sequence(branch).input_ids[-1] != end
    assert second.sequence(0).input_ids[-1] == end
    assert len(second.sequence(1).input_ids) == 128
    assert [entry.reason for entry in ledger.entries] == ["answer cut", "answer cut"]
    assert "chosen" in ledger.entries[0].detail
    assert "chosen" not in ledger.entries[1].detail


def test_a_system_turn_that_leaves_no_room_keeps_its_start(
    mistral_tokenizer: Any, tmp_path: Path
) -> None:
    system = " ".join(f"s{i}" for i in range(200))
    question = " ".join(f"q{i}" for i in range(20))
    source = write(tmp_path / "p.jsonl", [pair(question, "Yes", "No", system)])
    (tree,), ledger = prepare(
        prepare_pairs, source, mistral_tokenizer, max_length=128, max_prompt_length=100
    )
    prompt = text_of(mistral_tokenizer, tree, 0, trained=False)
    assert "### System:\ns0 s1 s2" in prompt
    assert "s199" not in prompt
    assert "q19</s>" in prompt
    assert (~tree.sequence(0).trained).sum() <= 100
    assert "system turn cut" in ledger.entries[0].reason


def test_nothing_left_to_train_is_dropped(mistral_tokenizer: Any, tmp_path: Path) -> None:
    same = "the same words again and again " * 30
    rows = [
        pair("Q", same + "yes", same + "no"),  # alike as far as the limit reaches
        pair("Q", "Yes", "No"),
    ]
    trees, ledger = prepare(
        prepare_pairs, write(tmp_path / "p.jsonl", rows), mistral_tokenizer, max_length=100
    )
    assert [tree.origin.row for tree in trees] == [2]
    assert ledger.entries[0].reason == "nothing left to train"
    source = write(tmp_path / "q.jsonl", [pair("Q " * 99, "Yes", "No")])
    with pytest.raises(UserError, match=r"none of the 1 records .*nothing left to train: 1"):
        prepare(prepare_pairs, source, mistral_tokenizer, max_length=20, max_prompt_length=8)


def test_without_a_prompt_limit_a_prompt_gives_way_only_as_far_as_needed(
    mistral_tokenizer: Any, tmp_path: Path
) -> None:
    source = write(
        tmp_path / "p.jsonl",
        [
            pair("w " * 90, "Yes", "No"),
            pair("w " * 90, "Yes", "no " * 90),
            pair("w " * 150, "a", "b"),
        ],
    )
    trees, ledger = prepare(prepare_pairs, source, mistral_tokenizer, max_length=128)
    prompts = [int((~tree.sequence(0).trained).sum()) for tree in trees]
    assert [entry.row for entry in ledger.entries] == [2, 3]
    assert 60 <= prompts[1] <= 64  # half, for the answer needs the rest
    assert 120 <= prompts[2] <= 126  # all but the answers' room
    assert len(trees[2].sequence(0).input_ids) <= 128


def test_conversations_lose_old_exchanges_then_prompt_then_answer(
    mistral_tokenizer: Any, tmp_path: Path
) -> None:
    rows = [
        talk("old " * 60, "gone " * 60, "new question", "kept answer", system="Stay."),
        talk("w " * 300, "short answer"),
        talk("short", "a " * 300),
        talk("fits", "whole"),
    ]
    trees, ledger = prepare(
        prepare_conversations,
        write(tmp_path / "c.jsonl", rows),
        mistral_tokenizer,
        max_length=128,
        max_prompt_length=64,
    )
    texts = [mistral_tokenizer.decode(tree.branches[0].input_ids) for tree in trees]
    assert "Stay." in texts[0]
    assert "gone" not in texts[0]
    assert texts[0].endswith("kept answer</s>")
    assert texts[1].endswith("short answer</s>")
    assert (~trees[1].branches[0].trained).sum() <= 64
    assert len(trees[2].branches[0].input_ids) == 128
    assert not texts[2].endswith("</s>")
    assert [(entry.row, entry.reason) for entry in ledger.entries] == [
        (1, "old turns dropped"),
        (2, "prompt cut"),
        (3, "answer cut"),
    ]


def test_unparsable_lines_stop_the_run_or_are_listed(
    mistral_tokenizer: Any, tmp_path: Path
) -> None:
    source = write(tmp_path / "p.jsonl", [pair("Q", "A", "B"), '{"system": ', pair("Q", "A", "B")])
    with pytest.raises(UserError, match=r"p\.jsonl, row 2: .*not valid JSON.*on_bad_record: drop"):
        prepare(prepare_pairs, source, mistral_tokenizer)
    trees, ledger = prepare(prepare_pairs, source, mistral_tokenizer, on_bad_record="drop")
    assert len(trees) == 2
    assert ledger.entries[0].reason == "unparsable"
    assert ledger.entries[0].row == 2


def test_records_that_cannot_be_used_are_listed_and_the_ledger_is_written(
    mistral_tokenizer: Any, tmp_path: Path
) -> None:
    rows = [
        {"note": "a first row of no format"},
        pair("Q", "A", "B"),
        pair("Q", "A", "A"),
        pair("Q", "", "B"),
        pair("Q", "cut </s> short", "B"),
        pair("Q", "word " * 200, "B"),
    ]
    source = write(tmp_path / "p.jsonl", rows)
    ledger = Ledger(tmp_path / "out" / "data-ledger.jsonl")
    template = resolve_template(mistral_tokenizer, None)
    prepare_pairs(
        [source], tokenizer=mistral_tokenizer, template=template, max_length=100, ledger=ledger
    )
    ledger.write()
    lines = (tmp_path / "out" / "data-ledger.jsonl").read_text().splitlines()
    written = sorted((json.loads(line) for line in lines), key=lambda entry: entry["row"])
    assert {entry["file"] for entry in written} == {source.path}
    assert [(entry["row"], entry["outcome"], entry["reason"]) for entry in written] == [
        (1, "dropped", "`question` is null or missing"),
        (3, "dropped", "identical answers"),
        (4, "dropped", "empty answer"),
        (5, "dropped", "the answer's text contains the end-of-turn token"),
        (6, "truncated", "answer cut"),
    ]
    summary = ledger.summary()
    assert (summary["read"], summary["trained"]) == (6, 2)
    assert (summary["truncated"], summary["dropped"]) == (1, 4)
    assert summary["reasons"]["empty answer"] == 1
    assert summary["formats"] == {source.path: "orca_dpo_pairs"}


def test_the_other_kind_of_data_is_named(tmp_path: Path) -> None:
    pairs = write(tmp_path / "p.jsonl", [pair("Q", "A", "B")])
    talks = write(tmp_path / "c.jsonl", [talk("Q", "A")])
    with pytest.raises(UserError, match=r"p\.jsonl holds preference pairs \(orca_dpo_pairs"):
        list(read_conversations([pairs], Ledger(None)))
    with pytest.raises(UserError, match=r"c\.jsonl holds conversations \(messages"):
        list(read_pairs([talks], Ledger(None)))


def test_unknown_formats_and_empty_data_are_errors(tmp_path: Path) -> None:
    for count in (1, 40):
        source = write(tmp_path / "x.jsonl", [{"texts": "t", "label": 1}] * count)
        with pytest.raises(UserError, match=r"row \d+: .*its keys are: texts, label"):
            list(read_pairs([source], Ledger(None)))
    source = write(tmp_path / "empty.jsonl", [])
    with pytest.raises(UserError, match=r"empty\.jsonl is empty"):
        list(read_pairs([source], Ledger(None)))


def test_a_record_that_the_template_refuses_is_named(
    mistral_tokenizer: Any, tmp_path: Path
) -> None:
    strict = tmp_path / "strict.jinja"
    strict.write_text(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}"
        "{{ raise_exception('no system') }}{% endif %}{{ m.content + eos_token }}{% endfor %}"
    )
    source = write(tmp_path / "p.jsonl", [pair("Q", "A", "B", ""), pair("Q", "A", "B")])
    with pytest.raises(UserError, match=r"p\.jsonl, row 2: .*no system"):
        prepare(prepare_pairs, source, mistral_tokenizer, template=str(strict))


def test_a_record_whose_shortened_turns_the_template_refuses_is_named(
    mistral_tokenizer: Any, tmp_path: Path
) -> None:
    strict = tmp_path / "strict.jinja"
    strict.write_text(
        "{{ bos_token }}{% if messages[0].content == 'later' %}"
        "{{ raise_exception('not without the first') }}{% endif %}"
        "{% for m in messages %}{{ m.content + eos_token }}{% endfor %}"
    )
    said = talk("first " * 100, "answer", "later")["messages"]
    source = write(tmp_path / "p.jsonl", [{"prompt": said, "chosen": "Yes", "rejected": "No"}])
    with pytest.raises(UserError, match=r"p\.jsonl, row 1: .*not without the first"):
        prepare(prepare_pairs, source, mistral_tokenizer, template=str(strict), max_length=64)


def test_questions_are_read_and_bad_ones_stop(tmp_path: Path) -> None:
    source = write(tmp_path / "q.jsonl", [{"question": "Q", "answer": "A", "accepted": ["a"]}])
    (question,) = read_questions([source])
    assert (question.answer, question.accepted, question.origin.row) == ("A", ("a",), 1)
    source = write(tmp_path / "q.jsonl", [{"question": "Q", "answer": "A"}, {"question": "Q"}])
    with pytest.raises(UserError, match=r"q\.jsonl, row 2: .*`answer` is null or missing"):
        read_questions([source])
    source = write(tmp_path / "q.jsonl", ["{"])
    with pytest.raises(UserError, match=r"q\.jsonl, row 1: .*not valid JSON"):
        read_questions([source])


@pytest.mark.parametrize(
    ("name", "every", "records", "dropped"),
    [
        ("conversations/slimorca_format.jsonl", 16, 531, 0),
        ("pairs/orca_dpo_pairs.jsonl", 1, 142, 0),
        ("pairs/mixed_pairs.jsonl", 4, 421, 1),
    ],
)
def test_real_files_are_encoded_completely(
    shared_data: Path,
    mistral_tokenizer: Any,
    tmp_path: Path,
    name: str,
    every: int,
    records: int,
    dropped: int,
) -> None:
    """Of the larger ones, rows that are spread over the whole file."""
    kind = prepare_conversations if name.startswith("conv") else prepare_pairs
    rows: list[Any] = (shared_data / name).read_text().rstrip("\n").split("\n")
    trees, ledger = prepare(
        kind,
        write(tmp_path / "rows.jsonl", rows[every - 1 :: every]),
        mistral_tokenizer,
        max_length=1536,
        max_prompt_length=1024,
    )
    assert ledger.counts["read"] == records
    assert ledger.counts["dropped"] == dropped
    cut = {entry.row for entry in ledger.entries if "answer cut" in entry.reason}
    for tree in trees:
        for branch in range(len(tree.branches)):
            sequence = tree.sequence(branch)
            ids = sequence.input_ids
            assert len(ids) <= 1536
            assert ids[0] == mistral_tokenizer.bos_token_id != ids[1]
            assert sequence.trained.any()
            assert tree.branches[branch].input_ids.size
            ended = bool(sequence.trained[-1]) and ids[-1] == mistral_tokenizer.eos_token_id
            assert ended or tree.origin.row in cut


def test_a_small_context_says_what_was_cut(shared_data: Path, stories_tokenizer: Any) -> None:
    source = DataSource(path=str(shared_data / "pairs" / "orca_dpo_pairs.jsonl"))
    trees, ledger = prepare(prepare_pairs, source, stories_tokenizer, max_length=512)
    assert len(trees) == 142
    assert ledger.counts["truncated"] > 130
    assert all(" -> " in entry.detail for entry in ledger.entries)
