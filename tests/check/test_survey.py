"""Each finding is made by what is planted, and by nothing in clean data."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tandem.check.check_page import as_json, print_survey
from tandem.check.findings import Finding, masked
from tandem.check.survey import survey
from tandem.check.survey_result import CheckTarget, Histogram, Survey
from tandem.data.encoded.encode_chunk import EncodingOptions, FitRecord, fit_records
from tandem.data.encoded.worker_pool import EncodingWork
from tandem.data.formats.format import Kind, Record
from tandem.data.ledger import Ledger
from tandem.data.text.contamination import read_other
from tandem.data.tokenize.chat_template import resolve_template
from tandem.data.tokenize.encode import ChatTokenizer
from tandem.data.truncation.limits import Limits
from tandem.errors import UserError
from tandem.recipe.data_source import DataSource

from ..data.built import prepare_conversations, prepare_pairs
from .made_data import FORGETFUL, conversation, pair, write

_MANY = 2**31 - 1
CLEAN = 40


def _survey(*files: Path, kind: Kind = "conversations", **options: Any) -> Survey:
    plan = EncodingOptions(kind, Limits(_MANY, None), "stop")
    subject = CheckTarget(None, tuple(DataSource(path=str(file)) for file in files), plan, 0.05)
    return survey(subject, **options)


def _by_name(found: Survey) -> dict[str, Finding]:
    return {finding.sign.name: finding for finding in found.findings}


def _ask(text: str, answer: str | None = None) -> dict[str, Any]:
    row = conversation(900)
    row["messages"][0]["content"] = text
    if answer is not None:
        row["messages"][1]["content"] = answer
    return row


def _answer(text: str) -> dict[str, Any]:
    return _ask(conversation(901)["messages"][0]["content"], text)


SENTENCE = "The old bridge crosses the river where the ferry used to land in the evening. "

CONVERSATIONS: dict[str, dict[str, Any]] = {
    "replacement_characters": _answer("The caf\ufffd is open until ten."),
    "mojibake": _answer("The cafÃ© is open, and that\u00e2\u20ac\u2122s all there is to it."),
    "control_characters": _answer("The half is \x0crac{1}{2}."),
    "invisible_characters": _answer("It is\u200b open."),
    "html_entities": _answer("Salt &amp; pepper are on the table."),
    "template_tokens": _answer("It is open.<|im_end|>"),
    "secrets": _answer("The key is AKIAIOSFODNN7EXAMPLQ, keep it."),
    "email_addresses": _answer("Write to jane.roe@sunmail.org for the minutes."),
    "answer_breaks_off": _answer(SENTENCE * 2 + "After the storm nobody was sure whether the"),
    "code_block_left_open": _answer("Like this:\n```python\nprint(1)\n"),
    "refusals": _answer("I'm sorry, but I can't help with that request."),
    "answer_repeats_the_prompt": _ask(SENTENCE.strip(), SENTENCE.strip()),
    "exact_duplicates": conversation(3),
    "duplicate_prompts": _ask(conversation(3)["messages"][0]["content"], "Nobody knows that."),
    "duplicate_answers": _ask("And then?", conversation(3)["messages"][1]["content"]),
    "dropped": {"messages": [{"role": "user", "content": "Is anybody there at all?"}]},
}  # fmt: skip


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_a_planted_record_is_found_and_it_alone(name: str, tmp_path: Path) -> None:
    rows = [conversation(seed) for seed in range(CLEAN)]
    rows.insert(20, CONVERSATIONS[name])
    found = _survey(write(tmp_path / "a.jsonl", rows))
    assert set(_by_name(found)) == {name}
    finding = _by_name(found)[name]
    assert finding.count == 1
    assert [row.row for row in finding.rows] == [21]
    assert found.problem is None


def _edited(**changes: str) -> dict[str, Any]:
    return {**pair(900), **changes}


PAIRS: dict[str, dict[str, Any]] = {
    "nearly_identical_answers": _edited(chosen="It is open at ten.", rejected="it is  open at ten"),
    "chosen_refuses": _edited(chosen="I'm sorry, but I cannot help with that."),
    "chosen_says_nothing": _edited(chosen="..."),
    "chosen_scored_lower": {**pair(900), "score_chosen": 1.5, "score_rejected": 4},
    "label_prefers_rejected": {**pair(900), "preferred": "rejected"},
    "pairs_contradict": {**pair(3), "chosen": pair(3)["rejected"], "rejected": pair(3)["chosen"]},
    "dropped": _edited(chosen="Same.", rejected="Same."),
}  # fmt: skip


@pytest.mark.parametrize("name", PAIRS)
def test_a_planted_pair_is_found_and_it_alone(name: str, tmp_path: Path) -> None:
    beside = {"score_chosen": 4, "score_rejected": 1.5, "preferred": "chosen"}
    rows: list[Any] = [{**pair(seed), **beside} for seed in range(CLEAN)]
    rows.insert(20, {**beside, **PAIRS[name]})
    found = _survey(write(tmp_path / "a.jsonl", rows), kind="preference pairs")
    by_name = _by_name(found)
    # A chosen answer that refuses is a refusal as well.
    assert set(by_name) - {"refusals"} == {name}
    assert [row.row for row in by_name[name].rows] == [21]


def test_columns_that_say_nothing_in_the_first_rows_are_read_all_the_same(tmp_path: Path) -> None:
    empty = {"score_chosen": None, "score_rejected": None, "preferred": None}
    rows: list[Any] = [{**pair(seed), **empty} for seed in range(300)]
    rows += [
        {**pair(400), "score_chosen": 1.5, "score_rejected": 4, "preferred": None},
        {**pair(401), "score_chosen": None, "score_rejected": 4, "preferred": "rejected"},
        {**pair(402), "score_chosen": 4, "score_rejected": 1.5, "preferred": "chosen"},
    ]
    found = _by_name(_survey(write(tmp_path / "a.jsonl", rows), kind="preference pairs"))
    assert {name: [e.row for e in finding.rows] for name, finding in found.items()} == {
        "chosen_scored_lower": [301],
        "label_prefers_rejected": [302],
    }


@pytest.mark.parametrize("kind", ["conversations", "preference pairs"])
def test_clean_data_has_no_finding(kind: Kind, tmp_path: Path) -> None:
    make: Callable[[int], Any] = conversation if kind == "conversations" else pair
    found = _survey(write(tmp_path / "a.jsonl", map(make, range(200))), kind=kind)
    assert not found.findings
    assert found.problem is None
    assert found.counts == {"read": 200, "trained": 200, "truncated": 0, "dropped": 0}
    for languages in found.roles.languages.values():
        assert languages.most_common(1)[0][0] == "en"


def test_near_duplicates_name_the_record_they_are_like(tmp_path: Path) -> None:
    rows = [conversation(seed, exchanges=2) for seed in range(CLEAN)]
    near = json.loads(json.dumps(rows[7]))
    near["messages"][0]["content"] += " Say."
    near["messages"][3]["content"] += " Indeed."
    found = _survey(write(tmp_path / "a.jsonl", [*rows, near]))
    (finding,) = found.findings
    assert (finding.sign.name, finding.count) == ("near_duplicates", 1)
    assert finding.rows[0].row == CLEAN + 1
    assert finding.rows[0].excerpt.startswith("as row 8: What is it that")


def test_duplicates_are_found_across_files(tmp_path: Path) -> None:
    first = write(tmp_path / "a.jsonl", map(conversation, range(10)))
    second = write(tmp_path / "b.jsonl", map(conversation, range(9, 15)))
    (finding,) = _survey(first, second).findings
    assert finding.sign.name == "exact_duplicates"
    assert (Path(finding.rows[0].file).name, finding.rows[0].row) == ("b.jsonl", 1)
    assert f"as {first}, row 10: " in finding.rows[0].excerpt


def _scored(question: str, *answers: str) -> dict[str, Any]:
    completions = [
        {"response": text, "overall_score": 9 - number} for number, text in enumerate(answers)
    ]
    return {"instruction": question, "completions": completions}


def _best_vs_rest(tmp_path: Path, *rows: dict[str, Any]) -> dict[str, list[tuple[int, str]]]:
    spec = DataSource(path=str(write(tmp_path / "a.jsonl", rows)), completions="best_vs_rest")
    plan = EncodingOptions("preference pairs", Limits(_MANY, None), "stop")
    found = survey(CheckTarget(None, (spec,), plan, 0.05))
    return {
        name: [(e.row, e.excerpt.partition(":")[0]) for e in finding.rows]
        for name, finding in _by_name(found).items()
    }


def test_the_pairs_of_one_row_do_not_repeat_each_other(tmp_path: Path) -> None:
    long, other = pair(1)["chosen"], pair(2)["chosen"]
    first = _scored("Why is the river wide?", long, "No one.", "No other.", long + " So.")
    assert _best_vs_rest(tmp_path, first) == {}
    # Short answers are told from each other, too.
    again = _scored("Why is the river wide?", long, "Nobody at all.")
    assert _best_vs_rest(tmp_path, first, again) == {"near_duplicates": [(2, "as row 1")]}
    short = _scored("Is the river wide?", "Yes.", "No.")
    assert _best_vs_rest(tmp_path, short, _scored("Is the river wide?", "Yes.", "Never.")) == {}
    # What does repeat another row's is found.
    found = _best_vs_rest(
        tmp_path,
        first,
        _scored("And the sea?", long, "It is a question of time and of a little patience."),
        _scored("Why is the river wide?", other, "Who would want to know that of all things?"),
    )
    assert found == {"duplicate_answers": [(2, "as row 1")], "duplicate_prompts": [(3, "as row 1")]}


def test_an_answer_may_repeat_what_a_tool_says(tmp_path: Path) -> None:
    said = "It is 18 degrees in Bern today."
    call = [{"function": {"name": "weather", "arguments": {"city": "Bern"}}}]
    asked = [
        {"role": "user", "content": "How warm is it there?"},
        {"role": "assistant", "content": None, "tool_calls": call},
    ]
    answered = {"role": "assistant", "content": said}
    rows = [
        {"messages": [*asked, {"role": "tool", "content": said}, answered]},
        {"messages": [{"role": "user", "content": said}, answered]},
    ]
    finding = _by_name(_survey(write(tmp_path / "a.jsonl", rows)))["answer_repeats_the_prompt"]
    assert [row.row for row in finding.rows] == [2]


def test_rows_of_files_of_one_name_are_told_apart(tmp_path: Path) -> None:
    files = []
    for folder in ("one/a", "two/a", "two/b"):
        (tmp_path / folder).mkdir(parents=True)
        files.append(write(tmp_path / folder / "x.jsonl", [_answer("It is\u200b open.")]))
    files.append(write(tmp_path / "y.jsonl", [_answer("It is\u200b closed.")]))

    def rows(*files: Path) -> list[str]:
        found = _survey(*files, shown=9)
        out = StringIO()
        print_survey(Console(file=out, width=100), found, None)
        lines = out.getvalue().splitlines()
        return [line.split("  ")[-2].strip() for line in lines if "\\u200b" in line]

    assert rows(*files) == [
        "one/a/x.jsonl, row 1", "two/a/x.jsonl, row 1", "b/x.jsonl, row 1", "y.jsonl, row 1",
    ]  # fmt: skip
    assert rows(files[0], files[3]) == ["x.jsonl, row 1", "y.jsonl, row 1"]
    # The one that nothing is found in counts, and a source that is not there ends nothing.
    clean = write(tmp_path / "two" / "y.jsonl", [conversation(1)])
    said = rows(files[3], clean, tmp_path / "none.jsonl")
    assert said == [f"{tmp_path.name}/y.jsonl, row 1"]


def test_rows_of_a_folder_to_compare_with_have_their_file(tmp_path: Path) -> None:
    row = conversation(1)
    folder = tmp_path / "eval"
    folder.mkdir()
    write(folder / "a.jsonl", [conversation(2)])
    write(folder / "b.jsonl", [{"query": row["messages"][0]["content"]}])
    file = write(tmp_path / "a.jsonl", [row])
    found = _by_name(_survey(file, others=[read_other(DataSource(path=str(folder)))]))
    excerpt = found["shared_prompts"].rows[0].excerpt
    assert excerpt.startswith(f"as {folder / 'b.jsonl'}, row 1: What is it")


def test_secrets_are_named_and_masked(tmp_path: Path) -> None:
    key, other = "AKIAIOSFODNN7EXAMPLQ", "ghp_" + "a1B2" * 9
    rows = [_answer(f"Use {key} there."), _ask("What is the token?", f"It is {other}, keep it.")]
    found = _survey(write(tmp_path / "a.jsonl", rows))
    finding = _by_name(found)["secrets"]
    assert finding.kinds == {"AWS access key": 1, "GitHub token": 1}
    shown = json.dumps(as_json(found))
    assert key not in shown
    assert other not in shown
    assert "AKIA****************" in finding.rows[0].excerpt


def test_the_special_tokens_of_the_tokenizer_are_found(
    tmp_path: Path, stories_tokenizer: Any
) -> None:
    template = resolve_template(stories_tokenizer, "neural-chat")
    rows = [*map(conversation, range(5)), _answer("It is <s> open.")]
    subject = CheckTarget(
        "sft",
        (DataSource(path=str(write(tmp_path / "a.jsonl", rows))),),
        EncodingOptions("conversations", Limits(_MANY, None), "stop"),
        0.05,
        chat=ChatTokenizer.of(stories_tokenizer, template),
        special=("<s>", "</s>", "<unk>"),
    )
    assert set(_by_name(survey(subject))) == {"special_tokens"}


@pytest.mark.parametrize("kind", ["conversations", "preference pairs"])
def test_what_is_cut_and_dropped_is_what_a_run_cuts_and_drops(
    kind: Kind, shared_data: Path, stories_tokenizer: Any, tmp_path: Path
) -> None:
    pairs = kind == "preference pairs"
    real = shared_data / (
        "pairs/orca_dpo_pairs.jsonl" if pairs else "conversations/slimorca_format.jsonl"
    )
    lines = real.read_text().splitlines()[:40]
    lines.insert(3, '{"question": 3, "chosen": "a", "rejected": "b", "conversations": []}')
    file = write(tmp_path / "a.jsonl", lines)
    template = resolve_template(stories_tokenizer, "neural-chat")
    ledger = Ledger(None)
    prepare = prepare_pairs if pairs else prepare_conversations
    trees = prepare(
        [DataSource(path=str(file))],
        tokenizer=stories_tokenizer,
        template=template,
        max_length=400,
        max_prompt_length=150,
        ledger=ledger,
    )
    subject = CheckTarget(
        None,
        (DataSource(path=str(file)),),
        EncodingOptions(kind, Limits(400, 150), "stop"),
        0.05,
        chat=ChatTokenizer.of(stories_tokenizer, template),
        limited=True,
    )
    found = survey(subject, shown=1000)
    assert ledger.counts["truncated"] > 10
    assert ledger.counts["dropped"] == 1
    assert found.counts == ledger.counts
    assert found.reasons == ledger.summary()["reasons"]
    rows = {
        (finding.sign.name, finding.sign.about): [row.row for row in finding.rows]
        for finding in found.findings
        if finding.sign.name in ("truncated", "dropped")
    }
    expected: dict[tuple[str, str], list[int]] = {}
    for entry in ledger.entries:
        expected.setdefault((entry.outcome, entry.reason), []).append(entry.row)
    assert rows == expected
    # Lengths are those before the cut.
    whole = prepare(
        [DataSource(path=str(file))], tokenizer=stories_tokenizer, template=template,
        max_length=_MANY, ledger=Ledger(None),
    )  # fmt: skip
    longest = [
        max(len(tree.sequence(b).input_ids) for b in range(len(tree.branches))) for tree in whole
    ]
    assert len(longest) == len(trees)
    assert found.measures["whole"].total == sum(longest)
    assert found.measures["whole"].most == max(longest)
    trained = [
        sum(int(tree.sequence(b).trained.sum()) for b in range(len(tree.branches)))
        for tree in whole
    ]
    names = ("chosen", "rejected") if pairs else ("answers",)
    assert sum(found.measures[name].total for name in names) == sum(trained)
    assert found.histogram is not None
    assert sum(found.histogram.counts) == len(longest)


@pytest.mark.parametrize(
    ("edges", "marks"),
    [
        ((400, 400), [""]),
        ((401, 401), ["  beyond max_length"]),
        ((395, 400), [""]),
        (
            (300, 350, 400, 450, 470),
            ["", "", "  partly beyond max_length", "  beyond max_length"],
        ),
    ],
)
def test_bars_beyond_max_length_are_marked(
    edges: tuple[int, ...], marks: list[str], mistral_tokenizer: Any, tmp_path: Path
) -> None:
    found = _with_chat(mistral_tokenizer, True, write(tmp_path / "a.jsonl", [conversation(1)]))
    assert found.target.options.limits.sequence == 400
    found = replace(found, histogram=Histogram(edges, (2,) * len(marks)))
    out = StringIO()
    print_survey(Console(file=out, width=100), found, "some")
    bars = [line for line in out.getvalue().splitlines() if "\u2588" in line]
    assert [line.rpartition("\u2588 2")[2] for line in bars] == marks


def test_only_rows_of_which_a_part_was_encoded_are_encoded_again(
    mistral_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [conversation(seed) for seed in range(300)]
    rows[4] = conversation(4, exchanges=6)
    rows[7] = CONVERSATIONS["dropped"]
    rows[280] = _answer(SENTENCE * 300)  # so many characters are more tokens than the limit
    file = write(tmp_path / "a.jsonl", rows)
    encoded: list[list[int]] = []

    def counting(
        chat: ChatTokenizer, plan: EncodingOptions, records: Sequence[Record]
    ) -> list[FitRecord]:
        encoded.append([record.origin.row for record in records])
        return fit_records(chat, plan, records)

    monkeypatch.setattr("tandem.check.inspect_chunk.fit_records", counting)
    found = _with_chat(mistral_tokenizer, True, file)
    assert encoded == [[*range(1, 8), *range(9, 257)], [], [*range(257, 301)], [281]]
    assert found.counts == {"read": 300, "trained": 299, "truncated": 2, "dropped": 1}
    # Lengths are those that they have without limits.
    whole = _with_chat(mistral_tokenizer, False, file)
    assert found.measures == whole.measures
    assert found.histogram == whole.histogram


def test_a_row_of_several_pairs_is_measured_once(mistral_tokenizer: Any, tmp_path: Path) -> None:
    answers = [pair(seed)["chosen"] for seed in range(4)]
    answers[2] = SENTENCE * 60
    completions = [
        {"response": text, "overall_score": 9 - number} for number, text in enumerate(answers)
    ]
    row = {"instruction": "Why is it that the river is wide?", "completions": completions}
    spec = DataSource(path=str(write(tmp_path / "a.jsonl", [row])), completions="best_vs_rest")
    chat = ChatTokenizer.of(mistral_tokenizer, resolve_template(mistral_tokenizer, "neural-chat"))

    def look(limited: bool) -> Survey:
        plan = EncodingOptions("preference pairs", Limits(400 if limited else _MANY, None), "stop")
        return survey(CheckTarget(None, (spec,), plan, 0.05, chat=chat, limited=limited))

    found, whole = look(limited=True), look(limited=False)
    assert (found.counts["trained"], found.counts["truncated"]) == (3, 1)
    assert found.measures == whole.measures
    assert found.histogram is not None
    assert sum(found.histogram.counts) == 3


def test_a_conversation_of_two_branches_is_no_pair(byte_tokenizer: Any, tmp_path: Path) -> None:
    template = tmp_path / "forgetful.jinja"
    template.write_text(FORGETFUL)
    rows = []
    for seed in range(20):
        row = conversation(seed, exchanges=2)
        row["messages"][1]["content"] = "<think>So it is.</think>" + row["messages"][1]["content"]
        rows.append(row)
    file = write(tmp_path / "a.jsonl", rows)
    resolved = resolve_template(byte_tokenizer, str(template))
    subject = CheckTarget(
        None,
        (DataSource(path=str(file)),),
        EncodingOptions("conversations", Limits(_MANY, None), "stop"),
        0.05,
        chat=ChatTokenizer.of(byte_tokenizer, resolved),
    )
    found = survey(subject)
    trees = prepare_conversations(
        [DataSource(path=str(file))], tokenizer=byte_tokenizer, template=resolved,
        max_length=_MANY, ledger=Ledger(None),
    )  # fmt: skip
    assert {len(tree.branches) for tree in trees} == {2}
    assert set(found.measures) == {"whole", "prompt", "answers"}
    trained = [sum(int(tree.sequence(b).trained.sum()) for b in range(2)) for tree in trees]
    assert found.measures["answers"].total == sum(trained)
    assert found.measures["answers"].most == max(trained)


def test_processes_find_what_one_process_finds(
    tmp_path: Path, byte_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tandem.data.encoded.worker_pool._FEW", 1)
    monkeypatch.setattr("tandem.data.sources.file_chunks._ROWS", 64)
    rows = [conversation(seed % 100) for seed in range(140)]
    file = write(tmp_path / "a.jsonl", rows)
    template = resolve_template(byte_tokenizer, "chatml")
    subject = CheckTarget(
        None,
        (DataSource(path=str(file)),),
        EncodingOptions("conversations", Limits(250, None), "stop"),
        0.05,
        chat=ChatTokenizer.of(byte_tokenizer, template),
        limited=True,
    )
    seen: list[int] = []

    class Phase:
        def __enter__(self) -> Callable[[int], None]:
            return seen.append

        def __exit__(self, *_: object) -> None:
            pass

    one = survey(
        subject, encoding_work=EncodingWork(workers=1, progress=lambda text, total: Phase())
    )
    assert sum(seen) == len(rows)
    two = survey(subject, encoding_work=EncodingWork(workers=2))
    assert as_json(one) == as_json(two)
    assert one.counts["truncated"] > 0
    assert _by_name(one)["exact_duplicates"].count == 40


def _run(file: Path, tokenizer: Any) -> None:
    """What a training stage does with its data before it trains."""
    ledger = Ledger(None)
    prepare_conversations(
        [DataSource(path=str(file))],
        tokenizer=tokenizer,
        template=resolve_template(tokenizer, "neural-chat"),
        max_length=_MANY,
        ledger=ledger,
    )
    ledger.check_share(0.05)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (["{", *map(conversation, range(30))], "a.jsonl, row 1: the record is not valid JSON"),
        ([*map(conversation, range(3)), "[]"], "a.jsonl, row 4: the record is a JSON list"),
        ([], "is empty"),
        ([{"text": "x"}] * 3, "its `text` does not say what is asked"),
        ([{"a": "x"}] * 3, "a record of no known format; its keys are: a."),
        ([{"a": "x"}] * 30, "a.jsonl, row 1: a record of no known format"),
        ([{"messages": []}] * 3, "none of the 3 records of"),
        ([*map(conversation, range(9)), {"messages": []}], "max_dropped allows 5.0%"),
    ],
)
def test_what_would_stop_a_run_is_said_in_its_words(
    rows: list[Any], said: str, tmp_path: Path, stories_tokenizer: Any
) -> None:
    file = write(tmp_path / "a.jsonl", rows)
    found = _survey(file)
    assert found.problem is not None
    assert said in found.problem
    severities = {f.sign.severity for f in found.findings if f.sign.name == "dropped"}
    assert severities == ({"error"} if found.counts["dropped"] else set())
    # The rest was looked at all the same.
    assert found.counts["read"] == (
        0 if not rows or rows[0] in ({"text": "x"}, {"a": "x"}) else len(rows)
    )
    with pytest.raises(UserError) as raised:
        _run(file, stories_tokenizer)
    assert str(raised.value) == found.problem


def test_what_was_read_before_a_source_of_no_format_is_reported(tmp_path: Path) -> None:
    # More than the pieces that are read ahead, and the last row a repeated one.
    rows = [conversation(seed) for seed in range(20)]
    rows = [*rows, *[{"messages": []}] * 8700, rows[3]]
    large = write(tmp_path / "a.jsonl", rows)
    unknown = write(tmp_path / "b.jsonl", [{"foo": 1}])
    found = _survey(large, unknown)
    assert found.counts["read"] == len(rows)
    assert "record of no known format; its keys are: foo" in str(found.problem)
    (row,) = _by_name(found)["exact_duplicates"].rows
    assert row.row == len(rows)
    assert row.excerpt.startswith("as row 4: What is it that")


@pytest.mark.parametrize("with_tokens", [False, True])
def test_few_rows_before_a_source_of_no_format_are_reported_as_well(
    with_tokens: bool, tmp_path: Path, stories_tokenizer: Any
) -> None:
    good = write(tmp_path / "a.jsonl", [*map(conversation, range(5)), conversation(2)])
    unknown = write(tmp_path / "b.jsonl", [{"foo": 1}])
    found = (
        _with_chat(stories_tokenizer, False, good, unknown)
        if with_tokens
        else _survey(good, unknown)
    )
    assert found.counts["read"] == 6
    assert "record of no known format; its keys are: foo" in str(found.problem)
    assert [e.row for e in _by_name(found)["exact_duplicates"].rows] == [6]


def test_unparsable_rows_may_be_dropped(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", [*map(conversation, range(30)), "{"])
    plan = EncodingOptions("conversations", Limits(_MANY, None), "drop")
    found = survey(CheckTarget(None, (DataSource(path=str(file)),), plan, 0.05))
    assert found.problem is None
    assert _by_name(found)["dropped"].sign.about == "unparsable"


def test_only_the_first_rows_are_read_with_a_limit(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", [*map(conversation, range(600)), "{"])
    found = _survey(file, limit=300)
    assert found.counts["read"] == 300
    assert found.problem is None
    assert as_json(found)["limit"] == 300


def test_a_limit_counts_the_rows_of_labelled_answers_before_they_are_joined(
    tmp_path: Path,
) -> None:
    answers = [
        {"prompt": f"Q{n}", "completion": f"{said} {n}", "label": said == "good"}
        for n in range(300)
        for said in ("good", "bad")
    ]
    both = write(tmp_path / "a.jsonl", answers)
    found = _survey(both, kind="preference pairs", limit=301)
    assert found.counts == {"read": 151, "trained": 150, "truncated": 0, "dropped": 1}
    assert [e.row for e in _by_name(found)["dropped"].rows] == [301]
    # All good ones come first: none of the rows is left unsaid.
    apart = write(tmp_path / "b.jsonl", sorted(answers, key=lambda row: not row["label"]))
    found = _survey(apart, kind="preference pairs", limit=280)
    assert found.counts == {"read": 280, "trained": 0, "truncated": 0, "dropped": 280}
    assert "none of the 280 records" in str(found.problem)
    assert "What an answer lacks may be in the rows behind --limit" in str(found.problem)


def test_sources_that_were_not_reached_are_not_looked_at(tmp_path: Path) -> None:
    first = write(tmp_path / "a.jsonl", map(conversation, range(20)))
    second = write(tmp_path / "b.jsonl", map(conversation, range(20, 40)))
    unknown = write(tmp_path / "c.jsonl", [{"foo": 1}])

    def heads(found: Survey) -> list[str]:
        out = StringIO()
        print_survey(Console(file=out, width=100), found, None)
        return [line.rpartition(": ")[2] for line in out.getvalue().splitlines()[:3]]

    found = _survey(first, second, unknown, limit=20)
    assert (found.counts["read"], found.problem) == (20, None)
    assert heads(found) == ["messages, conversations", "not looked at", "not looked at"]
    found = _survey(first, second, unknown, limit=25)
    assert found.counts["read"] == 25
    known = "messages, conversations"
    assert heads(found) == [known, known, "not looked at"]
    # A source that ends the pass is the last one that is looked at.
    found = _survey(first, unknown, second)
    assert heads(found) == [known, "no format was recognised", "not looked at"]
    assert [one["looked_at"] for one in as_json(found)["sources"]] == [True, True, False]


def test_prompts_and_words_in_a_row_of_other_sets_are_found(tmp_path: Path) -> None:
    rows = [conversation(seed) for seed in range(30)]
    question = rows[4]["messages"][0]["content"]
    words = rows[9]["messages"][1]["content"].split()
    asked = write(tmp_path / "questions.jsonl", [{"query": question.upper(), "gold": 1}])
    lines = tmp_path / "lines.txt"
    lines.write_text("nothing of it is here\n" + " ".join(words[3:16]).replace(".", " -") + "\n")
    file = write(tmp_path / "a.jsonl", rows)
    others = [read_other(DataSource(path=str(path))) for path in (asked, lines)]
    found = _survey(file, others=others)
    said = {(f.sign.name, f.sign.about): f.rows for f in found.findings}
    assert {key: [e.row for e in rows] for key, rows in said.items()} == {
        ("shared_prompts", str(asked)): [5],
        ("shared_words", str(lines)): [10],
    }
    shown = said["shared_words", str(lines)][0].excerpt
    assert shown.startswith("as row 2 there: " + " ".join(words[3:6]).replace(".", ""))
    # Twelve words are no overlap.
    lines.write_text(" ".join(words[3:15]) + "\n")
    assert not _survey(file, others=[read_other(DataSource(path=str(lines)))]).findings


def test_keys_that_a_run_ignores_are_listed(tmp_path: Path) -> None:
    rows = [
        {**conversation(1), "system": "S", "tools": [], "source": "a"},
        {**conversation(2), "score": 1, "source": "b"},
    ]
    found = _survey(write(tmp_path / "a.jsonl", rows))
    assert found.unread == ("score", "source")
    assert as_json(found)["unread_keys"] == ["score", "source"]
    out = StringIO()
    print_survey(Console(file=out, width=100), found, None)
    assert "\nkeys that are not read: score, source\n" in out.getvalue()
    assert _survey(write(tmp_path / "b.jsonl", [conversation(1)] * 2)).unread == ()
    # What a recipe's names lead into is read.
    nested = write(tmp_path / "n.jsonl", [{"log": conversation(1), "id": 1}])
    named = DataSource(path=str(nested), fields={"messages": "log.messages"})
    plan = EncodingOptions("conversations", Limits(_MANY, None), "stop")
    assert survey(CheckTarget(None, (named,), plan, 0.05)).unread == ("id",)
    # Of labelled answers those are left out that are put together first.
    answers = [{"prompt": "Q", "completion": c, "label": c == "A"} for c in "AB"]
    kto = _survey(write(tmp_path / "c.jsonl", answers), kind="preference pairs")
    assert (kto.counts["trained"], kto.unread) == (1, ())


def test_calls_and_reasoning_are_part_of_a_record(tmp_path: Path) -> None:
    def record(said: str, tool: str) -> dict[str, Any]:
        call = {"function": {"name": tool, "arguments": {}}}
        answer = {"role": "assistant", "content": None, "thinking": said, "tool_calls": [call]}
        return {"messages": [{"role": "user", "content": "Q"}, answer]}

    key = "AKIA" + "Q7KZ2M4XW9LPT3VB"
    rows = [record("", "f"), record("", "g"), record("It is f.", "f"), record(f"{key}.", "h")]
    found = _survey(write(tmp_path / "a.jsonl", rows))
    assert "exact_duplicates" not in _by_name(found)
    assert _by_name(found)["secrets"].rows[0].row == 4
    assert found.roles.languages["reasoning"].total() == 2
    assert found.roles.turns == {2: 4}
    call = '{"name": "h", "arguments": {}}'
    assert found.measures["answers"].most == len(f"{key}.{call}")
    found = _survey(write(tmp_path / "b.jsonl", [*rows, rows[1]]))
    assert _by_name(found)["exact_duplicates"].count == 1


def test_calls_are_compared_and_looked_at_as_texts_are(tmp_path: Path) -> None:
    def calling(arguments: dict[str, str]) -> dict[str, Any]:
        call = {"function": {"name": "alarm", "arguments": arguments}}
        asked = "Please set the alarm on my phone as I asked you before"
        turns = [
            {"role": "user", "content": asked},
            {"role": "assistant", "content": None, "tool_calls": [call]},
        ]
        return {"messages": turns}

    rows = [
        calling({"time": "7:00 in the morning", "day": "on Monday"}),
        calling({"time": "9:30 in the evening", "day": "next Friday"}),
        calling({"time": "noon", "key": "AKIA" + "Q7KZ2M4XW9LPT3VB", "text": "<|im_end|>"}),
    ]
    found = _survey(write(tmp_path / "a.jsonl", rows))
    by_name = _by_name(found)
    assert set(by_name) == {"duplicate_prompts", "secrets", "template_tokens"}
    assert [e.row for e in by_name["secrets"].rows] == [3]
    assert [e.row for e in by_name["template_tokens"].rows] == [3]
    assert found.roles.languages["call"].total() == 3
    same = _survey(write(tmp_path / "b.jsonl", [*rows, rows[1]]))
    assert _by_name(same)["exact_duplicates"].count == 1


def test_the_json_has_the_same_keys_whatever_is_found(tmp_path: Path) -> None:
    keys = {
        "stage", "held_out", "kind", "sources", "unread_keys", "unread_keys_cut", "limit",
        "records", "reasons",
        "turns", "roles", "lengths",
        "compared_with", "findings", "trains", "problem",
    }  # fmt: skip
    of_a_finding = {
        "name", "about", "severity", "title", "count", "of", "unit", "share", "kinds", "rows",
        "hint",
    }  # fmt: skip
    for rows in ([], [conversation(1)] * 2, ["{"]):
        value = as_json(_survey(write(tmp_path / "a.jsonl", rows)))
        assert set(value) == keys
        assert json.loads(json.dumps(value)) == value
        for finding in value["findings"]:
            assert set(finding) == of_a_finding
            assert set(finding["rows"][0]) == {"file", "row", "excerpt"}


def test_secrets_are_looked_for_in_what_is_shown_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[Any] = [conversation(seed) for seed in range(30)]
    asked = write(
        tmp_path / "questions.jsonl",
        [{"query": row["messages"][0]["content"], "gold": 1} for row in rows],
    )
    words = write(
        tmp_path / "answers.jsonl", [{"text": row["messages"][1]["content"]} for row in rows]
    )
    file = write(tmp_path / "a.jsonl", [*rows, *[CONVERSATIONS["dropped"]] * 30])
    others = [read_other(DataSource(path=str(path))) for path in (asked, words)]
    seen: list[str] = []

    def counting(text: str) -> str:
        seen.append(text)
        return masked(text)

    monkeypatch.setattr("tandem.check.findings.masked", counting)
    found = _survey(file, others=others)
    counts = {finding.sign.name: finding.count for finding in found.findings}
    assert counts == {"dropped": 30, "shared_prompts": 30, "shared_words": 30}
    assert all(len(finding.rows) == 3 for finding in found.findings)
    assert len(seen) == 9


def test_without_a_tokenizer_lengths_are_characters(tmp_path: Path) -> None:
    found = _survey(write(tmp_path / "a.jsonl", map(pair, range(9))), kind="preference pairs")
    assert found.unit == "characters"
    assert set(found.measures) == {"whole", "prompt", "chosen", "rejected"}
    assert found.measures["chosen"].total == sum(len(pair(seed)["chosen"]) for seed in range(9))


def _with_chat(tokenizer: Any, limited: bool, *files: Path) -> Survey:
    chat = ChatTokenizer.of(tokenizer, resolve_template(tokenizer, "neural-chat"))
    plan = EncodingOptions(
        "conversations", Limits(400, None) if limited else Limits(_MANY, None), "stop"
    )
    sources = tuple(DataSource(path=str(file)) for file in files)
    return survey(CheckTarget(None, sources, plan, 0.05, chat=chat, limited=limited))


@pytest.mark.parametrize("limited", [True, False])
def test_a_piece_of_which_nothing_can_be_encoded(
    limited: bool, mistral_tokenizer: Any, tmp_path: Path
) -> None:
    file = write(tmp_path / "a.jsonl", [CONVERSATIONS["dropped"]] * 3)
    found = _with_chat(mistral_tokenizer, limited, file)
    assert found.counts == {"read": 3, "trained": 0, "truncated": 0, "dropped": 3}
    assert found.measures == {}
    assert "none of the 3 records" in str(found.problem)


def test_what_is_too_long_to_be_counted_is_said(
    mistral_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tandem.check.inspect_chunk._COUNTED", 400)
    rows = [conversation(seed) for seed in range(3)] + [_answer(SENTENCE * 60)]
    found = _with_chat(mistral_tokenizer, False, write(tmp_path / "a.jsonl", rows))
    assert found.counts == {"read": 4, "trained": 4, "truncated": 0, "dropped": 0}
    assert found.measures["whole"].most == 400
    assert [e.row for e in _by_name(found)["very_long"].rows] == [4]
    # With limits, lengths are those before anything is cut.
    limited = _with_chat(mistral_tokenizer, True, tmp_path / "a.jsonl")
    assert limited.counts["truncated"] == 1
    assert "very_long" not in _by_name(limited)
