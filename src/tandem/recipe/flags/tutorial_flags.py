"""The flags of `tandem sft` and `tandem dpo`, and the job that they make.

They are those of the public tutorial's two training scripts. Most are made from fields of settings,
some under the tutorial's names; the others are written out here. A missing flag has the value of
the tutorial's recipe.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from functools import reduce
from operator import getitem
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ValidationError

from tandem.errors import UserError
from tandem.recipe.choices import TrainingStageName
from tandem.recipe.dpo_settings import DpoSettings, uses_beta
from tandem.recipe.explain_errors import explain
from tandem.recipe.flags.flag import (
    DATA_FLAGS,
    REVISION,
    Flag,
    boolean,
    data_settings,
    flag_of,
    flags_of_section,
    named_data,
    pairs_of,
)
from tandem.recipe.jobs import TrainingJob
from tandem.recipe.lora_settings import FIXED, LoraSettings
from tandem.recipe.method_options import without_effect
from tandem.recipe.run_settings import HpuSettings, RunSettings
from tandem.recipe.section import expanded
from tandem.recipe.training_settings import SftSettings, TrainingSettings

if TYPE_CHECKING:
    from tandem.recipe.yaml_lines import Location

Values = Mapping[str, Any]
"""Flags that were given, by name with underscores, converted to their types."""

SETTINGS: dict[TrainingStageName, type[TrainingSettings]] = {"sft": SftSettings, "dpo": DpoSettings}

# The recipe with the values of missing flags.
_TUTORIAL = "neural-chat-7b-v3-1"
# Examples per device and accumulation; the recipe has their product with the number of devices.
_BATCH: dict[TrainingStageName, tuple[int, int]] = {"sft": (1, 8), "dpo": (8, 8)}

# Flags that only Gaudi cards use, and why they do nothing elsewhere.
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
_NAMES = {
    "model": "model_name_or_path", "epochs": "num_train_epochs",
    "lr_scheduler": "lr_scheduler_type",
}  # fmt: skip
# Fields that mean something else here than in a recipe.
_HELP = {
    "model": "The base model: a folder or a Hub id (required).",
    "output_dir": "A folder for the adapter, checkpoints and metrics (required).",
    "batch_size": "The global batch, in place of the two above.",
    "epochs": "Passes over the data.",
    "max_steps": "Optimizer steps, in place of epochs; -1 is none.",
    "max_grad_norm": "Gradients are clipped to this norm; 0: they are not.",
}
# Fields without a flag made from them: a single stage has no name, `keep` needs a validation
# section, and patterns are written as pairs.
_WITHOUT = ("name", "description", "keep", "best_metric", "rank_pattern", "alpha_pattern")

_DATA = (
    Flag("dataset_name", expanded, "A Hub id, a folder or a file; several are read in turn.",
         many=True),
    *DATA_FLAGS,
    Flag("dataset_revision", str, REVISION.help),
)  # fmt: skip
_BATCH_FLAGS = (
    Flag("per_device_train_batch_size", int, "Examples a device; a factor of the global batch."),
    Flag("gradient_accumulation_steps", int, "A factor of the global batch."),
)
_PATTERNS = {
    "rank_pattern": ("PATTERN=RANK", "--lora_rank_pattern down_proj=8"),
    "alpha_pattern": ("PATTERN=ALPHA", "--lora_alpha_pattern down_proj=16"),
}
_PATTERN_FLAGS = tuple(
    Flag(f"lora_{key}", str, LoraSettings.model_fields[key].description or "", many=True,
         field=("settings", "lora", key), metavar=form)
    for key, (form, _) in _PATTERNS.items()
)  # fmt: skip
_LOSS = Flag(
    "loss", str, "A loss by its name (docs/guide/losses.md), or several with their weights.",
    many=True, field=("settings", "loss"), metavar="NAME[=WEIGHT]",
)  # fmt: skip
_GAUDI = (
    Flag("use_habana", boolean, "Train on Gaudi cards, where there are some."),
    flag_of(HpuSettings, "lazy_mode", "use_lazy_mode", at=("run", "hpu"),
            help="On Gaudi: lazy mode."),
    Flag("pad_max", boolean, "On Gaudi: fill every micro-batch up to one length."),
    Flag("hpu_buckets", str, "On Gaudi: lengths of micro-batches, or auto.", many=True),
    flag_of(HpuSettings, "fused_attention", "hpu_fused_attention", at=("run", "hpu"),
            help="On Gaudi: Habana's FusedSDPA."),
    flag_of(HpuSettings, "fused_optimizer", "hpu_fused_optimizer", at=("run", "hpu"),
            help="On Gaudi: Habana's FusedAdamW."),
)  # fmt: skip


def stage_flags(settings: type[TrainingSettings]) -> list[Flag]:
    """Return the flags of a stage with such settings."""

    def made_from(section: type[BaseModel], *at: str, prefix: str = "") -> list[Flag]:
        return flags_of_section(
            section, names=_NAMES, helps=_HELP, without=_WITHOUT, at=at, prefix=prefix
        )

    supervised = issubclass(settings, SftSettings)
    second_name = Flag("max_seq_length", int, "Another name of --max_length.")
    return [
        *made_from(RunSettings, "run"),
        *_DATA,
        *_BATCH_FLAGS,
        *(one for one in made_from(settings, "settings") if one.field != _LOSS.field or supervised),
        *([] if supervised else [_LOSS]),
        *([second_name] if supervised else []),
        *made_from(LoraSettings, "settings", "lora", prefix="lora_"),
        *_PATTERN_FLAGS,
        Flag("lora_all_linear", boolean, "Adapt every linear layer but the head."),
        Flag("bf16", boolean, "Train in bfloat16; a CPU trains in float32 instead and says so."),
        *_GAUDI,
    ]


def job_from_flags(
    stage: TrainingStageName,
    values: Values,
    *,
    devices: int = 1,
    cards: bool = False,
    settings: type[TrainingSettings] | None = None,
) -> tuple[TrainingJob, tuple[str, ...]]:
    """Return the job of some flags, and a line for each flag without effect.

    Args:
        stage: sft or dpo.
        values: the flags given, by name with underscores; absent ones take the tutorial's values.
        devices: how many devices take part; a factor of the global batch.
        cards: whether Habana's bridge is installed, so that `auto` may find Gaudi cards.
        settings: the class of the stage's settings, if it has more fields.

    Raises UserError naming the flags for missing, contradicting or impossible values.
    """
    required = ("model_name_or_path", "dataset_name", "output_dir")
    if missing := [f"--{name}" for name in required if not values.get(name)]:
        raise UserError(f"tandem {stage} needs {', '.join(missing)}")
    from tandem.recipe.load_recipe import load_recipe

    section = settings or SETTINGS[stage]
    present = [flag for flag in stage_flags(section) if flag.name in values]
    usual = getattr(load_recipe(_TUTORIAL), stage).model_dump(exclude_unset=True)
    asked: dict[str, Any] = {"run": {"hpu": {}}, "settings": deepcopy(usual)}
    for flag in present:
        if flag.field:
            *above, key = flag.field
            reduce(getitem, above, asked)[key] = values[flag.name]
    run, parts = asked["run"], asked["settings"]
    of_data = data_settings({**values, "revision": values.get("dataset_revision")})
    parts["data"] = named_data(values["dataset_name"], of_data)
    parts["batch_size"], batch_notice = _global_batch(stage, values, devices)
    _settle_duration(parts, values)
    _settle_warmup(parts, values)
    _settle_methods(parts, values)
    if parts.get("full"):
        _without_lora(parts, present)
    else:
        _settle_lora(stage, parts["lora"], values)
    length_notice = _settle_lengths(parts, usual["max_prompt_length"], values)
    parts["max_grad_norm"] = parts.get("max_grad_norm", 1.0) or None
    run |= {"device": _device(values, cards), "dtype": _dtype(values)}
    on_gaudi = run["device"] == "hpu" or (run["device"] == "auto" and cards)
    run["hpu"] = {**run["hpu"], "buckets": _buckets(values)} if on_gaudi else {}
    names = {flag.field: f"--{flag.name}" for flag in present}
    job = TrainingJob(
        _validated(RunSettings, "run", asked, names, stage),
        _validated(section, "settings", asked, names, stage),
    )
    return job, (*_ineffective(stage, values, on_gaudi), *batch_notice, *length_notice)


def _global_batch(
    stage: TrainingStageName, values: Values, devices: int
) -> tuple[int, tuple[str, ...]]:
    factors = ("per_device_train_batch_size", "gradient_accumulation_steps")
    named = [name for name in factors if name in values]
    if "batch_size" in values:
        if named:
            raise UserError(
                f"--batch_size and --{named[0]} are both given. --batch_size is the global batch, "
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


def _settle_duration(settings: dict[str, Any], values: Values) -> None:
    """Keep one of `epochs` and `max_steps`: the one that is given."""
    epochs, steps = values.get("num_train_epochs"), values.get("max_steps")
    steps = None if steps == -1 else steps  # the tutorial's libraries write -1 for "not set"
    if epochs is not None and steps is not None:
        raise UserError("--num_train_epochs and --max_steps are both given; keep one")
    if steps is not None:
        settings["epochs"] = None
    elif epochs is not None or "max_steps" in values:
        settings["max_steps"] = None
        settings.setdefault("epochs", 1.0)


def _settle_warmup(settings: dict[str, Any], values: Values) -> None:
    """Keep one of `warmup_steps` and `warmup_ratio`: the one that is given and not 0."""
    warmup = {name: values[name] for name in ("warmup_steps", "warmup_ratio") if name in values}
    if len(warmup) == 2:
        if all(warmup.values()):
            raise UserError("--warmup_steps and --warmup_ratio are both given; keep one")
        warmup = {name: value for name, value in warmup.items() if value} or {"warmup_steps": 0}
    if not warmup and values.get("lr_scheduler_type") == "constant":
        warmup = {"warmup_steps": 0}
    if warmup:
        settings |= {"warmup_steps": None, "warmup_ratio": None, **warmup}


def _settle_methods(settings: dict[str, Any], values: Values) -> None:
    """Read the weights of losses; leave out what the tutorial sets and these methods do not use."""
    losses = settings.get("loss")
    if isinstance(losses, list):
        if len(losses) == 1 and "=" not in losses[0]:
            settings["loss"] = losses[0]
        else:
            example = "--loss sigmoid=1 sft=0.1"
            settings["loss"] = pairs_of("loss", losses, "NAME=WEIGHT", example)
        if "beta" not in values and not uses_beta(settings["loss"]):
            settings.pop("beta", None)
    own = (settings.get("optimizer", "adamw"), settings.get("lr_scheduler", "cosine"))
    for key in without_effect(*own).keys() - values.keys():
        settings.pop(key, None)


def _without_lora(settings: dict[str, Any], present: Sequence[Flag]) -> None:
    """Leave out the tutorial's adapter under --full; UserError for flags of one."""
    named = [flag.name for flag in present if flag.name.startswith("lora_")]
    if named:
        raise UserError(
            f"--{named[0]} is of an adapter, and --full true trains all weights; keep one of them"
        )
    settings.pop("lora", None)


def _settle_lora(stage: TrainingStageName, lora: dict[str, Any], values: Values) -> None:
    """Name modules in one way; in DPO, set dropout to 0."""
    modules, all_linear = values.get("lora_target_modules"), values.get("lora_all_linear")
    if modules == ["all-linear"]:
        modules, all_linear = None, True
    if modules and all_linear:
        raise UserError("--lora_all_linear true and --lora_target_modules are both given; keep one")
    if all_linear:
        lora["target_modules"] = "all-linear"
    if lora.get("from") is not None:
        # the adapter has its own
        given = {key for key in lora if f"lora_{key}" in values}
        given |= {"target_modules"} if all_linear else set()
        for key in (FIXED & lora.keys()) - given:
            del lora[key]
    for key, (form, example) in _PATTERNS.items():
        if (texts := values.get(f"lora_{key}")) is not None:
            lora[key] = pairs_of(f"lora_{key}", texts, form, example)
    if stage == "dpo":
        if not 0 <= lora["dropout"] < 1:
            raise UserError(f"--lora_dropout is {lora['dropout']}, but it must be in [0, 1)")
        lora["dropout"] = 0.0


def _settle_lengths(settings: dict[str, Any], usual: int, values: Values) -> tuple[str, ...]:
    """Read both names of the length; return a notice if the prompt's had to change."""
    both = [values[name] for name in ("max_length", "max_seq_length") if name in values]
    if len(set(both)) > 1:
        raise UserError(
            f"--max_length {both[0]} and --max_seq_length {both[1]} are two names of one thing; "
            "keep one"
        )
    length = settings["max_length"] = both[0] if both else settings["max_length"]
    if "max_prompt_length" in values or usual < length:
        return ()
    half = settings["max_prompt_length"] = max(1, length // 2)
    return (
        f"--max_prompt_length is {half}, half of --max_length: the usual {usual} would leave no "
        "room for an answer",
    )


def _device(values: Values, cards: bool) -> str:
    """Return the device of --device and --use_habana together."""
    device, habana = str(values.get("device", "auto")), values.get("use_habana")
    if device == "hpu" and habana is False:
        raise UserError("--use_habana false and --device hpu contradict each other; keep one")
    if not cards or habana is None:
        return device
    if device not in ("auto", "hpu") and habana:
        raise UserError(f"--use_habana and --device {device} contradict each other; keep one")
    if device != "auto":
        return device
    return "hpu" if habana else "cpu"


def _buckets(values: Values) -> str | list[str]:
    """Return the lengths of micro-batches on Gaudi."""
    lengths = list(values.get("hpu_buckets", ["auto"]))
    if values.get("pad_max"):
        if "hpu_buckets" in values:
            raise UserError("--pad_max is one length, and --hpu_buckets says others; keep one")
        lengths = ["max"]
    if lengths in (["auto"], ["max"]):
        return lengths[0]
    if not all(text.isdigit() and int(text) > 0 for text in lengths):
        raise UserError(
            f"--hpu_buckets is {' '.join(lengths)!r}, but it must be numbers above 0, or auto"
        )
    return lengths


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
    model: type[Any],
    part: str,
    asked: Mapping[str, Any],
    names: Mapping[tuple[str, ...], str],
    stage: TrainingStageName,
) -> Any:
    """Return a part of the job as settings; raise UserError naming the flag of a wrong value."""

    def place(location: Location) -> str:
        keys = (part, *(str(key) for key in location))
        own = (names.get(keys[:n]) for n in range(len(keys), 0, -1))
        return next(filter(None, own), f"tandem {stage}")

    try:
        return model.model_validate(asked[part])
    except ValidationError as error:
        raise UserError(explain(error, model, place)) from error
