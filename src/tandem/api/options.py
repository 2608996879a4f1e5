"""Keyword arguments of the API, for type checkers and editors.

Made by `python -m tandem.api.make_options > src/tandem/api/options.py`; do not edit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from typing import Any, Literal, TypedDict

from tandem.recipe.choices import (
    AttentionName,
    BestMetric,
    DeviceName,
    DtypeName,
    KeptAdapter,
    LoraInit,
    LossOn,
    OnBadRecord,
    OptimizerName,
    Quantization,
    Scheduler,
    SftLoss,
    Suite,
    TooLong,
    TrackerName,
)
from tandem.recipe.lora_settings import LoraSettings

Loss = str | Callable[..., Any] | Mapping[str | Callable[..., Any], float]


class SftOptions(TypedDict, total=False):
    """Settings of `tandem.sft`."""

    batch_size: int
    epochs: float | None
    max_steps: int | None
    optimizer: OptimizerName
    learning_rate: float
    lr_scheduler: Scheduler
    min_lr_ratio: float
    decay_ratio: float
    lr_power: float
    warmup_steps: int | None
    warmup_ratio: float | None
    weight_decay: float
    adam_beta1: float
    adam_beta2: float
    adam_epsilon: float
    lion_beta1: float
    lion_beta2: float
    muon_momentum: float
    max_grad_norm: float | None
    full: bool
    save_dtype: DtypeName
    ema_decay: float | None
    lora: LoraSettings | Mapping[str, Any]
    max_length: int
    too_long: TooLong
    max_prompt_length: int | None
    gradient_checkpointing: bool
    logging_steps: int
    save_steps: int | None
    save_total_limit: int | None
    max_dropped: float
    validation: Mapping[str, Any] | None
    keep: KeptAdapter
    best_metric: Literal["loss"]
    early_stopping: Mapping[str, Any] | None
    samples: Mapping[str, Any] | None
    on_bad_record: OnBadRecord
    loss: SftLoss
    loss_on: LossOn
    neftune_alpha: float | None
    name: str
    description: str
    model_revision: str | None
    chat_template: str | None
    added_tokens: Sequence[str]
    seed: int
    device: DeviceName
    dtype: DtypeName
    attention: AttentionName
    tokens_per_microbatch: int | Literal["auto"]
    engine: str
    timeout_minutes: int
    quantization: Quantization | None
    compile: bool
    callbacks: Sequence[str]
    trackers: Sequence[TrackerName]
    tracker_project: str | None
    tracker_run: str | None
    hpu: Mapping[str, Any]
    num_train_epochs: float | None
    lr_scheduler_type: Scheduler
    neftune_noise_alpha: float | None
    torch_compile: bool
    report_to: Sequence[TrackerName]


class DpoOptions(TypedDict, total=False):
    """Settings of `tandem.dpo`."""

    batch_size: int
    epochs: float | None
    max_steps: int | None
    optimizer: OptimizerName
    learning_rate: float
    lr_scheduler: Scheduler
    min_lr_ratio: float
    decay_ratio: float
    lr_power: float
    warmup_steps: int | None
    warmup_ratio: float | None
    weight_decay: float
    adam_beta1: float
    adam_beta2: float
    adam_epsilon: float
    lion_beta1: float
    lion_beta2: float
    muon_momentum: float
    max_grad_norm: float | None
    full: bool
    save_dtype: DtypeName
    ema_decay: float | None
    lora: LoraSettings | Mapping[str, Any]
    max_length: int
    too_long: TooLong
    max_prompt_length: int | None
    gradient_checkpointing: bool
    logging_steps: int
    save_steps: int | None
    save_total_limit: int | None
    max_dropped: float
    validation: Mapping[str, Any] | None
    keep: KeptAdapter
    best_metric: BestMetric
    early_stopping: Mapping[str, Any] | None
    samples: Mapping[str, Any] | None
    on_bad_record: OnBadRecord
    loss: Loss
    beta: float
    label_smoothing: float
    f_divergence_type: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"]
    f_alpha_divergence_coef: float
    ld_alpha: float | None
    simpo_gamma: float
    cpo_alpha: float
    dpop_lambda: float
    discopop_tau: float
    desirable_weight: float
    undesirable_weight: float
    score_temperature: float
    name: str
    description: str
    model_revision: str | None
    chat_template: str | None
    added_tokens: Sequence[str]
    seed: int
    device: DeviceName
    dtype: DtypeName
    attention: AttentionName
    tokens_per_microbatch: int | Literal["auto"]
    engine: str
    timeout_minutes: int
    quantization: Quantization | None
    compile: bool
    callbacks: Sequence[str]
    trackers: Sequence[TrackerName]
    tracker_project: str | None
    tracker_run: str | None
    hpu: Mapping[str, Any]
    num_train_epochs: float | None
    lr_scheduler_type: Scheduler
    torch_compile: bool
    report_to: Sequence[TrackerName]


class LoraOptions(TypedDict, total=False):
    """Settings of `tandem.LoRA`."""

    rank: int
    alpha: float
    dropout: float
    target_modules: Sequence[str] | Literal["all-linear"]
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    rslora: bool
    dora: bool
    plus_ratio: float
    init: LoraInit
    modules_to_save: Sequence[str]
    r: int
    lora_alpha: float
    lora_dropout: float
    use_rslora: bool
    use_dora: bool
    start: str | PathLike[str]


class EvaluationOptions(TypedDict, total=False):
    """Settings of `tandem.evaluate`."""

    max_new_tokens: int
    samples: int
    suite: Suite | None
    tasks: Sequence[str]
    task_data: str | None
    num_fewshot: int | None
    chat: bool
    judge: Mapping[str, Any] | None
    batch_size: int | Literal["auto"]
    limit: int | None
    chat_template: str | None
    device: DeviceName
    dtype: DtypeName
    attention: AttentionName
