"""`tandem sft`, `dpo` and `merge`: from flags to the stage's call."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

import tandem.pipeline.run_pipeline
import tandem.stages.dpo
import tandem.stages.finished
import tandem.stages.merge
import tandem.stages.sft
from tandem.cli.main import main
from tandem.recipe.choices import TrainingStageName as Stage
from tandem.recipe.dpo_settings import DpoSettings
from tandem.recipe.flags.flag import DATA_FLAGS, Flag, boolean
from tandem.recipe.flags.tutorial_flags import SETTINGS, stage_flags
from tandem.recipe.run_settings import RunSettings
from tandem.recipe.training_settings import SftSettings

SEED_SFT = """
model_name_or_path dataset_name output_dir per_device_train_batch_size
gradient_accumulation_steps learning_rate max_steps save_steps logging_steps lora_alpha
lora_rank lora_dropout lora_all_linear lora_target_modules bf16 max_length max_prompt_length
lr_scheduler_type warmup_steps gradient_checkpointing seed use_habana use_lazy_mode pad_max
num_train_epochs warmup_ratio weight_decay adam_epsilon save_total_limit max_seq_length
chat_template
"""
SEED_DPO = """
model_name_or_path dataset_name output_dir per_device_train_batch_size
gradient_accumulation_steps learning_rate max_steps save_steps logging_steps lora_alpha
lora_rank lora_dropout lora_all_linear lora_target_modules bf16 max_length max_prompt_length
lr_scheduler_type warmup_steps gradient_checkpointing beta seed use_habana use_lazy_mode pad_max
chat_template
"""
SEED_DPO_LINE = """
--model_name_or_path ./finetuned_model_lora --output_dir ./finetuned_model_lora_plus_dpo
--per_device_train_batch_size 8 --gradient_accumulation_steps 8 --learning_rate 5e-4 --max_steps
1000 --save_steps 10 --logging_steps 10 --lora_alpha 16 --lora_rank 16 --lora_dropout 0.05
--dataset_name Intel/orca_dpo_pairs --bf16 --max_length 1536 --max_prompt_length 1024
--lr_scheduler_type cosine --warmup_steps 100 --use_habana --use_lazy_mode --pad_max true
--gradient_checkpointing true --lora_all_linear false --lora_target_modules k_proj q_proj v_proj
"""
STAGES: tuple[Stage, ...] = ("sft", "dpo")
REQUIRED = ["--model_name_or_path", "m", "--dataset_name", "d", "--output_dir", "o"]
# A value that differs from what the flag has when it is left out.
SAMPLES = {
    "engine": "fsdp2",
    "lr_scheduler_type": "linear",
    "on_bad_record": "drop",
    "too_long": "keep_end",
    "loss_on": "text",
    "device": "cpu",
    "dtype": "float32",
    "quantization": "nf4",
    "attention": "dense",
    "max_seq_length": "1400",
    "max_length": "1400",
    "max_prompt_length": "300",
    "warmup_ratio": "0.25",
    "max_dropped": "0.25",
    "lora_dropout": "0.25",
    "adam_beta1": "0.25",
    "adam_beta2": "0.25",
    "optimizer": "lion",
    "lora_init": "pissa",
    "min_lr_ratio": "0.25",
    "decay_ratio": "0.25",
    "lion_beta1": "0.25",
    "lion_beta2": "0.25",
    "muon_momentum": "0.25",
    "ema_decay": "0.25",
    "fields": "prompt=asked",
    "roles": "caller=user",
    "completions": "best_vs_rest",
    "save_dtype": "float32",
    "lora_rank_pattern": "q_proj=3",
    "lora_alpha_pattern": "q_proj=3.0",
    "label_smoothing": "0.25",
    "ld_alpha": "0.25",
    "f_divergence_type": "forward_kl",
    "callbacks": "watch:told",
    "trackers": "tensorboard",
}
# Flags that need another one.
WITH = {
    "save_dtype": ["--full", "true"],
    "decay_ratio": ["--lr_scheduler_type", "wsd"],
    "lr_power": ["--lr_scheduler_type", "polynomial"],
    "lion_beta1": ["--optimizer", "lion"],
    "lion_beta2": ["--optimizer", "lion"],
    "muon_momentum": ["--optimizer", "muon"],
    "simpo_gamma": ["--loss", "simpo"],
    "cpo_alpha": ["--loss", "cpo"],
    "dpop_lambda": ["--loss", "dpo_positive"],
    "discopop_tau": ["--loss", "discopop"],
    "desirable_weight": ["--loss", "kto"],
    "undesirable_weight": ["--loss", "kto"],
    "score_temperature": ["--loss", "info_nca", "--completions", "ranked"],
    "tracker_project": ["--trackers", "wandb"],
    "tracker_run": ["--trackers", "wandb"],
    "f_alpha_divergence_coef": ["--f_divergence_type", "alpha_divergence"],
}


def _flags(stage: Stage) -> list[Flag]:
    return stage_flags(SETTINGS[stage])


class Calls(list[Any]):
    """The jobs that stages were given."""


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """The stages replaced by ones that check nothing and note the job."""
    made = Calls()
    for module, name in (
        (tandem.stages.sft, "run_sft"),
        (tandem.stages.dpo, "run_dpo"),
        (tandem.stages.merge, "run_merge"),
    ):

        def stage(job: Any, console: Console, callbacks: Any = ()) -> Path:
            made.append(job)
            return Path("o")

        monkeypatch.setattr(module, name, stage)
    monkeypatch.setattr(tandem.pipeline.run_pipeline, "training_is_finished", lambda *_: False)
    monkeypatch.setattr(tandem.stages.finished, "merge_is_finished", lambda *_: False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    return made


def _dry(capsys: pytest.CaptureFixture[str], *argv: str) -> Any:
    return yaml.safe_load(_dry_text(capsys, *argv))


def _dry_text(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main([*argv, "--dry-run"]) == 0
    return capsys.readouterr().out


@pytest.fixture(scope="module")
def plain() -> dict[tuple[str, ...], str]:
    """What dry runs without a flag show, once they were asked for."""
    return {}


@pytest.mark.parametrize(("stage", "names"), [("sft", SEED_SFT), ("dpo", SEED_DPO)])
def test_every_flag_of_the_seed_is_there(stage: Stage, names: str) -> None:
    assert set(names.split()) <= {flag.name for flag in _flags(stage)}


@pytest.mark.parametrize(
    ("stage", "name"), [(stage, flag.name) for stage in STAGES for flag in _flags(stage)]
)
def test_dashes_and_underscores_are_the_same(
    capsys: pytest.CaptureFixture[str],
    plain: dict[tuple[str, ...], str],
    stage: Stage,
    name: str,
) -> None:
    flag = next(flag for flag in _flags(stage) if flag.name == name)
    value = SAMPLES.get(name, "3" if flag.kind is not boolean else "true")
    if name == "loss":
        value = "dft" if stage == "sft" else "sigmoid=0.25"
    rest = [
        text
        for key, given in zip(REQUIRED[::2], REQUIRED[1::2], strict=True)
        for text in (key, given)
        if key != f"--{name}"
    ]
    beside = WITH.get(name, [])
    rest += beside
    shown = [
        _dry_text(capsys, stage, *rest, spelling, value)
        for spelling in dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}"))
    ]
    joined = _dry_text(capsys, stage, *rest, f"--{name.replace('_', '-')}={value}")
    assert set(shown) == {joined}
    inert = {flag.name for flag in _flags(stage) if flag.name.startswith("hpu_")}
    inert |= {"use_habana", "use_lazy_mode", "pad_max"}
    already = {"lora_dropout", "gradient_checkpointing"} if stage == "dpo" else set()
    if name not in inert | already:
        without = (stage, *REQUIRED, *beside)
        if without not in plain:
            plain[without] = _dry_text(capsys, *without)
        assert joined != plain[without], "a flag that is given changes what is done"


@pytest.mark.parametrize("given", ["--bf16", "--bf16 true", "--bf16=True", "--bf16 1"])
def test_booleans_stand_alone_or_before_their_value(
    capsys: pytest.CaptureFixture[str], given: str
) -> None:
    shown = _dry(capsys, "sft", *given.split(), *REQUIRED)
    assert shown["dtype"] == "bfloat16, but float32 on a CPU or MPS"
    assert _dry(capsys, "sft", "--bf16", "false", *REQUIRED)["dtype"] == "float32"


def test_the_seeds_own_command_line_runs(
    calls: Calls, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["dpo", *SEED_DPO_LINE.split()]) == 0
    (job,) = calls
    assert job.run.model == "./finetuned_model_lora"
    assert job.folder == Path("finetuned_model_lora_plus_dpo")
    settings = job.settings
    assert isinstance(settings, DpoSettings)
    assert settings.data[0].path == "Intel/orca_dpo_pairs"
    assert (settings.batch_size, settings.max_steps, settings.beta) == (64, 1000, 0.1)
    assert settings.lora.target_modules == ("k_proj", "q_proj", "v_proj")
    assert job.run.dtype == "float32", "a CPU trains in float32"
    said = capsys.readouterr().err
    for flag in ("use_habana", "use_lazy_mode", "pad_max", "lora_dropout", "bf16"):
        assert said.count(f"--{flag}") == 1


def test_bf16_is_bfloat16_on_cuda(calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert main(["sft", *REQUIRED, "--bf16"]) == 0
    assert (calls[0].run.device, calls[0].run.dtype) == ("auto", "bfloat16")
    assert main(["sft", *REQUIRED, "--bf16", "--device", "cpu"]) == 0
    assert calls[1].run.dtype == "float32"


def test_sft_passes_its_flags_on(calls: Calls) -> None:
    argv = ["--device=cpu", "--tokens-per-microbatch", "512", "--attention", "dense"]
    assert main(["sft", *REQUIRED, *argv, "--chat-template", "t.jinja", "--seed", "7"]) == 0
    (job,) = calls
    assert isinstance(job.settings, SftSettings)
    assert job.run == RunSettings(
        model="m",
        output_dir="o",
        chat_template="t.jinja",
        seed=7,
        device="cpu",
        attention="dense",
        tokens_per_microbatch=512,
    )


def test_several_data_sets_are_read_in_turn(calls: Calls) -> None:
    argv = ["--model_name_or_path", "m", "--output_dir", "o", "--dataset_name", "a", "b"]
    assert main(["sft", *argv]) == 0
    assert [source.path for source in calls[0].settings.data] == ["a", "b"]


def test_flags_say_of_every_data_set_what_a_recipe_says(
    calls: Calls, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--model_name_or_path", "m", "--output_dir", "o", "--dataset_name", "a", "b"]
    argv += ["--format", "messages", "--fields", "messages=log", "role=who", "content=said.text"]
    argv += ["--roles", "caller=user", "host=assistant", "--completions", "best_vs_rest"]
    said = {
        "format": "messages",
        "fields": {"messages": "log", "role": "who", "content": "said.text"},
        "roles": {"caller": "user", "host": "assistant"},
        "completions": "best_vs_rest",
    }
    for stage, section in (("sft", SftSettings), ("dpo", DpoSettings)):
        assert main([stage, *argv]) == 0
        data = calls.pop().settings.data
        assert data == section.model_validate(
            {"learning_rate": 1.0, "data": [{"path": path, **said} for path in ("a", "b")]}
        ).data  # fmt: skip
        shown = _dry(capsys, stage, *argv)["settings"]["data"]
        assert [{name: one[name] for name in said} for one in shown] == [said, said]


@pytest.mark.parametrize("command", ["sft", "dpo", "check", "show"])
def test_all_commands_that_name_data_say_the_same_of_it(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, "--help"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    for flag in DATA_FLAGS:
        metavar = flag.metavar or f"{{{','.join(flag.choices)}}}"
        assert f"--{flag.name} {metavar} " in said
        assert flag.help in said


@pytest.mark.parametrize("command", [["sft"], ["dpo"], ["check"], ["show", "--row=1", "--text"]])
@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--fields", "asked"], "--fields: 'asked' is not KEY=NAME; write it as in --fields prom"),
        (["--fields", "=asked"], "--fields: '=asked' is not KEY=NAME; write it as in --fields pr"),
        (["--roles", "caller="], "--roles: 'caller=' is not NAME=ROLE; write it as in --roles ca"),
        (["--fields", "prompt=a", "prompt=b"], "--fields: prompt is given twice; keep one"),
        (["--roles", "caller=boss"], "--roles is 'boss', but it must be 'system', "),
        (["--completions", "some"], "invalid choice: 'some' (choose from 'best_vs_worst', 'best_v"),
    ],
)
def test_what_flags_cannot_say_of_data(
    command: list[str], flags: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    named = REQUIRED if command[0] in ("sft", "dpo") else ["d"]
    assert main([*command, *named, *flags]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert said in line


def test_the_environments_world_size_is_a_factor(
    calls: Calls, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert main(["sft", *REQUIRED]) == 0
    assert calls[0].settings.batch_size == 64
    assert "1 per device x 8 accumulation x 8 devices = 64" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "many")
    assert main(["sft", *REQUIRED]) == 2
    assert "WORLD_SIZE is 'many'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags",
    [
        ["--base-model-path", "b", "--lora-model-path", "l/", "--output-path", "o"],
        ["--base_model_path=b", "--lora_model_path=l/", "--output_path=o"],
    ],
)
def test_merge_takes_the_seeds_flags(calls: Calls, flags: list[str]) -> None:
    assert main(["merge", *flags]) == 0
    assert main(["merge", *flags, "--dtype", "float16", "--force"]) == 0
    plain, forced = calls
    assert (plain.run.model, plain.adapter, plain.folder) == ("b", Path("l"), Path("o"))
    assert (plain.settings.dtype, plain.force, plain.run.device) == ("auto", False, "auto")
    assert (forced.settings.dtype, forced.force) == ("float16", True)


def test_a_dry_run_calls_no_stage(calls: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    shown = _dry(capsys, "dpo", *REQUIRED)
    assert not calls
    assert shown["settings"]["beta"] == 0.1


def test_the_home_folder_and_variables_are_resolved_in_flags_that_name_paths(
    calls: Calls, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A shell leaves `~` as it is in `--output_dir=~/x`."""
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.setenv("SCRATCH", "/scratch")
    shown = _dry(
        capsys, "sft", "--model_name_or_path=~/m", "--dataset_name=$SCRATCH/d.jsonl",
        "--output_dir=~/o", "--chat_template=${SCRATCH}/t.jinja",
    )  # fmt: skip
    assert (shown["model"], shown["output_dir"]) == ("/home/somebody/m", "/home/somebody/o")
    assert shown["chat_template"] == "/scratch/t.jinja"
    assert shown["settings"]["data"][0]["path"] == "/scratch/d.jsonl"
    flags = ["--base-model-path=~/b", "--lora-model-path=~/a", "--output-path=$SCRATCH/m"]
    assert main(["merge", *flags]) == 0
    assert calls[0].run.model == "/home/somebody/b"
    assert calls[0].adapter == Path("/home/somebody/a")
    assert calls[0].folder == Path("/scratch/m")


@pytest.mark.parametrize(
    "argv",
    [
        ["sft", "--model_name_or_path", "m", "--dataset_name", "d", "--output_dir", "$NOT_SET/o"],
        [
            "merge",
            "--base-model-path",
            "$NOT_SET/b",
            "--lora-model-path",
            "a",
            "--output-path",
            "o",
        ],
        ["chat", "$NOT_SET/m"],
        ["eval", "m", "--questions", "$NOT_SET/q.jsonl"],
        ["eval", "m", "--output_dir", "$NOT_SET/o"],
        ["check", "$NOT_SET/d.jsonl"],
        ["check", "d.jsonl", "--against", "$NOT_SET/d.jsonl"],
        ["show", "$NOT_SET/d.jsonl", "--row", "1", "--text"],
        ["report", "$NOT_SET/run"],
        ["pairs", "--prompts", "$NOT_SET/d.jsonl", "--model", "m", "--output_dir", "o"],
        ["run", "$NOT_SET/r.yaml"],
        ["plan", "demo", "output_dir=$NOT_SET/o"],
    ],
    ids=" ".join,
)
def test_a_variable_that_is_not_set_is_named_in_every_command(
    argv: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("NOT_SET", raising=False)
    assert main(argv) == 2
    assert "the environment variable NOT_SET is not set" in capsys.readouterr().err
