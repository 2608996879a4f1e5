"""Files of task data: lines end where lines end, and what is wrong is said with its row."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from tandem.errors import UserError
from tandem.evaluate.suites import find_data, read_rows
from tandem.evaluate.task_forms import FORMS
from tandem.storage.hashing import hash_json

# What `str.splitlines` takes for the end of a line, and files of lines do not.
WITHIN = "a\u2028b\u2029c\u0085d\x0be\x0cf\x1cg"
ITEM = ["A man sits.", "2", "one", "two", "three", "four"]


def hellaswag(*items: list[str], end: str = "\n") -> str:
    return "".join(line + end for item in items for line in item)


@pytest.mark.parametrize(
    ("task", "file", "text", "first"),
    [
        ("gsm8k", "gsm8k_test.jsonl",
         json.dumps({"question": WITHIN, "answer": "1"}, ensure_ascii=False),
         {"question": WITHIN, "answer": "1"}),
        ("hellaswag", "hellaswag_val.txt", hellaswag([WITHIN, *ITEM[1:]], ITEM),
         {"query": WITHIN, "choices": ITEM[2:], "gold": 2}),
        ("hellaswag", "hellaswag_val.txt", hellaswag(ITEM, end="\r\n"),
         {"query": ITEM[0], "choices": ITEM[2:], "gold": 2}),
        ("hellaswag", "hellaswag_val.txt", hellaswag(ITEM).rstrip("\n"),
         {"query": ITEM[0], "choices": ITEM[2:], "gold": 2}),
        ("mmlu", "x_test.csv", f'"{WITHIN}",1,2,3,4,C',
         {"question": WITHIN, "choices": ["1", "2", "3", "4"], "answer": 2}),
        ("truthfulqa_mc2", "truthfulqa.csv",
         f"Question,Correct Answers,Incorrect Answers\n{WITHIN},Yes,No;Never.\n",
         {"question": WITHIN,
          "mc2_targets": {"choices": ["Yes.", "No.", "Never."], "labels": [1, 0, 0]}}),
    ],
)  # fmt: skip
def test_lines_end_at_line_feeds(
    task: str, file: str, text: str, first: dict[str, object], tmp_path: Path
) -> None:
    path = tmp_path / file
    path.write_bytes(text.encode())
    assert read_rows(FORMS[task], path)[0] == first


GOOD = {
    "arc_easy": {"query": "q", "choices": ["a"], "gold": 0},
    "winogrande": {"context_options": ["a", "b"], "continuation": "c", "gold": 0},
    "gsm8k": {"question": "q", "answer": "1"},
}


@pytest.mark.parametrize(
    ("task", "bad", "said"),
    [
        *((task, {k: v for k, v in row.items() if k != key}, f"row 3: no '{key}'")
          for task, row in GOOD.items() for key in row),
        *((task, {**row, key: None}, "row 3: ")
          for task, row in GOOD.items() for key in row),
        ("gsm8k", '{"question": "q", "answer": 1', "row 3: Expecting ',' delimiter, column 30"),
        ("gsm8k", "[" * 100_000, "row 3: "),
        ("gsm8k", "3", "row 3 is no JSON object"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_with_its_row(
    task: str, bad: object, said: str, tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    # A blank line counts.
    rows = [json.dumps(GOOD[task]), "", bad if isinstance(bad, str) else json.dumps(bad)]
    path.write_text("\n".join(rows))
    with pytest.raises(UserError) as caught:
        read_rows(FORMS[task], path)
    assert said in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_table_with_a_short_row(tmp_path: Path) -> None:
    path = tmp_path / "truthfulqa.csv"
    path.write_text("Question,Correct Answers,Incorrect Answers\nWho?,Me,You\nWhat?,This\n")
    with pytest.raises(UserError, match="row 3: no 'Incorrect Answers'"):
        read_rows(FORMS["truthfulqa_mc2"], path)


def test_a_table_with_a_long_cell(tmp_path: Path) -> None:
    path = tmp_path / "truthfulqa.csv"
    path.write_text("Question,Correct Answers,Incorrect Answers\nWho?,Me," + "x" * 200_000)
    (row,) = read_rows(FORMS["truthfulqa_mc2"], path)
    assert len(row["mc2_targets"]["choices"][1]) == 200_001


def test_an_archive_that_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "gsm8k_test.jsonl.gz"
    whole = gzip.compress(json.dumps(GOOD["gsm8k"]).encode())
    path.write_bytes(whole)
    assert read_rows(FORMS["gsm8k"], path) == [GOOD["gsm8k"]]
    for bad in (whole[:20], whole[:12] + b"\xff\xff" + whole[14:]):
        path.write_bytes(bad)
        with pytest.raises(UserError, match="Check the file"):
            read_rows(FORMS["gsm8k"], path)


def test_subjects_may_be_compressed(tmp_path: Path) -> None:
    for name in ("test/b_test.csv.gz", "test/a_test.csv", "test/a_test.csv.gz", "dev/b_dev.csv.gz"):
        path = tmp_path / "mmlu" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        text = b"Q,1,2,3,4,A\n"
        path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    found = find_data(tmp_path, "mmlu")
    assert found is not None
    assert [
        (subject, *(path.name if path else None for path in paths))
        for subject, *paths in found.parts
    ] == [("a", "a_test.csv", None), ("b", "b_test.csv.gz", "b_dev.csv.gz")]
    assert read_rows(FORMS["mmlu"], found.parts[1][1])[0]["question"] == "Q"


def test_measurements_kept_before_this_module_moved_are_found_again() -> None:
    """The key of TruthfulQA's holds the place of a function, which is the first it had."""
    assert hash_json(FORMS["truthfulqa_mc2"].task).startswith("fe10638b7efe0ff5")
