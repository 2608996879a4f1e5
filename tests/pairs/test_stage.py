"""The stage and the command: servers, keys, ranking, vLLM, formats, and what is said."""

from __future__ import annotations

import bz2
import importlib.metadata
import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console

from tandem.cli.main import main
from tandem.data.text import contamination
from tandem.errors import Stopped, UserError
from tandem.pairs import generators, rankers
from tandem.pairs import make_pairs as pairs_stage
from tandem.pairs.make_pairs import make_pairs
from tandem.recipe.data_source import DataSource
from tandem.recipe.pairs_settings import PairsSettings
from tandem.storage.atomic_files import read_json, read_jsonl
from tests.jobs import pairs_job

from ..stages.made_inputs import QUIET, make_conversations, make_model_folder
from .badly_behaved import KEY, Desk, asked, badly_behaved

COUNT = 24


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture
def desk() -> Iterator[Desk]:
    with badly_behaved() as desk:
        yield desk


@pytest.fixture
def conversations(tmp_path: Path) -> Path:
    return make_conversations(tmp_path / "set.jsonl", COUNT)


def make(
    conversations: Path, folder: Path, model: Path | str = "", seed: int = 1,
    console: Console = QUIET, dtype: str = "auto", in_round: int = 1, **settings: Any,
) -> list[dict[str, Any]]:  # fmt: skip
    values = {"prompts": (DataSource(path=str(conversations)),), "max_new_tokens": 6, **settings}
    made = PairsSettings.model_validate(values)
    job = pairs_job(made, model, folder, seed=seed, dtype=dtype, in_round=in_round)
    make_pairs(job, console)
    return read_jsonl(folder / "pairs.jsonl")


def everything_in(folder: Path) -> str:
    return "\n".join(
        path.read_text(errors="replace") for path in folder.rglob("*") if path.is_file()
    )


def test_a_server_writes_the_rejected_answers_and_the_key_stays_unseen(
    conversations: Path, tmp_path: Path, desk: Desk, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("MY_KEY", KEY)
    # The server's own words about a refused request hold the key.
    desk.plan = {"say red": [400], "say green": [500]}
    folder = tmp_path / "out"
    code = main([
        "pairs", "--prompts", str(conversations), "--output_dir", str(folder),
        f"server.base_url={desk.url}/", "server.model=big", "server.key_variable=MY_KEY",
        "temperature=0.7", "max_new_tokens=9", "server.limit_key=max_completion_tokens",
    ])  # fmt: skip
    said = capfd.readouterr()
    assert code == 0, said.err
    rows = read_jsonl(folder / "pairs.jsonl")
    # The first of three that say red was refused; its turn comes in no order.
    assert len(rows) == COUNT - 1
    assert all(row["rejected"] == f"to {row['question']}" for row in rows)
    body = desk.bodies[0]
    assert (body["model"], body["temperature"], body["max_completion_tokens"]) == ("big", 0.7, 9)
    assert {headers["Authorization"] for headers in desk.headers} == {f"Bearer {KEY}"}
    assert KEY not in everything_in(folder) + said.out + said.err
    summary = read_json(folder / "summary.json")
    assert summary["failed"] == {"HTTP 400": 1}
    (entry,) = read_jsonl(folder / "data-ledger.jsonl")
    assert entry["reason"] == "no pair: no answer"
    assert entry["detail"] == "HTTP 400: status 400, your key was Bearer [key]"
    assert "1 requests were sent again (HTTP 500: 1)" in said.err
    card = (folder / "README.md").read_text()
    assert "Which weights the server ran" in card
    assert "| not answered: HTTP 400 | 1 |" in card


def test_a_key_in_the_recipe_is_refused_before_anything_is_written(
    conversations: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "out"
    command = ["pairs", "--prompts", str(conversations), "--output_dir", str(folder),
               "server.model=m"]  # fmt: skip
    for more, said in (
        ([f"server.key_variable={KEY}", "server.base_url=http://a/v1"], "no name of an environ"),
        ([f"server.base_url=http://me:{KEY}@a/v1"], "would be written into the run's files"),
        (["server.base_url=http://a/v1", "server.key_variable=NOT_SET_HERE"], "is not set"),
    ):
        assert main([*command, *more]) == 2
        shown = capfd.readouterr().err
        assert said in shown
        assert not folder.exists()


def test_a_server_that_falls_silent_stops_the_run_which_goes_on(
    conversations: Path, tmp_path: Path, desk: Desk
) -> None:
    served = {"server": {"base_url": desk.url, "model": "m", "retries": 0, "concurrency": 1}}
    folder = tmp_path / "out"
    desk.plan = {"*": [None] * 9 + [503] * 10}
    with pytest.raises(Stopped, match="10 requests in a row unanswered"):
        make(conversations, folder, **served)
    begun = len(desk.bodies)
    # How a server is asked may change between two starts.
    served["server"]["retries"] = 2
    served["server"]["concurrency"] = 4
    assert len(make(conversations, folder, **served)) == COUNT
    # A request may be repeated on a busy machine; what was recorded is not asked for again.
    assert COUNT - 9 <= len(desk.bodies) - begun < COUNT
    served["server"]["model"] = "other"
    with pytest.raises(UserError, match="other inputs"):
        make(conversations, folder, **served)


def test_recorded_answers_of_other_sampling_are_not_mixed(
    conversations: Path, tmp_path: Path, desk: Desk
) -> None:
    served = {"server": {"base_url": desk.url, "model": "m", "retries": 0, "concurrency": 1}}
    desk.plan = {"*": [None] * 9 + [503] * 10}
    with pytest.raises(Stopped):
        make(conversations, tmp_path / "out", **served)
    with pytest.raises(UserError, match="9 finished units of other prompts"):
        make(conversations, tmp_path / "out", temperature=0.5, **served)
    # Filters are no part of the generation.
    rows = make(conversations, tmp_path / "out", filters={"max_characters": 900}, **served)
    assert len(rows) == COUNT


@contextmanager
def killed_at_the_end(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Everything is generated and scored, and no pair is written."""

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(pairs_stage, "write_pairs", killed)
        with pytest.raises(KeyboardInterrupt):
            yield


def test_answers_of_two_dtypes_are_not_mixed(
    conversations: Path, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "out"
    with killed_at_the_end(monkeypatch):
        make(conversations, folder, tiny_model, dtype="float32")
    with pytest.raises(UserError, match=r"finished units of .* another model, dtype or device"):
        make(conversations, folder, tiny_model, dtype="bfloat16")
    made = make(conversations, folder, tiny_model, dtype="float32")
    with pytest.raises(UserError, match=r"computed.dtype: 'float32' -> 'bfloat16'"):
        make(conversations, folder, tiny_model, dtype="bfloat16")
    # On a CPU, auto is float32.
    assert make(conversations, folder, tiny_model) == made


def test_a_later_round_draws_anew_and_a_first_one_as_ever(
    conversations: Path, tmp_path: Path, tiny_model: Path
) -> None:
    """The same model and prompts: only the round differs, and each round repeats itself."""
    first = make(conversations, tmp_path / "1", tiny_model)
    second = make(conversations, tmp_path / "2", tiny_model, in_round=2)
    assert [row["question"] for row in first] == [row["question"] for row in second]
    same = [a["rejected"] == b["rejected"] for a, b in zip(first, second, strict=True)]
    assert sum(same) < COUNT // 4
    assert make(conversations, tmp_path / "again", tiny_model, in_round=2) == second
    inputs = [read_json(tmp_path / name / "manifest.json")["inputs"] for name in ("1", "2")]
    assert inputs[1] == inputs[0] | {"round": 2}
    with pytest.raises(UserError, match="round: 2 -> 3"):
        make(conversations, tmp_path / "2", tiny_model, in_round=3)


def test_rounds_share_the_prompts_and_leave_none(tmp_path: Path, desk: Desk) -> None:
    path = tmp_path / "q.jsonl"
    asked_twice = [f"Say {i % 9}." for i in range(12)]
    path.write_text("".join(json.dumps({"question": q, "answer": "x"}) + "\n" for q in asked_twice))
    served = {"server": {"base_url": desk.url, "model": "m"}, "parts": 3}
    parts = [
        [row["question"] for row in make(path, tmp_path / str(n), in_round=n, **served)]
        for n in (1, 2, 3)
    ]
    assert sorted(question for part in parts for question in part) == sorted(asked_twice)
    assert [len(set(part)) for part in parts] == [3, 3, 3]  # what is asked twice is in one part
    left_out = read_json(tmp_path / "1" / "summary.json")["left_out"]
    assert left_out == {"in the part of another round": 12 - len(parts[0])}
    assert parts[0] != asked_twice[: len(parts[0])]
    make(path, tmp_path / "whole", **served | {"parts": 1})
    with pytest.raises(UserError, match=r"part: None -> \[1, 4\]"):
        make(path, tmp_path / "whole", **served | {"parts": 4})
    with pytest.raises(UserError, match="9 different prompts cannot be divided into 10 parts"):
        make(path, tmp_path / "ten", **served | {"parts": 10})


def test_a_judge_that_scores_nothing_is_asked_again_by_the_same_command(
    conversations: Path, tmp_path: Path, tiny_model: Path, desk: Desk
) -> None:
    """Too few requests for a silence: yet no pairs are no mistake of the settings."""
    judge = {"base_url": desk.url, "model": "judge", "retries": 0}
    wish: dict[str, Any] = {
        "samples": 2, "rank": {"judge": judge}, "select": {"count": 3}, "console": QUIET,
    }  # fmt: skip
    desk.answer = lambda body: str(1 + len(asked(body)) % 10)
    desk.plan = {"*": [None] + [503] * 6}
    with pytest.raises(Stopped, match=r"none of 3 prompts got a pair .*6 requests are unanswered"):
        make(conversations, tmp_path / "out", tiny_model, **wish)
    assert make(conversations, tmp_path / "out", tiny_model, **wish)
    assert len(desk.bodies) == 1 + 6 + 6
    assert all("Rate the answer" in asked(body) for body in desk.bodies)


def test_what_a_server_answers_has_no_dtype(
    conversations: Path, tmp_path: Path, desk: Desk
) -> None:
    served = {"server": {"base_url": desk.url, "model": "m"}}
    make(conversations, tmp_path / "out", dtype="float32", **served)
    make(conversations, tmp_path / "out", dtype="bfloat16", **served)
    assert len(desk.bodies) == COUNT


def test_prompts_whose_own_answer_is_a_refusal_are_not_asked(tmp_path: Path, desk: Desk) -> None:
    refusals = {1, 4, 5}
    path = tmp_path / "q.jsonl"
    path.write_text("".join(
        json.dumps({"question": f"Say {i}.", "answer": "I'm sorry, but I can't." if i in refusals
                    else f"{i}!"}) + "\n"
        for i in range(8)
    ))  # fmt: skip
    served = {"base_url": desk.url, "model": "m"}
    wish: dict[str, Any] = {"server": served, "filters": {"drop_refusals": True}}
    said = StringIO()
    rows = make(
        path, tmp_path / "a", console=Console(file=said, width=200), select={"count": 5},
        heldout=(DataSource(path=str(path)),), **wish,
    )  # fmt: skip
    # The sample is of those that can become pairs.
    assert [row["question"] for row in rows] == [f"Say {i}." for i in (0, 2, 3, 6, 7)]
    assert len(read_jsonl(tmp_path / "a" / "heldout.jsonl")) == 5
    assert not any(asked(body) == f"Say {i}." for body in desk.bodies for i in refusals)
    ledger = read_jsonl(tmp_path / "a" / "data-ledger.jsonl")
    assert [entry["row"] for entry in ledger] == [2, 5, 6] * 2
    assert {entry["reason"] for entry in ledger} == {"its own answer is a refusal"}
    for what in ("prompts selected", "held-out prompts"):
        assert f"pairs: 5 {what}; left out: 3 its own answer is a refusal\n" in said.getvalue()
    assert "| its own answer is a refusal | 6 |" in (tmp_path / "a" / "README.md").read_text()
    # Where nothing is chosen but what a model wrote, the set's answer plays no part.
    desk.answer = lambda body: "7" if "[Answer]" in asked(body) else "An answer."
    with pytest.raises(UserError, match="none of 8 prompts"):
        make(path, tmp_path / "b", samples=2, rank={"judge": served}, **wish)
    path.write_text(path.read_text().splitlines()[1] + "\n")
    with pytest.raises(UserError, match=r"no prompt is left \(1 its own answer is a refusal\)"):
        make(path, tmp_path / "c", **wish)


def test_evaluation_sets_of_any_layout_are_looked_in(
    tmp_path: Path, desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    passages = ["".join(f"{name}{i} " for i in range(60)) for name in "abcd"]
    path = tmp_path / "q.jsonl"
    path.write_text("".join(
        json.dumps({"question": f"So: {passage}?", "answer": "Yes."}) + "\n"
        for passage in passages
    ))  # fmt: skip
    (tmp_path / "lines.txt.bz2").write_bytes(bz2.compress(f"one\n{passages[0]}\n".encode()))
    (tmp_path / "table.csv").write_text(f"id,text\n1,{passages[2]}\n")
    wish: dict[str, Any] = {"server": {"base_url": desk.url, "model": "m"}}
    sets = [str(tmp_path / name) for name in ("lines.txt.bz2", "table.csv")]
    said = StringIO()
    select = {"decontaminate": [{"path": name} for name in sets]}
    rows = make(path, tmp_path / "out", console=Console(file=said), select=select, **wish)
    assert [row["question"][4] for row in rows] == ["b", "d"]
    assert "2 in an evaluation set" in said.getvalue()
    assert "is looked for" not in said.getvalue()
    monkeypatch.setattr(contamination, "_MOST_RUNS", 50)
    rows = make(path, tmp_path / "b", console=Console(file=said, width=300), select=select, **wish)
    assert [row["question"][4] for row in rows] == ["b", "d"]
    assert "runs of 13 words, one in 2 is looked for" in said.getvalue()
    (tmp_path / "bad.jsonl").write_text('{"a": "b"}\n{')
    select = {"decontaminate": [{"path": str(tmp_path / "bad.jsonl")}]}
    with pytest.raises(UserError, match=r"bad.jsonl, row 2: .*decontaminate needs every row"):
        make(path, tmp_path / "c", select=select, **wish)


def test_a_judge_ranks_the_answers_of_one_model(
    conversations: Path, tmp_path: Path, tiny_model: Path, desk: Desk
) -> None:
    def verdict(body: dict[str, Any]) -> str:
        answer = asked(body).split("[Answer]\n")[1].split("\n\n[End")[0]
        return "no idea" if "z" in answer else str(1 + len(answer) % 10)

    desk.answer = verdict
    rank = {"judge": {"base_url": desk.url, "model": "judge"}, "margin": 1}
    folder = tmp_path / "out"
    rows = make(conversations, folder, tiny_model, samples=3, rank=rank)
    found = {
        number: value[0].strip()
        for line in read_jsonl(folder / "generated" / "pairs.jsonl")[1:]
        for number, value in line["unit"]
    }
    expected = []
    for i in range(COUNT):
        texts = [found[n] for n in range(3 * i, 3 * i + 3) if found[n] and "z" not in found[n]]
        texts.sort(key=lambda text: len(text) % 10)
        if len(texts) > 1 and len(texts[-1]) % 10 - len(texts[0]) % 10 > 1:
            expected.append((len(texts[-1]) % 10, len(texts[0]) % 10))
    assert [(len(r["chosen"]) % 10, len(r["rejected"]) % 10) for r in rows] == expected
    assert 0 < len(rows) < COUNT
    dropped = read_json(folder / "summary.json")["dropped"]
    assert dropped["not scored: unreadable verdict"] == sum("z" in text for text in found.values())
    assert dropped["scores too close"] > 0
    details = {entry["detail"] for entry in read_jsonl(folder / "data-ledger.jsonl")}
    assert details == {"", "unreadable verdict: no idea"}
    assert "Both answers were written by one model" in (folder / "README.md").read_text()


def test_a_score_is_of_the_text_that_was_scored(
    conversations: Path, tmp_path: Path, desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    turn = [""]

    def says(body: dict[str, Any]) -> str:
        """An answer ends with a number of its own; the judge reads it."""
        if "[Answer]" not in asked(body):
            number = 1 + sum(asked(body) == asked(other) for other in desk.bodies) % 3
            return f"{turn[0]} {number}"
        answer = asked(body).split("[Answer]\n")[1].split("\n\n[End")[0]
        if answer != rankers.TRIAL[1]:
            scored.append(answer)
        return answer.split()[-1]

    scored: list[str] = []
    desk.answer = says
    served = {"base_url": desk.url, "model": "m", "concurrency": 1}
    wish: dict[str, Any] = {"samples": 3, "server": served, "rank": {"judge": served, "margin": 1}}
    folder = tmp_path / "out"
    turn[0] = "first"
    with killed_at_the_end(monkeypatch):
        make(conversations, folder, **wish)
    assert len(scored) == 3 * COUNT
    with killed_at_the_end(monkeypatch):
        make(conversations, folder, **wish)
    assert len(scored) == 3 * COUNT
    # The way out of a damaged file of answers is to remove it; those that come then are others.
    (folder / "generated" / "pairs.jsonl").unlink()
    turn[0] = "second"
    rows = make(conversations, folder, **wish)
    assert len(scored) == 6 * COUNT
    assert len(set(scored)) == 6
    assert {(row["chosen"], row["rejected"]) for row in rows} == {("second 3", "second 1")}
    # Another question is another scale.
    with killed_at_the_end(monkeypatch):
        make(conversations, tmp_path / "b", **wish)
    monkeypatch.setattr(rankers, "QUESTION", "Is it good?")
    with pytest.raises(UserError, match="finished units"):
        make(conversations, tmp_path / "b", **wish)
    with pytest.raises(UserError, match=r"scorer\.question"):
        make(conversations, folder, **wish)


def test_a_reward_model_ranks_as_it_does_alone(
    conversations: Path, tmp_path: Path, tiny_model: Path
) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    reward = tmp_path / "reward"
    torch.manual_seed(3)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    model = AutoModelForSequenceClassification.from_pretrained(
        tiny_model, num_labels=1, pad_token_id=0
    )
    model.save_pretrained(reward)
    tokenizer.save_pretrained(reward)
    wish: dict[str, Any] = {"samples": 3, "rank": {"reward_model": str(reward)}}
    with pytest.raises(UserError, match="has no chat template"):
        make(conversations, tmp_path / "none", tiny_model, **wish)
    tokenizer.chat_template = "{% for m in messages %}<s>{{ m.content }}</s>{% endfor %}"
    tokenizer.save_pretrained(reward)
    rows = make(conversations, tmp_path / "out", tiny_model, **wish)
    assert len(rows) == COUNT

    def score(row: dict[str, Any], answer: str) -> float:
        ids = tokenizer(f"<s>{row['question']}</s><s>{answer}</s>", return_tensors="pt")
        with torch.no_grad():
            return float(model.eval()(input_ids=ids["input_ids"]).logits)

    assert all(score(row, row["chosen"]) > score(row, row["rejected"]) for row in rows)
    scores = {
        number: value
        for line in read_jsonl(tmp_path / "out" / "generated" / "pairs-scores.jsonl")[1:]
        for number, (value, _) in line["unit"]
    }
    assert score(rows[5], rows[5]["chosen"]) == pytest.approx(
        max(scores[n] for n in (15, 16, 17)), abs=1e-5
    )
    with pytest.raises(UserError, match="no reward model"):
        make(conversations, tmp_path / "two", tiny_model, samples=2,
             rank={"reward_model": str(tiny_model)})  # fmt: skip


DEAF = (
    "<s>{% for m in messages if m.role != 'system' %}{{ m.role }}: {{ m.content }}</s>{% endfor %}"
)
OMITTED = "the chat template does not render the system turn"


def test_prompts_that_lose_their_system_turn_are_neither_asked_nor_ranked(
    tmp_path: Path, tiny_model: Path
) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    rows = [{"prompt": f"say {i}", "completion": "red", "system": "S" * (i % 2)} for i in range(6)]
    data = tmp_path / "set.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    deaf = shutil.copytree(tiny_model, tmp_path / "deaf")
    tokenizer = AutoTokenizer.from_pretrained(deaf)
    tokenizer.chat_template = DEAF
    tokenizer.save_pretrained(deaf)
    out = StringIO()
    made = make(data, tmp_path / "out", deaf, console=Console(file=out, width=500))
    assert [row["question"] for row in made] == ["say 0", "say 2", "say 4"]
    assert f"3 of 6 prompts are not asked: {OMITTED} (each in " in out.getvalue()
    entries = read_jsonl(tmp_path / "out" / "data-ledger.jsonl")
    assert [(one["row"], one["reason"]) for one in entries] == [(n, OMITTED) for n in (2, 4, 6)]
    data.write_text(json.dumps(rows[1]) + "\n")
    with pytest.raises(UserError, match=rf"none of 1 prompts .*{OMITTED}: 1\. Choose another `cha"):
        make(data, tmp_path / "none", deaf)

    reward = shutil.copytree(deaf, tmp_path / "reward")
    AutoModelForSequenceClassification.from_pretrained(
        tiny_model, num_labels=1, pad_token_id=0
    ).save_pretrained(reward)
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    make(data, tmp_path / "ranked", tiny_model, samples=2, rank={"reward_model": str(reward)})
    summary = read_json(tmp_path / "ranked" / "summary.json")
    assert f"not scored: {OMITTED}" in json.dumps(summary)


@pytest.mark.parametrize("name", ["my set #2.jsonl", "1", "null", "a: b", "[x]", "\u00e9 'q' 😀"])
def test_a_flag_is_taken_by_the_letter(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--prompts", name, "--model", f"{name} model", "--output_dir", str(tmp_path / "out")]
    assert main(["pairs", *flags, "--seed", "7", "--dry-run"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["pairs"]["prompts"][0]["path"] == name
    assert shown["pairs"]["model"] == f"{name} model"
    assert shown["seed"] == 7


def test_parquet_holds_what_json_lines_hold(
    conversations: Path, tmp_path: Path, tiny_model: Path
) -> None:
    import pyarrow.parquet

    heldout = (DataSource(path=str(conversations)),)
    rows = make(conversations, tmp_path / "a", tiny_model, heldout=heldout)
    make(conversations, tmp_path / "b", tiny_model, heldout=heldout, format="parquet")
    for name in ("pairs", "heldout"):
        table = pyarrow.parquet.read_table(tmp_path / "b" / f"{name}.parquet")
        assert table.to_pylist() == read_jsonl(tmp_path / "a" / f"{name}.jsonl")
        assert not (tmp_path / "b" / f"{name}.jsonl").exists()
    assert len(rows) == COUNT
    from tandem.data.ledger import Ledger
    from tandem.data.read_records import read_pairs

    read = list(read_pairs([DataSource(path=str(tmp_path / "b" / "pairs.parquet"))], Ledger()))
    assert [pair.rejected for pair in read] == [row["rejected"] for row in rows]


def test_vllm_is_asked_for_when_it_is_named(
    conversations: Path, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in with the part of vLLM's interface that is used; vLLM itself was not here."""
    with pytest.raises(UserError, match=r"needs the package vllm, .*pip install '.\[vllm\]'"):
        make(conversations, tmp_path / "out", tiny_model, vllm={})
    made: list[dict[str, Any]] = []
    called: list[tuple[Any, Any]] = []

    class LLM:
        def __init__(self, **options: Any) -> None:
            made.append(options)

        def generate(self, prompts: Any, params: Any, *, use_tqdm: bool) -> list[Any]:
            called.append((prompts, params))
            return [
                SimpleNamespace(outputs=[SimpleNamespace(
                    token_ids=[*one["prompt_token_ids"][6:9], 1], finish_reason="stop")])
                for one in prompts
            ]  # fmt: skip

    library = ModuleType("vllm")
    library.LLM = LLM  # type: ignore[attr-defined]
    library.SamplingParams = lambda **options: options  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", library)
    real = importlib.metadata.version
    monkeypatch.setattr(
        "importlib.metadata.version", lambda name: "0" if name == "vllm" else real(name)
    )
    monkeypatch.setattr(generators, "_VLLM_PROMPTS", 10)
    rows = make(conversations, tmp_path / "out", tiny_model, vllm={"memory": 0.5}, top_k=3)
    assert len(rows) == COUNT
    assert made == [{"model": str(tiny_model), "tokenizer": str(tiny_model), "dtype": "auto",
                     "tensor_parallel_size": 1, "gpu_memory_utilization": 0.5}]  # fmt: skip
    assert [len(prompts) for prompts, _ in called] == [10, 10, 4]
    params = [one for _, some in called for one in some]
    assert len({one["seed"] for one in params}) == COUNT
    assert params[0] == {"max_tokens": 6, "temperature": 1.0, "top_p": 1.0, "top_k": 3,
                         "seed": params[0]["seed"], "stop_token_ids": [1],
                         "detokenize": False}  # fmt: skip
    assert read_json(tmp_path / "out" / "summary.json")["writer"]["by"] == "vLLM"


def test_what_is_left_out_is_said_counted_and_in_the_card(
    conversations: Path, tmp_path: Path, tiny_model: Path
) -> None:
    check = tmp_path / "mine.py"
    check.write_text("def f(pair):\n    return 'odd' if len(pair['rejected']) % 2 else True\n")
    evaluation = tmp_path / "evaluation.jsonl"
    evaluation.write_text('{"query": "one two three four five"}\n')
    console = Console(record=True, width=1000, file=(tmp_path / "said.txt").open("w"))
    rows = make(
        conversations, tmp_path / "out", tiny_model, console=console,
        select={"count": 15, "distinct": False, "max_answer_characters": 25,
                "decontaminate": (DataSource(path=str(evaluation)),)},
        filters={"check": f"{check}:f"},
    )  # fmt: skip
    console.file.close()
    summary = read_json(tmp_path / "out" / "summary.json")
    ledger = summary["ledger"]
    assert (ledger["read"], ledger["trained"]) == (15, len(rows))
    assert summary["dropped"] == {"check: odd": 15 - len(rows)}
    assert 0 < len(rows) < 15
    assert all(len(row["rejected"]) % 2 == 0 for row in rows)
    left_out = summary["left_out"]
    assert sum(left_out.values()) == COUNT - 15
    said = console.export_text()
    card = (tmp_path / "out" / "README.md").read_text()
    for reason, count in left_out.items():
        assert f"{count} {reason}" in said
        assert f"| {reason} | {count} |" in card
    assert f"| passed over: check: odd | {15 - len(rows)} |" in card
    assert f"| pairs | {len(rows)} |" in card
    assert str(tmp_path) not in card
    entries = read_jsonl(tmp_path / "out" / "data-ledger.jsonl")
    assert {entry["reason"] for entry in entries} == {"no pair: check: odd"}


def test_an_unparsable_line_stops_or_is_dropped(
    conversations: Path, tmp_path: Path, tiny_model: Path
) -> None:
    conversations.write_text(conversations.read_text() + "no json\n")
    with pytest.raises(UserError, match=r"set.jsonl, row 25: .*on_bad_record: drop"):
        make(conversations, tmp_path / "out", tiny_model)
    assert len(make(conversations, tmp_path / "out", tiny_model, on_bad_record="drop")) == COUNT
    (entry,) = read_jsonl(tmp_path / "out" / "data-ledger.jsonl")
    assert (entry["row"], entry["reason"]) == (25, "unparsable")


def test_a_selection_that_leaves_nothing_says_what_took_it(
    conversations: Path, tmp_path: Path, tiny_model: Path
) -> None:
    with pytest.raises(UserError, match=r"no prompt is left .24 prompt does not match"):
        make(conversations, tmp_path / "out", tiny_model, select={"matches": "nothing like it"})
    with pytest.raises(UserError, match=r"none of 24 prompts got a pair .*too long"):
        make(conversations, tmp_path / "out", tiny_model, filters={"max_characters": 1})


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["select.count=0"], "pairs.select.count"),
        (["select.matches='('"], "is no regular expression"),
        (["select.stratify=source"], "set count as well"),
        (["select.min_prompt_characters=9", "select.max_prompt_characters=3"], "exceeds"),
        (["select.language=xx"], "pairs.select.language"),
        (["filters.max_similarity=1.5"], "pairs.filters.max_similarity"),
        (["filters.refusals=true"], "did you mean pairs.filters.drop_refusals"),
        (["rank.margin=1", "samples=2"], "set one of reward_model and judge"),
        (["rank.reward_model=x"], "set samples to 2 or more"),
        (["temperature=0", "samples=2"], "draws the same answer"),
        (["temperature=0", "top_p=0.5"], "cannot act at temperature 0"),
        (["server.base_url=http://a/v1", "server.model=m"], "server and model are both set"),
        (["server.base_url=a/v1", "server.model=m"], "no address of a server"),
        (["filters.check=nowhere.py:f"], "there is no file nowhere.py"),
        (["format=csv"], "pairs.format"),
        (["prompts=nowhere.jsonl"], "nowhere.jsonl"),
        (["select.decontaminate=nowhere.jsonl"], "nowhere.jsonl"),
    ],
)
def test_a_wrong_setting_is_refused_before_anything_is_written(
    overrides: list[str], said: str, conversations: Path, tmp_path: Path, tiny_model: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    code = main([
        "pairs", "--prompts", str(conversations), "--model", str(tiny_model), "--output_dir",
        str(tmp_path / "out"), *overrides,
    ])  # fmt: skip
    shown = capfd.readouterr().err
    assert (code, said in shown) == (2, True), shown
    assert not (tmp_path / "out").exists()


def test_the_command_begins_with_a_recipe_or_with_nothing(
    conversations: Path, tmp_path: Path, tiny_model: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = ["--output_dir", str(tmp_path / "out")]
    assert main(["pairs", *out]) == 2
    assert "pairs.prompts is missing" in capfd.readouterr().err
    assert main(["pairs", *out, "--prompts", str(conversations)]) == 2
    assert "no model writes the rejected answers" in capfd.readouterr().err
    assert main(["pairs", *out, "--recipe", "demo"]) == 2
    assert "no model writes the rejected answers" in capfd.readouterr().err
    recipe = tmp_path / "r.yaml"
    recipe.write_text(json.dumps({
        "name": "r", "model": str(tiny_model), "output_dir": "unused", "seed": 9,
        "pairs": {"prompts": str(conversations), "max_new_tokens": 4},
    }))  # fmt: skip
    command = ["pairs", *out, "--recipe", str(recipe), "samples=2"]
    assert main([*command, "--dry-run"]) == 0
    shown = capfd.readouterr().out
    assert "seed: 9" in shown
    assert "samples: 2" in shown
    assert not (tmp_path / "out").exists()
    assert main(command) == 0
    assert len(read_jsonl(tmp_path / "out" / "pairs.jsonl")) == COUNT
    capfd.readouterr()
    assert main(command) == 0
    assert "finished with these inputs" in capfd.readouterr().err
