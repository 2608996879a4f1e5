"""Real rows in every format that can hold them give the trees that they give in their own."""

from __future__ import annotations

import csv
import gzip
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest

from tandem.data.encoded.dataset import EncodedDataset
from tandem.data.ledger import Ledger
from tandem.data.tokenize.chat_template import resolve_template
from tandem.recipe.data_source import DataSource

from .built import prepare_conversations, prepare_pairs

Rows = list[dict[str, Any]]
PAIRS = 16
TALKS = 40


def rows_of(file: Path, count: int, every: int = 1) -> Rows:
    with file.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in itertools.islice(lines, 0, count * every, every)]


def write(path: Path, rows: Rows) -> Path:
    """Rows in a file of the kind that its name says."""
    if path.suffix == ".arrow":
        table = pyarrow.Table.from_pylist(rows)
        with (
            pyarrow.OSFile(str(path), "wb") as sink,
            pyarrow.ipc.new_stream(sink, table.schema) as stream,
        ):
            stream.write_table(table)
        return path
    if path.suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            table = csv.DictWriter(file, list(rows[0]))
            table.writeheader()
            table.writerows(rows)
        return path
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if path.suffix == ".json":
        text = json.dumps(rows, indent=1)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def trees(
    prepare: Any, tokenizer: Any, *specs: DataSource
) -> tuple[EncodedDataset, dict[str, int]]:
    ledger = Ledger()
    template = resolve_template(tokenizer, "neural-chat")
    found = prepare(specs, tokenizer=tokenizer, template=template, max_length=2048, ledger=ledger)
    return found, ledger.counts


def ids(found: EncodedDataset) -> list[tuple[Any, ...]]:
    """What is fed and what is trained of every tree."""
    return [
        tuple(
            (part.input_ids.tolist(), part.trained.tolist())
            for part in (tree.prefix, *tree.branches)
        )
        for tree in found
    ]


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def prompt(row: dict[str, Any]) -> Rows:
    system = [said("system", row["system"])] if row["system"] else []
    return [*system, said("user", row["question"])]


def explicit(row: dict[str, Any]) -> Rows:
    return [{key: row[key] for key in ("system", "chosen", "rejected")}
            | {"prompt": row["question"]}]  # fmt: skip


def conversational(row: dict[str, Any]) -> Rows:
    answers = {key: [said("assistant", row[key])] for key in ("chosen", "rejected")}
    return [{"prompt": prompt(row), **answers, "chosen_rating": 5.0}]


def implicit(row: dict[str, Any]) -> Rows:
    return [
        {key: [*prompt(row), said("assistant", row[key])] for key in ("chosen", "rejected")}
        | {"messages": []}
    ]


def sharegpt(row: dict[str, Any]) -> Rows:
    names = {"system": "system", "user": "human"}
    turns = [{"from": names[one["role"]], "value": one["content"]} for one in prompt(row)]
    answers = {key: {"from": "gpt", "value": row[key]} for key in ("chosen", "rejected")}
    return [{"conversations": turns, **answers}]


def alpaca(row: dict[str, Any]) -> Rows:
    return [{"instruction": row["question"], "input": ""}
            | {key: row[key] for key in ("system", "chosen", "rejected")}]  # fmt: skip


def ultrafeedback(row: dict[str, Any]) -> Rows:
    answers = [(row["rejected"], 2.0), (row["chosen"], 8.5)]
    completions = [{"response": text, "overall_score": score} for text, score in answers]
    return [{"instruction": row["question"], "system": row["system"], "completions": completions}]


def unpaired(row: dict[str, Any]) -> Rows:
    return [
        {"prompt": prompt(row), "completion": [said("assistant", row[key])], "label": label}
        for key, label in (("chosen", True), ("rejected", False))
    ]


def own_names(row: dict[str, Any]) -> Rows:
    return [{"in": {"system": row["system"], "ask": row["question"]}, "good": row["chosen"],
             "bad": row["rejected"]}]  # fmt: skip


NAMES = {"system": "in.system", "question": "in.ask", "chosen": "good", "rejected": "bad"}


@pytest.mark.parametrize("file", ["a.jsonl", "a.arrow"])
@pytest.mark.parametrize(
    ("convert", "options"),
    [
        (explicit, {}),
        (conversational, {}),
        (implicit, {}),
        (sharegpt, {}),
        (alpaca, {}),
        (ultrafeedback, {}),
        (unpaired, {}),
        (own_names, {"fields": NAMES}),
        (lambda row: [row], {"format": "orca_dpo_pairs"}),
    ],
)
def test_pairs_are_the_same_in_every_format(
    convert: Callable[[dict[str, Any]], Rows],
    options: dict[str, Any],
    file: str,
    shared_data: Path,
    stories_tokenizer: Any,
    tmp_path: Path,
) -> None:
    source = shared_data / "pairs" / "orca_dpo_pairs.jsonl"
    rows = rows_of(source, PAIRS)
    original = write(tmp_path / "original.jsonl", rows)
    expected, counts = trees(prepare_pairs, stories_tokenizer, DataSource(path=str(original)))
    assert counts["trained"] >= PAIRS - 2
    path = write(tmp_path / file, [one for row in rows for one in convert(row)])
    spec = DataSource(path=str(path), **options)
    found, converted = trees(prepare_pairs, stories_tokenizer, spec)
    assert converted == counts
    assert ids(found) == ids(expected)


@pytest.mark.parametrize("name", ["a.csv", "a.json", "a.json.gz"])
def test_pairs_are_the_same_in_every_kind_of_file(
    name: str, shared_data: Path, stories_tokenizer: Any, tmp_path: Path
) -> None:
    rows = rows_of(shared_data / "pairs" / "orca_dpo_pairs.jsonl", PAIRS)
    original, table = write(tmp_path / "o.jsonl", rows), write(tmp_path / name, rows)
    expected, _ = trees(prepare_pairs, stories_tokenizer, DataSource(path=str(original)))
    found, _ = trees(prepare_pairs, stories_tokenizer, DataSource(path=str(table)))
    assert ids(found) == ids(expected)


def messages(row: dict[str, Any]) -> Rows:
    names = {"human": "user", "gpt": "assistant", "system": "system"}
    turns = [
        said(names[turn["from"]], turn["value"]) | {"weight": turn.get("weight")}
        for turn in row["conversations"]
    ]
    return [{"messages": turns}]


def own_roles(row: dict[str, Any]) -> Rows:
    names = {"human": "visitor", "gpt": "guide", "system": "rules"}
    turns = [
        {"who": names[turn["from"]], "said": turn["value"], "weight": turn.get("weight")}
        for turn in row["conversations"]
    ]
    return [{"log": turns}]


ROLES = {
    "fields": {"conversations": "log", "role": "who", "content": "said"},
    "roles": {"visitor": "user", "guide": "assistant", "rules": "system"},
}


@pytest.mark.parametrize("file", ["a.jsonl", "a.arrow"])
@pytest.mark.parametrize(
    ("convert", "options"), [(messages, {}), (own_roles, ROLES), (lambda row: [row], {})]
)
def test_conversations_are_the_same_in_every_format(
    convert: Callable[[dict[str, Any]], Rows],
    options: dict[str, Any],
    file: str,
    shared_data: Path,
    stories_tokenizer: Any,
    tmp_path: Path,
) -> None:
    source = shared_data / "conversations" / "slimorca_format.jsonl"
    rows = rows_of(source, TALKS, 200)  # of every kind: several turns, system texts
    original = write(tmp_path / "original.jsonl", rows)
    expected, counts = trees(
        prepare_conversations, stories_tokenizer, DataSource(path=str(original))
    )
    path = write(tmp_path / file, [one for row in rows for one in convert(row)])
    spec = DataSource(path=str(path), **options)
    found, converted = trees(prepare_conversations, stories_tokenizer, spec)
    assert converted == counts
    assert ids(found) == ids(expected)


def single(row: dict[str, Any]) -> tuple[str, str, str] | None:
    """System, question and answer of a conversation that is one exchange."""
    turns = {turn["from"]: turn["value"] for turn in row["conversations"]}
    if len(turns) != len(row["conversations"]):
        return None
    return turns.get("system", ""), turns["human"], turns["gpt"]


@pytest.mark.parametrize(
    "make",
    [
        lambda s, q, a: {"system": s, "instruction": q, "input": "", "output": a},
        lambda s, q, a: {"system": s, "prompt": q, "completion": a},
        lambda s, q, a: {"system": s, "prompt": q, "completion": a, "label": True},
    ],
)
def test_single_exchanges_are_the_same_in_every_format(
    make: Callable[[str, str, str], dict[str, Any]],
    shared_data: Path,
    stories_tokenizer: Any,
    tmp_path: Path,
) -> None:
    rows = rows_of(shared_data / "conversations" / "slimorca_format.jsonl", TALKS, 200)
    kept = [(row, parts) for row in rows if (parts := single(row))]
    assert len(kept) > TALKS // 2
    original = write(tmp_path / "o.jsonl", [row for row, _ in kept])
    expected, counts = trees(
        prepare_conversations, stories_tokenizer, DataSource(path=str(original))
    )
    for name in ("a.jsonl", "a.csv"):
        path = write(tmp_path / name, [make(*parts) for _, parts in kept])
        found, converted = trees(
            prepare_conversations, stories_tokenizer, DataSource(path=str(path))
        )
        assert converted == counts
        assert ids(found) == ids(expected)
