"""Calls as stages: recognised, resumed, refused, and equal to those of the command line."""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

import tandem
from tandem.cli.main import main
from tandem.errors import Stopped, UserError
from tandem.recipe.load_recipe import load_recipe
from tandem.storage.atomic_files import read_json

from ..stages.made_inputs import make_conversations, make_model_folder, make_pairs

SETTINGS: dict[str, Any] = {
    "max_length": 250, "batch_size": 4, "device": "cpu", "chat_template": "neural-chat",
    "logging_steps": 1, "quiet": True,
}  # fmt: skip
LORA = tandem.LoRA(r=2)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder to work in, with a tiny model, conversations, pairs and a cache."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("home")
        patch.chdir(folder)
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        patch.delenv("WORLD_SIZE", raising=False)
        make_model_folder(folder / "model")
        make_conversations(folder / "talks.jsonl")
        make_pairs(folder / "pairs.jsonl")
        yield folder


@pytest.fixture(scope="module")
def sft(home: Path) -> tandem.Result:
    return tandem.sft("model", "talks.jsonl", max_steps=2, lora=LORA, **SETTINGS)


def _dpo(model: Any, data: Any = "pairs.jsonl", **settings: Any) -> tandem.Result:
    own = {key: value for key, value in SETTINGS.items() if key != "chat_template"}
    return tandem.dpo(model, data, **{"max_steps": 2, "lora": LORA, **own, **settings})


def _weights(result: tandem.Result) -> bytes:
    return (result.folder / "adapter_model.safetensors").read_bytes()


def _made(result: tandem.Result) -> str:
    """When a stage was finished."""
    return str(read_json(result.folder / "manifest.json")["finished_at"])


def test_a_value_is_a_folder_of_its_own_and_the_same_one_is_recognised(
    sft: tandem.Result,
) -> None:
    again = tandem.sft(
        Path("model"), {"path": "talks.jsonl"}, num_train_epochs=None, max_steps=2,
        lora=LORA, save_steps=1, **SETTINGS,
    )  # fmt: skip
    assert again.folder == sft.folder
    assert sft.folder.parent.name.startswith("model-sft-talks-")
    assert _made(again) == _made(sft)
    # What is refused tells the folder it would have had, and trains nothing.
    other = tandem.sft("model", "talks.jsonl", max_steps=1, lora=LORA, **SETTINGS)
    assert other.folder != sft.folder
    with pytest.raises(UserError, match=r"settings.max_steps: 2 -> 3"):
        tandem.sft(
            "model", "talks.jsonl", max_steps=3, lora=LORA,
            output_dir=sft.run_folder, **SETTINGS,
        )  # fmt: skip


def test_changed_data_is_another_folder(sft: tandem.Result, home: Path) -> None:
    text = (home / "talks.jsonl").read_text()
    try:
        (home / "talks.jsonl").write_text(text.replace("say", "tell"))
        changed = tandem.sft("model", "talks.jsonl", max_steps=1, lora=LORA, **SETTINGS)
    finally:
        (home / "talks.jsonl").write_text(text)
    assert changed.folder != sft.folder


def test_rows_are_the_same_data_wherever_they_come_from(sft: tandem.Result, home: Path) -> None:
    import datasets

    rows = [json.loads(line) for line in (home / "pairs.jsonl").read_text().splitlines()]
    first = _dpo(sft.merge(), rows)
    second = _dpo(sft.merge(), datasets.Dataset.from_list(rows))
    assert (second, _made(second)) == (first, _made(first))
    (written,) = (first.run_folder / "data").iterdir()
    assert written.read_text() == (home / "pairs.jsonl").read_text()
    of_file = _dpo(sft.merge())
    assert _weights(of_file) == _weights(first)
    assert _dpo(sft.merge(), rows[:-1], max_steps=1).folder != first.folder
    # Rows that were changed on disk are written anew, and the stage is still what it was.
    written.write_text("{}\n")
    assert _made(_dpo(sft.merge(), rows)) == _made(first)
    assert written.read_text() == (home / "pairs.jsonl").read_text()


NO_DATA: tuple[tuple[Any, str], ...] = (
    ([], "the data is empty"),
    ([{"a": 1}, "b"], "row 1 of the data is a str; a row is a dict, such as"),
    (["talks.jsonl", 3], "the data is a int; give a path"),
    ({"a": 1}, "the data is a dict; give a path"),
    ([{"a": float("nan")}], "row 0 of the data cannot be written as JSON"),
    ([{"a": 1}, {"a": b"x"}], "row 1 of the data cannot be written as JSON: Object of type bytes"),
    (iter([{"a": 1}]), "the data is a list_iterator; give a path, a Hub id, a list of dicts"),
    (({"a": one} for one in range(2)), "or a datasets.Dataset; give list(data)"),
    (tandem.source([{"a": 1}], split="test"), "split, subset and revision are for data that has"),
    ([{"a": 1}], "rows-"),  # the readers' own message, which names the file that is gone again
)


@pytest.mark.parametrize(("data", "says"), NO_DATA, ids=range(len(NO_DATA)))
def test_what_is_no_data_is_refused(home: Path, data: Any, says: str) -> None:
    before = set((home / "runs").rglob("*"))
    with pytest.raises(UserError) as caught:
        tandem.sft("model", data, max_steps=1, **SETTINGS)
    assert says in str(caught.value)
    assert set((home / "runs").rglob("*")) == before


def test_several_splits_and_streams_are_refused_with_a_way_out(home: Path) -> None:
    import datasets

    data = datasets.Dataset.from_list([{"question": "a", "answer": "b"}])
    with pytest.raises(UserError, match=r"with the splits train, test; give one of them.*'train'"):
        tandem.sft("model", datasets.DatasetDict(train=data, test=data), **SETTINGS)
    with pytest.raises(UserError, match=r"is a IterableDataset, whose rows .*Dataset\.from_list"):
        tandem.sft("model", data.to_iterable_dataset(), **SETTINGS)
    with pytest.raises(UserError, match=r"has no setting wieght\. Did you mean 'weight'"):
        tandem.source(data, wieght=2)


def test_the_recipe_of_a_result_is_the_run_of_the_command(
    sft: tandem.Result, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = _dpo(sft.merge(), beta=0.3).save_recipe("again.yaml")
    assert load_recipe(str(path)) == _dpo(sft.merge(), beta=0.3).recipe
    assert main(["run", str(path), "--until", "dpo"]) == 0
    assert "4-dpo is finished with these inputs; nothing to do" in capsys.readouterr().err
    # Elsewhere it does the same.
    assert main(["run", str(path), "--until", "dpo", "output_dir=elsewhere"]) == 0
    there = home / "elsewhere" / "4-dpo" / "adapter_model.safetensors"
    assert there.read_bytes() == _weights(_dpo(sft.merge(), beta=0.3))


def test_a_stage_in_the_same_folder_becomes_a_part_of_the_run(sft: tandem.Result) -> None:
    place = {"output_dir": sft.run_folder}
    with pytest.raises(UserError, match=r"dpo\(\): seed is 42 in the run .*; leave seed out"):
        _dpo(sft.merge(), seed=3, **place)
    dpo = _dpo(sft.merge(), **place)
    assert (dpo.recipe.sft, dpo.recipe.model) == (sft.recipe.sft, "model")
    with pytest.raises(UserError, match=r"merge\(\): dtype is auto in the run"):
        dpo.merge(dtype="bfloat16")
    with pytest.raises(UserError, match="is a whole model already; leave dtype out"):
        sft.merge().merge(dtype="bfloat16")
    with pytest.raises(UserError, match=r"is an adapter, .*Give RESULT\.merge\(\)"):
        _dpo(sft)
    on = tandem.sft("model", "talks.jsonl", max_steps=1, lora=tandem.LoRA(start=sft), **SETTINGS)
    assert on.settings.lora.start == str(sft.folder)


def test_all_weights_leave_a_whole_model(home: Path) -> None:
    full = tandem.sft("model", "talks.jsonl", max_steps=1, full=True, **SETTINGS)
    assert (full.merge(), full.adapter, full.model) == (full, None, full.folder)
    assert isinstance(full.generate("say red", max_new_tokens=3), str)
    with pytest.raises(UserError, match=r"sft\(\): lora has no effect with full: true"):
        tandem.sft("model", "talks.jsonl", full=True, lora=LORA, **SETTINGS)


def test_held_out_rows_are_scored(home: Path) -> None:
    rows = [json.loads(line) for line in (home / "talks.jsonl").read_text().splitlines()]
    result = tandem.sft(
        "model", rows[4:], validation={"data": rows[:4], "steps": 1}, max_steps=1, lora=LORA,
        **SETTINGS,
    )  # fmt: skip
    assert [line["step"] for line in result.validation] == [0, 1]
    assert result.summary["validation"]["records"] == 4


GAMMA = 1.0


def own(chosen: tandem.AnswerLogps, rejected: tandem.AnswerLogps, *, beta: float) -> Tensor:
    return -logsigmoid(beta * GAMMA * (chosen.ratio - rejected.ratio))


def test_a_loss_is_known_by_its_text_and_by_what_it_uses(
    sft: tandem.Result, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, theirs = _dpo(sft.merge(), loss=own), _dpo(sft.merge())
    assert _weights(mine) == _weights(theirs)
    assert [one["loss"] for one in mine.metrics] == [one["loss"] for one in theirs.metrics]
    assert _dpo(sft.merge(), loss={own: 2.0, "sft": 0.1}).recipe.dpo is not None
    # The same function of a file, by its name: `tandem run` finds the stage of the notebook.
    monkeypatch.syspath_prepend(home)
    (home / "my_losses.py").write_text(
        "from torch.nn.functional import logsigmoid\nGAMMA = 1.0\n"
        + _source_of(own).replace("tandem.AnswerLogps", "object").replace("Tensor", "object")
    )
    import my_losses  # type: ignore[import-not-found]

    try:
        given = _dpo(sft.merge(), loss=my_losses.own)
        folder, finished = given.run_folder, _made(given)
        named = _dpo(sft.merge(), loss="my_losses:own", output_dir=folder)
        assert (_made(named), _weights(named)) == (finished, _weights(theirs))
        monkeypatch.setattr(my_losses, "GAMMA", 2.0)
        with pytest.raises(UserError, match=r"settings\.loss: 'own \w{16}' -> 'own \w{16}'"):
            _dpo(sft.merge(), loss=my_losses.own, output_dir=folder)
        assert _dpo(sft.merge(), loss=my_losses.own).folder != given.folder
    finally:
        del sys.modules["my_losses"]


def _source_of(function: Any) -> str:
    import inspect

    return inspect.getsource(function)


def test_the_recipe_of_a_notebooks_loss_says_what_to_do(
    sft: tandem.Result, capsys: pytest.CaptureFixture[str]
) -> None:
    cell = ModuleType("__main__")
    as_of_a_notebook = FunctionType(own.__code__, own.__globals__, "own")
    as_of_a_notebook.__kwdefaults__ = None
    as_of_a_notebook.__module__ = cell.__name__
    result = _dpo(sft.merge(), loss=as_of_a_notebook)
    first = result.recipe_yaml.splitlines()[:2]
    assert first[0].startswith("# __main__:own is a function of a script or notebook")
    assert first[1] == "# and write my_losses:own here."
    from tandem.losses import custom

    custom._given.pop("__main__:own")
    assert main(["run", str(result.save_recipe("own.yaml")), "--until", "dpo"]) == 2
    assert "loss: __main__:own is a function of a script" in capsys.readouterr().err


def _raises(chosen: Any, rejected: Any) -> Any:
    raise ZeroDivisionError("no reason")


def _summed(chosen: Any, rejected: Any) -> Any:
    return (chosen.ratio - rejected.ratio).sum()


def _nan(chosen: Any, rejected: Any) -> Any:
    return (chosen.ratio - rejected.ratio) * float("nan")


def _constant(chosen: Any, rejected: Any) -> Any:
    return torch.zeros_like(chosen.policy)


def _number(chosen: Any, rejected: Any) -> Any:
    return 1.0


def _infinite_gradient(chosen: Any, rejected: Any) -> Any:
    return (chosen.ratio - chosen.ratio.detach()).abs().sqrt()


def _asks(chosen: Any, rejected: Any, *, gamma: float) -> Any:
    return gamma * chosen.ratio


def _unpaired(answer: Any) -> Any:
    return answer.ratio


def _without_beta(chosen: Any, rejected: Any) -> Any:
    return rejected.ratio - chosen.ratio


WRONG_LOSSES: tuple[tuple[Any, str], ...] = (
    (_raises, r":_raises raised ZeroDivisionError: no reason \(line \d+ of test_stages.py\)"),
    (_summed, r":_summed returned the shape \[\] for 3 pairs; it must return one loss of each"),
    (_nan, r":_nan returned a loss that is not finite"),
    (_constant, r":_constant returned a loss without a gradient"),
    (_number, r":_number returned float; it must return a tensor"),
    (_infinite_gradient, r"_infinite_gradient has a gradient that is not finite"),
    (_asks, r":_asks asks for gamma, which is no setting of a loss; give it a default"),
    (_unpaired, r":_unpaired takes 1 arguments, and is called with two"),
    (_without_beta, r"beta has no effect with loss .*:_without_beta; remove it"),
    (lambda chosen, rejected: chosen.ratio, "<lambda> is no function with a name"),
    ("no_such_module:loss", "loss: there is no module no_such_module"),
    ("my losses:loss", "'my losses:loss' names no function; write it as module:function"),
    ({own: 1.0, "kto": 1.0}, r"are losses of different things, and cannot be mixed"),
)


@pytest.mark.parametrize(("loss", "says"), WRONG_LOSSES, ids=range(len(WRONG_LOSSES)))
def test_a_loss_that_cannot_be_is_refused_before_anything_is_computed(
    sft: tandem.Result, home: Path, loss: Any, says: str
) -> None:
    before = set((home / "runs").glob("*/4-dpo"))
    with pytest.raises(UserError, match=says):
        _dpo(sft.merge(), loss=loss, beta=0.7 if loss is _without_beta else 0.1)
    assert set((home / "runs").glob("*/4-dpo")) == before


def test_a_recipe_that_names_a_function_is_read_without_it(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (home / "unread.py").write_text("raise SystemExit('imported')\n")
    assert main(["run", "demo", "dpo.loss=unread:loss", "--dry-run"]) == 0
    assert "  loss: unread:loss\n" in capsys.readouterr().out
    assert main(["run", "demo", "dpo.loss=none_such:loss", "output_dir=nothing"]) == 2
    assert "loss: there is no module none_such" in capsys.readouterr().err
    assert not (home / "nothing").exists()


def test_a_loss_that_depends_on_variables_around_it_is_refused(sft: tandem.Result) -> None:
    gamma = 0.5

    def around(chosen: Any, rejected: Any) -> Any:
        return gamma * (rejected.ratio - chosen.ratio)

    with pytest.raises(UserError, match=r"uses variables of the function around it \(gamma\)"):
        _dpo(sft.merge(), loss=around)


def test_a_loss_without_a_reference_has_no_reference_pass(sft: tandem.Result) -> None:
    @tandem.custom_loss(reference=False)
    def likelihood(chosen: Any, rejected: Any) -> Any:
        return rejected.mean - chosen.mean

    result = _dpo(sft.merge(), loss=likelihood)
    assert result.summary["reference_seconds"] == 0
    assert "rewards/margins" in result.metrics[0]
    assert "rewards/chosen" not in result.metrics[0]


def test_ctrl_c_ends_with_a_checkpoint_and_the_same_call_goes_on(home: Path) -> None:
    whole = tandem.sft("model", "talks.jsonl", max_steps=3, lora=LORA, **SETTINGS)
    place = {"output_dir": "stopped"}

    def interrupt(line: Any) -> None:
        if line["step"] == 2:
            os.kill(os.getpid(), signal.SIGINT)

    call = {"max_steps": 3, "lora": LORA, **place, **SETTINGS}
    with pytest.raises(Stopped, match="stopped after step 2 of 3; a checkpoint is written") as stop:
        tandem.sft("model", "talks.jsonl", on_step=interrupt, **call)
    assert stop.value._render_traceback_() == [f"Stopped: {stop.value}"]
    seen: list[float] = []
    resumed = tandem.sft("model", "talks.jsonl", on_step=lambda m: seen.append(m["step"]), **call)
    assert (seen, _weights(resumed)) == ([3], _weights(whole))


def test_nothing_of_a_model_stays_in_memory(sft: tandem.Result, home: Path) -> None:
    """After a call there is no model; after `generate` there is one, until the next stage."""

    def weights() -> int:
        gc.collect()
        return sum(issubclass(type(one), torch.nn.Module) for one in gc.get_objects())

    make_model_folder(home / "other", dtype=torch.bfloat16)
    before = weights()
    tandem.sft("other", "talks.jsonl", max_steps=1, lora=LORA, **SETTINGS).merge()
    answers = sft.generate(["say red", "say blue"], max_new_tokens=3)
    assert len(answers) == 2
    assert answers[0] == sft.generate([{"role": "user", "content": "say red"}], max_new_tokens=3)
    assert weights() > before
    _dpo(sft.merge(), beta=0.9)
    assert weights() <= before


ASKED: tuple[tuple[Any, dict[str, Any], str], ...] = (
    ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], {}, "the user's"),
    ([{"role": "human", "content": "a"}], {}, "message 0 is no turn"),
    ("a " * 300, {}, "is more than the model's context of 256"),
    ("a", {"temperature": -1.0}, "temperature 0 or more"),
)


@pytest.mark.parametrize(("asked", "options", "says"), ASKED, ids=range(len(ASKED)))
def test_what_cannot_be_answered_is_explained(
    sft: tandem.Result, asked: Any, options: dict[str, Any], says: str
) -> None:
    with pytest.raises(UserError, match=says):
        sft.generate(asked, **{"max_new_tokens": 2, **options})


def test_evaluations_need_models_and_data_that_tells_what_it_is(
    sft: tandem.Result, home: Path
) -> None:
    with pytest.raises(UserError, match="no models are given"):
        tandem.evaluate([], "pairs.jsonl")
    with pytest.raises(UserError, match="nothing to measure"):
        tandem.evaluate(sft)
    with pytest.raises(UserError, match=r"evaluate\(\): the model is a Linear; give a Hub id"):
        tandem.evaluate([torch.nn.Linear(1, 1)], "pairs.jsonl")  # type: ignore[list-item]
    with pytest.raises(UserError, match=r"the columns of .* do not tell what it is"):
        tandem.evaluate(sft, [{"colour": "red"}])
    with pytest.raises(UserError, match=r"has no setting limt\. Did you mean 'limit'"):
        tandem.evaluate(sft, "pairs.jsonl", limt=3)  # type: ignore[call-arg]
    asked = [{"question": "say red", "answer": "red"}]
    found = tandem.evaluate(
        sft, ["pairs.jsonl", "talks.jsonl", asked], limit=4, device="cpu", quiet=True
    )
    (figures,) = found.values()
    assert {"preference_accuracy", "heldout_loss", "answer_accuracy"} <= figures.keys()
    assert len(found.samples) == 1


def test_checks_tell_what_would_not_train(sft: tandem.Result) -> None:
    found = tandem.check([{"prompt": "a", "chosen": "b", "rejected": "b"}], model=sft, quiet=True)
    assert (found.trains, found.findings) != (True, [])
    assert not tandem.check([{"colour": "red"}], quiet=True).trains
    assert tandem.check(recipe=sft.recipe, quiet=True).figures["trains"]
    with pytest.raises(UserError, match="needs data, or recipe="):
        tandem.check()


def test_recipes_are_changed_by_key_or_by_section(home: Path, sft: tandem.Result) -> None:
    planned = tandem.plan(
        sft.recipe, {"sft.max_steps": 5}, sft={"batch_size": 2, "lora": {"rank": 4}}, quiet=True
    )
    (stage,) = planned.figures["training"]
    assert stage["work"]["steps"] == 5
    assert "steps" in planned.text
    with pytest.raises(UserError, match=r"unknown key sft\.bach_size; did you mean sft\.batch"):
        tandem.run(sft.recipe, {"sft.bach_size": 3})
    with pytest.raises(UserError, match=r"no recipe of that name.*Did you mean demo"):
        tandem.plan("demos")
    with pytest.raises(UserError, match="is none that a recipe has"):
        tandem.run(sft.recipe, seed=object())
    with pytest.raises(UserError, match="--until dpo: this recipe's stages are sft, sft-merge"):
        tandem.run(sft.recipe, until="dpo", quiet=True)


def test_functions_of_one_process_say_so(
    sft: tandem.Result, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for call in (tandem.check, tandem.plan, tandem.evaluate, sft.generate):
        with pytest.raises(UserError, match=r"\(\) works in one process, and a launcher started 2"):
            call("x")
