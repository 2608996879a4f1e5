"""The flags of `tandem sft` and `tandem dpo`, and the job that they ask for.

`--model_name_or_path M --per_device_train_batch_size 8 ...` is how the public tutorial calls its
two training scripts. Most flags are made from fields of settings, some under the tutorial's names;
those that mean something else are written out here. A flag that is left out has the value of the
tutorial's recipe.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ValidationError

from tandem.errors import UserError
from tandem.recipe.choices import TrainingStageName
from tandem.recipe.explain_errors import explain
from tandem.recipe.flags import (
    DATA_FLAGS,
    REVISION,
    Flag,
    boolean,
    data_settings,
    flag_of,
    flags_of_section,
    named_data,
)
from tandem.recipe.jobs import TrainingJob
from tandem.recipe.run_settings import HpuSettings, RunSettings
from tandem.recipe.section import expanded
from tandem.recipe.training_settings import (
    DpoSettings,
    LoraSettings,
    SftSettings,
    TrainingSettings,
)

if TYPE_CHECKING:
    from tandem.recipe.yaml_lines import Location

Values = Mapping[str, Any]
"""Flags that were given, by name with underscores, converted to their types."""

SETTINGS: dict[TrainingStageName, type[TrainingSettings]] = {"sft": SftSettings, "dpo": DpoSettings}

# What the tutorial's recipe says, for flags that are left out.
_TUTORIAL: dict[TrainingStageName, dict[str, Any]] = {
    "sft": {
        "learning_rate": 1e-4,
        "lr_scheduler": "cosine",
        "adam_epsilon": 1e-6,
        "max_length": 2560,
        "max_prompt_length": 1024,
        "save_steps": 1000,
        "save_total_limit": 10,
        "lora": {
            "alpha": 64.0,
            "dropout": 0.05,
            "target_modules": ("q_proj", "k_proj", "v_proj", "o_proj"),
        },
    },
    "dpo": {
        "learning_rate": 5e-4,
        "lr_scheduler": "cosine",
        "beta": 0.1,
        "max_length": 1536,
        "max_prompt_length": 1024,
        "gradient_checkpointing": True,
        "save_steps": 10,
        "lora": {"alpha": 16.0, "target_modules": ("k_proj", "q_proj", "v_proj")},
    },
}
_DURATION: dict[TrainingStageName, dict[str, Any]] = {
    "sft": {"epochs": 2.0},
    "dpo": {"max_steps": 1000},
}
_WARMUP: dict[TrainingStageName, dict[str, Any]] = {
    "sft": {"warmup_ratio": 0.03},
    "dpo": {"warmup_steps": 100},
}
_BATCH: dict[TrainingStageName, tuple[int, int]] = {"sft": (1, 8), "dpo": (8, 8)}

# What only Gaudi cards heed, and why it does nothing elsewhere.
_NOTICES = {
    "use_habana": "there is no Gaudi card in use (Habana's bridge to torch is not installed, or "
    "another device was asked for)",
    "use_lazy_mode": "lazy mode belongs to Gaudi cards",
    "pad_max": "sequences are packed by length; padding them would only cost time, "
    "the result is the same",
    "hpu_buckets": "shapes are free on this device",
    "hpu_fused_attention": "the kernel belongs to Gaudi cards",
    "hpu_fused_optimizer": "the kernel belongs to Gaudi cards",
}

# Fields whose flags have the tutorial's names.
_RUN_NAMES = {"model": "model_name_or_path"}
_RUN_HELP = {
    "model": "The base model: a folder or a Hub id (required).",
    "output_dir": "A folder for the adapter, checkpoints and metrics (required).",
}
_NAMES = {"epochs": "num_train_epochs", "lr_scheduler": "lr_scheduler_type"}
# Fields that have no flag: they need a section, or are named otherwise.
_NO_RUN_FLAGS = ("name", "description")
_NO_FLAGS = ("batch_size", "keep", "best_metric")

_DATA = (
    Flag("dataset_name", expanded, "A Hub id, a folder or a file; several are read in turn.",
         many=True),
    *DATA_FLAGS,
    Flag("dataset_revision", str, REVISION.help),
)  # fmt: skip
_BATCH_FLAGS = (
    Flag("per_device_train_batch_size", int, "Examples a device; a factor of the global batch."),
    Flag("gradient_accumulation_steps", int, "A factor of the global batch."),
    flag_of(
        TrainingSettings,
        "batch_size",
        at=("settings",),
        help="The global batch, in place of the two above.",
    ),
)
# Where the tutorial's values are others than a recipe's.
_HELP = {
    "max_grad_norm": "Gradients are clipped to this norm; 0 leaves them alone.",
    "epochs": "Passes over the data.",
    "max_steps": "Optimizer steps, in place of epochs; -1 is none.",
}
_GAUDI = (
    Flag("use_habana", boolean, "Train on Gaudi cards, where there are some."),
    flag_of(HpuSettings, "lazy_mode", "use_lazy_mode", at=("run", "hpu"),
            help="Gaudi's lazy mode."),
    Flag("pad_max", boolean, "On Gaudi: one length for every micro-batch."),
    Flag("hpu_buckets", str, "On Gaudi: lengths of micro-batches, or auto.", many=True),
    flag_of(HpuSettings, "fused_attention", "hpu_fused_attention", at=("run", "hpu"),
            help="On Gaudi: Habana's FusedSDPA."),
    flag_of(HpuSettings, "fused_optimizer", "hpu_fused_optimizer", at=("run", "hpu"),
            help="On Gaudi: Habana's FusedAdamW."),
)  # fmt: skip


def stage_flags(settings: type[TrainingSettings]) -> list[Flag]:
    """The flags of a stage with such settings."""
    of_lora = flags_of_section(LoraSettings, at=("settings", "lora"), prefix="lora_")
    return [
        *flags_of_section(
            RunSettings, names=_RUN_NAMES, helps=_RUN_HELP, without=_NO_RUN_FLAGS, at=("run",)
        ),
        *_DATA,
        *_BATCH_FLAGS,
        *flags_of_section(settings, names=_NAMES, helps=_HELP, without=_NO_FLAGS, at=("settings",)),
        *(
            [Flag("max_seq_length", int, "Another name of --max_length.")]
            if issubclass(settings, SftSettings)
            else []
        ),
        *of_lora,
        Flag("lora_all_linear", boolean, "Adapt every linear layer but the head."),
        Flag("bf16", boolean, "bfloat16; a CPU trains in float32 and says so."),
        *_GAUDI,
    ]


def job_from_flags(
    stage: TrainingStageName,
    values: Values,
    *,
    devices: int = 1,
    gaudi: bool = False,
    settings: type[TrainingSettings] | None = None,
) -> tuple[TrainingJob, tuple[str, ...]]:
    """The job that the flags ask for, and a line for each flag that cannot act.

    Args:
        stage: sft or dpo.
        values: the flags given, by name with underscores; absent ones take the tutorial's values.
        devices: how many devices take part; a factor of the global batch.
        gaudi: whether Habana's bridge is installed, so that `auto` may find Gaudi cards.
        settings: the class of the stage's settings, where it has more fields.

    Raises UserError naming the flags for missing, contradicting or impossible values.
    """
    required = ("model_name_or_path", "dataset_name", "output_dir")
    if missing := [f"--{name}" for name in required if not values.get(name)]:
        raise UserError(f"tandem {stage} needs {', '.join(missing)}")
    section = settings or SETTINGS[stage]
    flags = stage_flags(section)
    job: dict[str, Any] = {"run": {}, "settings": dict(_TUTORIAL[stage])}
    for flag in flags:
        if flag.field[:1] in (("run",), ("settings",)) and flag.name in values:
            _put(job, flag.field, values[flag.name])
    batch_size, batch_notice = _global_batch(stage, values, devices)
    job["settings"] |= {
        "data": named_data(
            values["dataset_name"],
            data_settings({**values, "revision": values.get("dataset_revision")}),
        ),
        "batch_size": batch_size,
        **_duration(stage, values),
        **_warmup(stage, values),
        "lora": _lora(stage, job["settings"]["lora"], values),
    }
    length_notice = _set_lengths(stage, job["settings"], values)
    if "max_grad_norm" in values:
        job["settings"]["max_grad_norm"] = values["max_grad_norm"] or None
    device = _device(values, gaudi)
    on_gaudi = device == "hpu" or (device == "auto" and gaudi)
    job["run"] |= {"device": device, "dtype": _dtype(values)}
    job["run"]["hpu"] = _hpu(job["run"].get("hpu", {}), values) if on_gaudi else {}
    run: RunSettings = _validated(RunSettings, "run", job, flags, stage, values)
    made: TrainingSettings = _validated(section, "settings", job, flags, stage, values)
    notices = (*_ineffective(stage, values, on_gaudi), *batch_notice, *length_notice)
    return TrainingJob(run, made), notices


def _put(job: dict[str, Any], at: tuple[str, ...], value: Any) -> None:
    *above, key = at
    for part in above:
        job[part] = dict(job.get(part, {}))
        job = job[part]
    job[key] = value


def _global_batch(
    stage: TrainingStageName, values: Values, devices: int
) -> tuple[int, tuple[str, ...]]:
    factors = ("per_device_train_batch_size", "gradient_accumulation_steps")
    given = [name for name in factors if name in values]
    if "batch_size" in values:
        if given:
            raise UserError(
                f"--batch_size and --{given[0]} are both given. --batch_size is the global batch, "
                "the other one a factor of it; keep one way"
            )
        return _positive("batch_size", values["batch_size"]), ()
    usual = dict(zip(factors, _BATCH[stage], strict=True))
    per_device, accumulation = (_positive(name, values.get(name, usual[name])) for name in factors)
    total = per_device * accumulation * devices
    notice = (
        f"global batch: {per_device} per device x {accumulation} accumulation x {devices} "
        f"device{'s' if devices > 1 else ''} = {total} examples a step"
    )
    return total, (notice,)


def _duration(stage: TrainingStageName, values: Values) -> dict[str, Any]:
    epochs, steps = values.get("num_train_epochs"), values.get("max_steps")
    steps = None if steps == -1 else steps  # the tutorial's libraries write -1 for "not set"
    if epochs is not None and steps is not None:
        raise UserError("--num_train_epochs and --max_steps are both given; keep one")
    usual = {"epochs": 1.0} if "max_steps" in values and stage == "dpo" else _DURATION[stage]
    given = {"epochs": epochs, "max_steps": steps}
    return given if epochs is not None or steps is not None else {**given, **usual}


def _warmup(stage: TrainingStageName, values: Values) -> dict[str, Any]:
    given = {name: values[name] for name in ("warmup_steps", "warmup_ratio") if name in values}
    if len(given) == 2:
        if all(given.values()):
            raise UserError("--warmup_steps and --warmup_ratio are both given; keep one")
        given = {name: value for name, value in given.items() if value} or {"warmup_steps": 0}
    if not given and values.get("lr_scheduler_type") == "constant":
        given = {"warmup_steps": 0}
    return {"warmup_steps": None, "warmup_ratio": None, **(given or _WARMUP[stage])}


def _lora(stage: TrainingStageName, lora: dict[str, Any], values: Values) -> dict[str, Any]:
    """The lora section: one way to name modules; in DPO the dropout flag cannot act."""
    modules, all_linear = values.get("lora_target_modules"), values.get("lora_all_linear")
    if modules == ["all-linear"]:
        modules, all_linear = None, True
    if modules and all_linear:
        raise UserError("--lora_all_linear true and --lora_target_modules are both given; keep one")
    usual = _TUTORIAL[stage]["lora"]
    lora = {**lora, "target_modules": modules or usual["target_modules"]}
    if all_linear:
        lora["target_modules"] = "all-linear"
    if stage == "dpo" and not 0 <= lora.pop("dropout", 0.0) < 1:
        raise UserError(f"--lora_dropout is {values['lora_dropout']}, but it must be in [0, 1)")
    return lora


def _set_lengths(
    stage: TrainingStageName, settings: dict[str, Any], values: Values
) -> tuple[str, ...]:
    """Put tokens of a sequence and of its prompt there; what had to change, in words."""
    given = [values[name] for name in ("max_length", "max_seq_length") if name in values]
    if len(set(given)) > 1:
        raise UserError(
            f"--max_length {given[0]} and --max_seq_length {given[1]} are two names of one thing; "
            "keep one"
        )
    if given:
        settings["max_length"] = given[0]
    length, usual = settings["max_length"], _TUTORIAL[stage]["max_prompt_length"]
    if "max_prompt_length" in values or usual < length:
        return ()
    half = settings["max_prompt_length"] = max(1, length // 2)
    return (
        f"--max_prompt_length is {half}, half of --max_length: the usual {usual} would leave no "
        "room for an answer",
    )


def _device(values: Values, gaudi: bool) -> str:
    """The device, as --device and --use_habana say it together."""
    device, habana = str(values.get("device", "auto")), values.get("use_habana")
    if device == "hpu" and habana is False:
        raise UserError("--use_habana false and --device hpu contradict each other; keep one")
    if not gaudi or habana is None:
        return device
    if device not in ("auto", "hpu") and habana:
        raise UserError(f"--use_habana and --device {device} contradict each other; keep one")
    if device != "auto":
        return device
    return "hpu" if habana else "cpu"


def _hpu(hpu: dict[str, Any], values: Values) -> dict[str, Any]:
    """The hpu section with the lengths of micro-batches."""
    lengths = list(values.get("hpu_buckets", ["auto"]))
    if values.get("pad_max"):
        if "hpu_buckets" in values:
            raise UserError("--pad_max is one length, and --hpu_buckets says others; keep one")
        lengths = ["max"]
    if lengths in (["auto"], ["max"]):
        return {**hpu, "buckets": lengths[0]}
    if not all(text.isdigit() and int(text) > 0 for text in lengths):
        raise UserError(
            f"--hpu_buckets is {' '.join(lengths)!r}, but it must be numbers above 0, or auto"
        )
    return {**hpu, "buckets": lengths}


def _dtype(values: Values) -> str:
    dtype, bf16 = str(values.get("dtype", "auto")), values.get("bf16")
    if bf16 and dtype not in ("auto", "bfloat16"):
        raise UserError(f"--bf16 and --dtype {dtype} contradict each other; keep one")
    if bf16 is False and dtype == "bfloat16":
        raise UserError("--bf16 false and --dtype bfloat16 contradict each other; keep one")
    # Without bf16 the tutorial's scripts train in float32.
    return "float32" if bf16 is False and dtype == "auto" else dtype


def _positive(name: str, value: int) -> int:
    if value <= 0:
        raise UserError(f"--{name} is {value}, but it must be above 0")
    return int(value)


def _ineffective(stage: TrainingStageName, values: Values, on_gaudi: bool) -> Iterable[str]:
    for name, reason in _NOTICES.items():
        if values.get(name) and not on_gaudi:
            yield f"--{name} does nothing here: {reason}"
    if stage == "dpo" and values.get("lora_dropout"):
        yield (
            "--lora_dropout does nothing here: dropout is off in DPO, because prompts are shared "
            "between both answers and the reference must equal the policy at the start"
        )


def _validated(
    model: type[BaseModel],
    part: str,
    job: dict[str, Any],
    flags: Iterable[Flag],
    stage: TrainingStageName,
    values: Values,
) -> Any:
    """A part of the job as settings; raises UserError naming the flag of an impossible value."""
    names = {flag.field: flag.name for flag in flags}

    def place(location: Location) -> str:
        keys = (part, *(str(key) for key in location))
        name = next((names[keys[:n]] for n in range(len(keys), 1, -1) if keys[:n] in names), "")
        return f"--{name}" if name in values else f"tandem {stage}"

    try:
        return model.model_validate(job[part])
    except ValidationError as error:
        raise UserError(explain(error, model, place)) from error
