"""From the seed's flags to a recipe section: one call of a training stage.

A flag that is left out has the value of the seed's recipe.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from tandem.errors import UserError
from tandem.recipe.explain_errors import explain
from tandem.recipe.flags import FLAGS, Stage, flags_of, named_data, said_of_data
from tandem.recipe.recipe import HpuSettings, checked_engine
from tandem.recipe.training_settings import DpoSettings, SftSettings
from tandem.recipe.yaml_lines import Location

Values = Mapping[str, Any]
"""Flags that were given, by name with underscores, converted to their types."""

# What the seed's recipe says, stage by stage, for flags that are left out.
_SEED: dict[Stage, dict[str, Any]] = {
    "sft": {
        "learning_rate": 1e-4,
        "lr_scheduler": "cosine",
        "weight_decay": 0.0,
        "adam_epsilon": 1e-6,
        "max_length": 2560,
        "max_prompt_length": 1024,
        "logging_steps": 10,
        "save_steps": 1000,
        "save_total_limit": 10,
    },
    "dpo": {
        "learning_rate": 5e-4,
        "lr_scheduler": "cosine",
        "beta": 0.1,
        "max_length": 1536,
        "max_prompt_length": 1024,
        "gradient_checkpointing": True,
        "logging_steps": 10,
        "save_steps": 10,
    },
}
_SEED_DURATION: dict[Stage, dict[str, Any]] = {"sft": {"epochs": 2.0}, "dpo": {"max_steps": 1000}}
_SEED_WARMUP: dict[Stage, dict[str, Any]] = {
    "sft": {"warmup_ratio": 0.03},
    "dpo": {"warmup_steps": 100},
}
_SEED_BATCH: dict[Stage, tuple[int, int]] = {"sft": (1, 8), "dpo": (8, 8)}
_SEED_LORA: dict[Stage, tuple[float, float, tuple[str, ...]]] = {  # alpha, dropout, modules
    "sft": (64.0, 0.05, ("q_proj", "k_proj", "v_proj", "o_proj")),
    "dpo": (16.0, 0.0, ("k_proj", "q_proj", "v_proj")),
}

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


@dataclass(frozen=True, slots=True)
class StageCall:
    """What a stage command is asked to do, ready for the stage's function.

    `notices` has one line for every flag that was given and cannot act, and for the global batch.
    """

    model: str
    revision: str | None
    output_dir: Path
    chat_template: str | None
    added_tokens: tuple[str, ...]
    seed: int
    settings: SftSettings | DpoSettings
    device: str
    dtype: str
    bf16: bool | None
    attention: str
    tokens_per_microbatch: int | Literal["auto"]
    engine: str
    timeout_minutes: int
    quantization: str | None
    compile: bool
    hpu: HpuSettings
    notices: tuple[str, ...]


def stage_call(stage: Stage, values: Values, *, devices: int = 1, gaudi: bool = False) -> StageCall:
    """Turn the flags that were given into a stage's settings.

    Args:
        stage: sft or dpo.
        values: the flags given, by name with underscores; absent ones take the seed's values.
        devices: how many devices take part; a factor of the global batch.
        gaudi: whether Habana's bridge is installed, so that `auto` may find Gaudi cards.

    Raises UserError naming the flags for missing, contradicting or impossible values.
    """
    required = ("model_name_or_path", "dataset_name", "output_dir")
    if missing := [f"--{name}" for name in required if not values.get(name)]:
        raise UserError(f"tandem {stage} needs {', '.join(missing)}")
    batch_size, batch_notice = _global_batch(stage, values, devices)
    direct = {
        flag.key: values[flag.name] for flag in flags_of(stage) if flag.key and flag.name in values
    }
    section: dict[str, Any] = {
        **_SEED[stage],
        **direct,
        **_duration(stage, values),
        **_warmup(stage, values),
        "data": named_data(
            values["dataset_name"],
            said_of_data({**values, "revision": values.get("dataset_revision")}),
        ),
        "batch_size": batch_size,
        "lora": _lora(stage, values),
    }
    section["max_length"], section["max_prompt_length"], length_notice = _lengths(stage, values)
    device = _device(values, gaudi)
    on_gaudi = device == "hpu" or (device == "auto" and gaudi)
    if "max_grad_norm" in values:
        section["max_grad_norm"] = values["max_grad_norm"] or None
    return StageCall(
        model=values["model_name_or_path"],
        revision=values.get("model_revision"),
        output_dir=Path(values["output_dir"]),
        chat_template=values.get("chat_template"),
        added_tokens=tuple(values.get("added_tokens", ())),
        seed=_seed(values),
        settings=_validated(stage, section, values),
        device=device,
        dtype=_dtype(values),
        bf16=values.get("bf16"),
        attention=values.get("attention", "auto"),
        tokens_per_microbatch=_token_budget(values),
        engine=_engine(values),
        timeout_minutes=_positive("timeout_minutes", values.get("timeout_minutes", 60)),
        quantization=values.get("quantization"),
        compile=values.get("compile", False),
        hpu=_hpu(values) if on_gaudi else HpuSettings(),
        notices=(*_ineffective(stage, values, on_gaudi), *batch_notice, *length_notice),
    )


def _global_batch(stage: Stage, values: Values, devices: int) -> tuple[int, tuple[str, ...]]:
    factors = ("per_device_train_batch_size", "gradient_accumulation_steps")
    given = [name for name in factors if name in values]
    if "batch_size" in values:
        if given:
            raise UserError(
                f"--batch_size and --{given[0]} are both given. --batch_size is the global batch, "
                "the other one a factor of it; keep one way"
            )
        return _positive("batch_size", values["batch_size"]), ()
    seeds = dict(zip(factors, _SEED_BATCH[stage], strict=True))
    per_device, accumulation = (_positive(name, values.get(name, seeds[name])) for name in factors)
    total = per_device * accumulation * devices
    notice = (
        f"global batch: {per_device} per device x {accumulation} accumulation x {devices} "
        f"device{'s' if devices > 1 else ''} = {total} examples a step"
    )
    return total, (notice,)


def _duration(stage: Stage, values: Values) -> dict[str, Any]:
    epochs, steps = values.get("num_train_epochs"), values.get("max_steps")
    steps = None if steps == -1 else steps  # the seed's libraries write -1 for "not set"
    if epochs is not None and steps is not None:
        raise UserError("--num_train_epochs and --max_steps are both given; keep one")
    if steps is not None:
        return {"max_steps": steps}
    if epochs is not None:
        return {"epochs": epochs}
    return {"epochs": 1.0} if "max_steps" in values and stage == "dpo" else _SEED_DURATION[stage]


def _warmup(stage: Stage, values: Values) -> dict[str, Any]:
    given = {name: values[name] for name in ("warmup_steps", "warmup_ratio") if name in values}
    if len(given) == 2:
        if all(given.values()):
            raise UserError("--warmup_steps and --warmup_ratio are both given; keep one")
        given = {name: value for name, value in given.items() if value} or {"warmup_steps": 0}
    if not given and values.get("lr_scheduler_type") == "constant":
        return {"warmup_steps": 0}
    return given or _SEED_WARMUP[stage]


def _lora(stage: Stage, values: Values) -> dict[str, Any]:
    alpha, dropout, seed_modules = _SEED_LORA[stage]
    modules, all_linear = values.get("lora_target_modules"), values.get("lora_all_linear")
    if modules == ["all-linear"]:
        modules, all_linear = None, True
    if modules and all_linear:
        raise UserError("--lora_all_linear true and --lora_target_modules are both given; keep one")
    if stage == "sft":
        dropout = values.get("lora_dropout", dropout)
    elif not 0 <= values.get("lora_dropout", 0.0) < 1:
        raise UserError(f"--lora_dropout is {values['lora_dropout']}, but it must be in [0, 1)")
    return {
        "rank": values.get("lora_rank", 16),
        "alpha": values.get("lora_alpha", alpha),
        "dropout": dropout,
        "target_modules": "all-linear" if all_linear else tuple(modules or seed_modules),
    }


def _lengths(stage: Stage, values: Values) -> tuple[int, int, tuple[str, ...]]:
    """Tokens of a sequence and of its prompt, and what had to change about the seed's."""
    given = [values[name] for name in ("max_length", "max_seq_length") if name in values]
    if len(set(given)) > 1:
        raise UserError(
            f"--max_length {given[0]} and --max_seq_length {given[1]} are two names of one thing; "
            "keep one"
        )
    length = int(given[0]) if given else int(_SEED[stage]["max_length"])
    usual = int(_SEED[stage]["max_prompt_length"])
    if "max_prompt_length" in values or usual < length:
        return length, int(values.get("max_prompt_length", usual)), ()
    half = max(1, length // 2)
    notice = (
        f"--max_prompt_length is {half}, half of --max_length: the usual {usual} would leave no "
        "room for an answer"
    )
    return length, half, (notice,)


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


def _hpu(values: Values) -> HpuSettings:
    """The hpu section that the flags stand for."""
    lengths = list(values.get("hpu_buckets", ["auto"]))
    if values.get("pad_max"):
        if "hpu_buckets" in values:
            raise UserError("--pad_max is one length, and --hpu_buckets says others; keep one")
        lengths = ["max"]
    if lengths not in (["auto"], ["max"]) and not all(
        text.isdigit() and int(text) > 0 for text in lengths
    ):
        raise UserError(
            f"--hpu_buckets is {' '.join(lengths)!r}, but it must be numbers above 0, or auto"
        )
    return HpuSettings(
        lazy_mode=values.get("use_lazy_mode", False),
        buckets=lengths[0] if lengths[0] in ("auto", "max") else tuple(map(int, lengths)),
        fused_attention=values.get("hpu_fused_attention", False),
        fused_optimizer=values.get("hpu_fused_optimizer", False),
    )


def _dtype(values: Values) -> str:
    dtype, bf16 = str(values.get("dtype", "auto")), values.get("bf16")
    if bf16 and dtype not in ("auto", "bfloat16"):
        raise UserError(f"--bf16 and --dtype {dtype} contradict each other; keep one")
    if bf16 is False and dtype == "bfloat16":
        raise UserError("--bf16 false and --dtype bfloat16 contradict each other; keep one")
    # Without bf16 the seed's scripts train in float32.
    return "float32" if bf16 is False and dtype == "auto" else dtype


def _token_budget(values: Values) -> int | Literal["auto"]:
    given = str(values.get("tokens_per_microbatch", "auto"))
    if given == "auto":
        return "auto"
    if not given.isdigit() or int(given) == 0:
        raise UserError(f"--tokens_per_microbatch is {given!r}, but it must be a number or auto")
    return int(given)


def _engine(values: Values) -> str:
    try:
        return checked_engine(str(values.get("engine", "auto")))
    except ValueError as error:
        raise UserError(f"--engine: {error}") from error


def _seed(values: Values) -> int:
    seed = int(values.get("seed", 42))
    if not 0 <= seed < 2**32:
        raise UserError(f"--seed is {seed}, but it must be from 0 to {2**32 - 1}")
    return seed


def _positive(name: str, value: int) -> int:
    if value <= 0:
        raise UserError(f"--{name} is {value}, but it must be above 0")
    return int(value)


def _ineffective(stage: Stage, values: Values, on_gaudi: bool) -> Iterable[str]:
    for name, reason in _NOTICES.items():
        if values.get(name) and not on_gaudi:
            yield f"--{name} does nothing here: {reason}"
    if stage == "dpo" and values.get("lora_dropout"):
        yield (
            "--lora_dropout does nothing here: dropout is off in DPO, because prompts are shared "
            "between both answers and the reference must equal the policy at the start"
        )


def _validated(stage: Stage, section: dict[str, Any], values: Values) -> SftSettings | DpoSettings:
    names = {flag.key: flag.name for flag in FLAGS if flag.key}
    names |= {"epochs": "num_train_epochs"}

    def place(location: Location) -> str:
        parts = [str(part) for part in location]
        name = names.get(parts[-1], "_".join(parts)) if parts else ""
        return f"--{name}" if name in values else f"tandem {stage}"

    model: type[SftSettings] | type[DpoSettings] = SftSettings if stage == "sft" else DpoSettings
    try:
        return model.model_validate(section)
    except ValidationError as error:
        raise UserError(explain(error, model, place)) from error
