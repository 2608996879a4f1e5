"""Settings that are legal together and that nobody means are said; those without effect refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tandem.cli.main import main
from tandem.errors import UserError
from tandem.recipe.load_recipe import load_recipe
from tandem.recipe.training_settings import SftSettings
from tandem.recipe.unmeant import unmeant

DATA: Any = ({"path": "d.jsonl"},)


def sft(**settings: Any) -> SftSettings:
    return SftSettings.model_validate(
        {"data": DATA, "batch_size": 4, "logging_steps": 1, **settings}
    )


@pytest.mark.parametrize(
    ("settings", "steps", "records", "said"),
    [
        ({"warmup_steps": 100}, 50, 99, "warmup_steps 100: the warm-up of 100 is as long as the r"),
        ({"warmup_steps": 50}, 50, 99, "the learning rate only rises, to 9.8e-05 of 0.0001"),
        ({"warmup_ratio": 0.99}, 10, 99, "warmup_ratio: the warm-up of 10 is as long as the run's"),
        ({"batch_size": 64}, 5, 32, "batch_size 64 is more than the 32 records that there are"),
        ({"logging_steps": 10}, 4, 99, "logging_steps 10 is more than the run's 4 steps"),
        ({"save_steps": 9}, 4, 99, "save_steps 9 is more than the run's 4 steps"),
        ({"save_steps": 9}, 1, 99, "save_steps 9 is more than the run's 1 step:"),
        (
            {"validation": {"fraction": 0.1, "steps": 9}}, 4, 99,
            "validation.steps 9 is more than the run's 4 steps",
        ),
        ({"learning_rate": 0.5}, 4, 99, "learning_rate 0.5 is larger than the weights themselves"),
    ],
)  # fmt: skip
def test_what_will_not_do_what_it_is_there_for(
    settings: dict[str, Any], steps: int, records: int, said: str
) -> None:
    (found,) = unmeant(sft(**settings), steps=steps, records=records)
    assert said in found


def test_fewer_records_in_a_step_than_processes() -> None:
    (found,) = unmeant(sft(batch_size=2), steps=9, records=99, processes=4)
    assert found.startswith("batch_size 2 is less than the 4 processes")


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"warmup_steps": 0},
        {"warmup_ratio": 0.03},
        {"warmup_steps": 49},
        {"save_steps": 50, "logging_steps": 50},
        {"batch_size": 99},
        {"learning_rate": 2e-3},
    ],
)
def test_sound_settings_are_passed_over(settings: dict[str, Any]) -> None:
    assert unmeant(sft(**settings), steps=50, records=99) == []


def test_what_is_not_known_is_not_said() -> None:
    wild = sft(warmup_steps=100, save_steps=10**6, logging_steps=10**6, batch_size=10**6)
    assert unmeant(wild, steps=None, records=None) == []


@pytest.mark.parametrize("name", ["demo", "neural-chat-7b-v3-1"])
def test_shipped_recipes_say_nothing(name: str) -> None:
    recipe = load_recipe(name)
    for settings in (recipe.sft, recipe.dpo):
        if settings is not None:
            assert unmeant(settings, steps=settings.max_steps, records=None) == []


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("sft.warmup_steps=3", "a warm-up has no effect with lr_scheduler: constant"),
        ("sft.warmup_ratio=0.1", "take constant_with_warmup, or remove it"),
        ("evaluate.chat=true", "chat is about tasks, and no tasks and no suite are named"),
        ("evaluate.num_fewshot=5", "num_fewshot is about tasks"),
        ("evaluate.batch_size=4", "batch_size is about tasks"),
        ("evaluate={task_data: here, chat: true}", "task_data and chat are about tasks"),
    ],
)
def test_what_has_no_effect_is_an_error(tmp_path: Path, override: str, said: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(
        "name: x\nmodel: m\noutput_dir: o\nsft: {data: d.jsonl, lr_scheduler: constant}\n"
    )
    with pytest.raises(UserError) as caught:
        load_recipe(str(path), [override])
    assert said in str(caught.value)


def test_a_dry_run_says_what_the_settings_alone_show(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["run", "demo", "--dry-run", "dpo.epochs=null", "dpo.max_steps=5", "dpo.save_steps=9"]
    assert main(argv) == 0
    printed = capsys.readouterr().out
    assert "# dpo: save_steps 9 is more than the run's 5 steps" in printed
    assert "# sft:" not in printed


def test_flags_that_only_tasks_heed_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "m", "--heldout", "d.jsonl", "--data", "here", "--chat", "on"]) == 2
    assert "tandem eval: data and chat are about tasks" in capsys.readouterr().err


def test_a_constant_rate_has_no_warm_up_unless_it_is_given(
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = ["--model_name_or_path", "m", "--dataset_name", "d", "--output_dir", "o", "--dry-run"]
    assert main(["dpo", *flags, "--lr_scheduler_type", "constant"]) == 0
    assert "warmup_steps: 0" in capsys.readouterr().out
    flags += ["--warmup_steps", "5"]
    assert main(["dpo", *flags, "--lr_scheduler_type", "constant"]) == 2
    assert "a warm-up has no effect" in capsys.readouterr().err
