"""What the seed's flags stand for."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

import pytest

from tandem.errors import UserError
from tandem.recipe.choices import AttentionName
from tandem.recipe.flags.tutorial_flags import SETTINGS, job_from_flags, stage_flags
from tandem.recipe.jobs import TrainingJob
from tandem.recipe.load_recipe import load_recipe
from tandem.recipe.run_settings import HpuSettings, RunSettings
from tandem.recipe.training_settings import TrainingSettings

REQUIRED = {"model_name_or_path": "m", "dataset_name": ["d"], "output_dir": "o"}
Stage = Literal["sft", "dpo"]
STAGES: tuple[Stage, ...] = ("sft", "dpo")


class Call(NamedTuple):
    """What flags ask for."""

    job: TrainingJob
    notices: tuple[str, ...]

    @property
    def run(self) -> RunSettings:
        return self.job.run

    @property
    def settings(self) -> Any:
        return self.job.settings


def _call(stage: Stage, devices: int = 1, *, cards: bool = False, **values: Any) -> Call:
    return Call(*job_from_flags(stage, {**REQUIRED, **values}, devices=devices, cards=cards))


def _message(stage: Stage, devices: int = 1, **values: Any) -> str:
    with pytest.raises(UserError) as caught:
        _call(stage, devices, **values)
    return str(caught.value)


@pytest.mark.parametrize("stage", STAGES)
def test_flags_that_are_left_out_have_the_seed_recipes_values(stage: Stage) -> None:
    recipe = load_recipe("neural-chat-7b-v3-1")
    section: TrainingSettings | None = getattr(recipe, stage)
    assert section is not None
    # SFT's 64 came from 8 devices. Dropout cannot act in DPO, so the flags do not carry it.
    flags = _call(stage, devices=8 if stage == "sft" else 1).settings.model_dump()
    wanted = section.model_dump() | {"data": flags["data"]}
    if stage == "dpo":
        wanted["lora"]["dropout"] = 0.0
    assert flags == wanted


@pytest.mark.parametrize("missing", sorted(REQUIRED))
def test_a_required_flag_that_is_missing_is_named(missing: str) -> None:
    values = {name: value for name, value in REQUIRED.items() if name != missing}
    with pytest.raises(UserError, match=f"tandem dpo needs --{missing}$"):
        job_from_flags("dpo", values)


@pytest.mark.parametrize(
    ("per_device", "accumulation", "devices"), [(1, 8, 8), (8, 8, 1), (4, 2, 2)]
)
def test_the_global_batch_is_the_product(per_device: int, accumulation: int, devices: int) -> None:
    call = _call(
        "sft",
        devices,
        per_device_train_batch_size=per_device,
        gradient_accumulation_steps=accumulation,
    )
    product = per_device * accumulation * devices
    assert call.settings.batch_size == product
    assert any(f"= {product} examples a step" in notice for notice in call.notices)


def test_batch_size_is_the_global_batch_whatever_the_devices() -> None:
    assert _call("dpo", 4, batch_size=6).settings.batch_size == 6


@pytest.mark.parametrize("factor", ["per_device_train_batch_size", "gradient_accumulation_steps"])
def test_batch_size_and_a_factor_of_it_are_an_error(factor: str) -> None:
    message = _message("dpo", batch_size=8, **{factor: 2})
    assert "--batch_size" in message
    assert f"--{factor}" in message


@pytest.mark.parametrize(
    "name", ["batch_size", "per_device_train_batch_size", "gradient_accumulation_steps"]
)
def test_a_batch_of_nothing_is_an_error(name: str) -> None:
    assert f"--{name} is 0, but it must be above 0" in _message("sft", **{name: 0})


def test_both_names_of_the_length_mean_the_same() -> None:
    assert _call("sft", max_seq_length=2000).settings.max_length == 2000
    assert _call("sft", max_length=2000).settings.max_length == 2000
    assert _call("sft", max_length=2000, max_seq_length=2000).settings.max_length == 2000
    message = _message("sft", max_length=2000, max_seq_length=1000)
    assert "--max_length 2000 and --max_seq_length 1000" in message


def test_a_length_below_the_usual_prompt_length_halves_it_and_says_so() -> None:
    call = _call("sft", max_length=512)
    assert call.settings.max_prompt_length == 256
    assert any("--max_prompt_length is 256" in notice for notice in call.notices)
    message = _message("sft", max_length=512, max_prompt_length=512)
    assert "leaves no room for an answer" in message


def test_steps_take_the_place_of_epochs_and_the_other_way_round() -> None:
    sft = _call("sft", max_steps=5).settings
    assert (sft.max_steps, sft.epochs) == (5, None)
    dpo = _call("dpo", num_train_epochs=3.0).settings
    assert (dpo.max_steps, dpo.epochs) == (None, 3.0)
    none = _call("dpo", max_steps=-1, num_train_epochs=2.0).settings
    assert (none.max_steps, none.epochs) == (None, 2.0)
    assert "--num_train_epochs and --max_steps" in _message("sft", max_steps=5, num_train_epochs=1)
    assert "--max_steps is 0" in _message("sft", max_steps=0)


def test_warm_up_in_steps_takes_the_place_of_a_share() -> None:
    sft = _call("sft", warmup_steps=7).settings
    assert (sft.warmup_steps, sft.warmup_ratio) == (7, None)
    dpo = _call("dpo", warmup_ratio=0.1).settings
    assert (dpo.warmup_steps, dpo.warmup_ratio) == (None, 0.1)
    # The seed's libraries print 0 for the one that is not used.
    both = _call("dpo", warmup_steps=0, warmup_ratio=0.1).settings
    assert (both.warmup_steps, both.warmup_ratio) == (None, 0.1)
    assert "--warmup_steps and --warmup_ratio" in _message("dpo", warmup_steps=3, warmup_ratio=0.1)


def test_the_tutorials_options_of_adamw_do_not_follow_to_another_optimizer() -> None:
    sft = _call("sft", optimizer="lion", lion_beta2=0.95).settings
    assert (sft.optimizer, sft.lion_beta2) == ("lion", 0.95)
    assert "adam_epsilon has no effect with optimizer: lion" in _message(
        "sft", optimizer="lion", adam_epsilon=1e-6
    )


def test_all_linear_or_modules() -> None:
    assert _call("dpo", lora_all_linear=True).settings.lora.target_modules == "all-linear"
    named = _call("dpo", lora_all_linear=False, lora_target_modules=["a", "b"]).settings.lora
    assert named.target_modules == ("a", "b")
    assert _call("sft", lora_all_linear=False).settings.lora.target_modules == (
        *("q_proj", "k_proj", "v_proj", "o_proj"),
    )
    text = _call("sft", lora_target_modules=["all-linear"]).settings.lora
    assert text.target_modules == "all-linear"
    message = _message("dpo", lora_all_linear=True, lora_target_modules=["a"])
    assert "--lora_all_linear true and --lora_target_modules" in message


def test_dropout_acts_in_sft_and_is_reported_in_dpo() -> None:
    sft = _call("sft", lora_dropout=0.2)
    assert sft.settings.lora.dropout == 0.2
    assert not any("lora_dropout" in notice for notice in sft.notices)
    dpo = _call("dpo", lora_dropout=0.2)
    assert dpo.settings.lora.dropout == 0.0
    assert sum("--lora_dropout does nothing here" in notice for notice in dpo.notices) == 1
    assert "--lora_dropout is 1.5" in _message("dpo", lora_dropout=1.5)


@pytest.mark.parametrize(
    "flag",
    ["use_habana", "use_lazy_mode", "pad_max", "hpu_fused_attention", "hpu_fused_optimizer"],
)
@pytest.mark.parametrize("stage", STAGES)
def test_a_flag_that_cannot_act_is_accepted_and_reported_once(stage: Stage, flag: str) -> None:
    plain = _call(stage)
    call = _call(stage, **{flag: True})
    assert call.settings == plain.settings
    lines = [notice for notice in call.notices if f"--{flag} does nothing here: " in notice]
    assert len(lines) == 1
    assert _call(stage, **{flag: False}).notices == plain.notices


def test_on_gaudi_the_seeds_flags_act() -> None:
    call = _call("dpo", cards=True, use_habana=True, use_lazy_mode=True, pad_max=True)
    assert (call.run.device, call.run.hpu) == ("hpu", HpuSettings(lazy_mode=True, buckets="max"))
    assert not any("does nothing" in notice for notice in call.notices)
    plain = _call("dpo", cards=True)
    assert (plain.run.device, plain.run.hpu) == ("auto", HpuSettings())
    kernels = {"hpu_fused_attention": True, "hpu_fused_optimizer": True}
    given: dict[str, Any] = {"hpu_buckets": ["512", "1024"], **kernels}
    assert _call("sft", cards=True, **given).run.hpu == HpuSettings(
        buckets=(512, 1024), fused_attention=True, fused_optimizer=True
    )
    assert _call("sft", **given).run.hpu == HpuSettings()


def test_flags_about_gaudi_that_contradict_each_other() -> None:
    def message(**values: Any) -> str:
        with pytest.raises(UserError) as caught:
            _call("sft", cards=True, **values)
        return str(caught.value)

    assert "--use_habana and --device cpu" in message(use_habana=True, device="cpu")
    assert "--use_habana false and --device hpu" in message(use_habana=False, device="hpu")
    assert "--pad_max" in message(pad_max=True, hpu_buckets=["64"])
    assert "--hpu_buckets is 'a b'" in message(hpu_buckets=["a", "b"])
    assert _call("sft", cards=True, use_habana=False).run.device == "cpu"


def test_bf16_and_another_dtype_contradict_each_other() -> None:
    assert _call("sft", bf16=True).run.dtype == "auto"
    assert _call("sft", bf16=True, dtype="bfloat16").run.dtype == "bfloat16"
    assert _call("sft", bf16=False).run.dtype == "float32"
    assert "--bf16 and --dtype float16" in _message("sft", bf16=True, dtype="float16")
    assert "--bf16 false" in _message("sft", bf16=False, dtype="bfloat16")


def test_what_is_not_of_the_seed_arrives_too() -> None:
    call = _call(
        "sft",
        split="validation",
        subset="en",
        dataset_revision="abc",
        model_revision="def",
        chat_template="mine.jinja",
        seed=3,
        device="cpu",
        attention="dense",
        tokens_per_microbatch="4096",
        max_grad_norm=0.0,
        on_bad_record="drop",
    )
    source = call.settings.data[0]
    assert (source.path, source.split, source.subset, source.revision) == (
        *("d", "validation", "en", "abc"),
    )
    assert (call.run.model, call.run.model_revision, call.run.output_dir) == ("m", "def", "o")
    assert (call.run.chat_template, call.run.seed, call.run.device) == ("mine.jinja", 3, "cpu")
    assert (call.run.attention, call.run.tokens_per_microbatch) == ("dense", 4096)
    assert call.settings.max_grad_norm is None, "the field's libraries write 0 for no clipping"
    assert call.settings.on_bad_record == "drop"


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"tokens_per_microbatch": "few"}, "--tokens_per_microbatch is 'few'"),
        ({"tokens_per_microbatch": "0"}, "--tokens_per_microbatch is '0'"),
        ({"seed": -1}, "--seed is -1"),
        ({"engine": "zero3"}, "--engine: unknown engine 'zero3'; did you mean deepspeed-zero3?"),
        ({"learning_rate": 0.0}, "--learning_rate is 0.0"),
        ({"learning_rate": float("nan")}, "--learning_rate is nan"),
        ({"lora_rank": 0}, "--lora_rank is 0, but it must be greater than 0"),
        ({"beta": -1.0}, "--beta is -1.0"),
        ({"save_steps": 0}, "--save_steps is 0"),
    ],
)
def test_an_impossible_value_is_named_by_its_flag(values: dict[str, Any], said: str) -> None:
    assert said in _message("dpo", **values)


def test_flags_and_recipes_know_the_same_attention_backends() -> None:
    (flag,) = [flag for flag in stage_flags(SETTINGS["sft"]) if flag.name == "attention"]
    assert flag.choices == get_args(AttentionName)
    for backend in flag.choices:
        assert _call("sft", attention=backend).run.attention == backend
        assert load_recipe("demo", [f"attention={backend}"]).attention == backend


def test_patterns_are_pairs() -> None:
    call = _call("sft", lora_rank_pattern=["down_proj=8", "q_proj|k_proj=4"], lora_dora=True)
    lora = call.settings.lora
    assert lora.rank_pattern == {"down_proj": 8, "q_proj|k_proj": 4}
    assert (lora.alpha_pattern, lora.dora, lora.rank) == ({}, True, 16)
    said = _message("dpo", lora_alpha_pattern=["down_proj"])
    assert said == (
        "--lora_alpha_pattern: 'down_proj' is not PATTERN=ALPHA; write it as in "
        "--lora_alpha_pattern down_proj=16"
    )
    assert "--lora_rank_pattern" in _message("sft", lora_rank_pattern=["(=8"])
    assert "--lora_rank_pattern" in _message("sft", lora_rank_pattern=["down_proj=x"])


def test_an_adapter_to_go_on_with_has_the_rank_that_no_flag_says() -> None:
    lora = _call("dpo", lora_from="runs/sft").settings.lora
    assert lora.start == "runs/sft"
    assert not {"rank", "alpha", "target_modules"} & lora.model_fields_set
    lora = _call("dpo", lora_from="runs/sft", lora_rank=8, lora_all_linear=True).settings.lora
    assert {"rank", "target_modules"} <= lora.model_fields_set
    assert (lora.rank, lora.target_modules) == (8, "all-linear")
