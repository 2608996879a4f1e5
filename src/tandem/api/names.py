"""Keyword arguments by other libraries' names: those that mean the same, and those that do not.

Tandem's own names are the keys of recipes. A name of TRL's or peft's that means the same as a key
is taken for it; one that means something else is an error that says what to write. A test compares
the tables with TRL's and peft's own configurations.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from tandem.errors import UserError, nearest

# TRL's names of settings that have another name here.
SAME_AS_TRL: dict[str, str] = {
    "num_train_epochs": "epochs",
    "lr_scheduler_type": "lr_scheduler",
    "neftune_noise_alpha": "neftune_alpha",
    "torch_compile": "compile",
    "report_to": "trackers",
}
# peft's names of an adapter's settings that have another name here.
SAME_AS_PEFT: dict[str, str] = {
    "r": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "use_rslora": "rslora",
    "use_dora": "dora",
}
_BATCH = (
    "write batch_size: the examples of one optimizer step, which are per_device_train_batch_size "
    "x gradient_accumulation_steps x devices. What is computed at once follows from the memory"
)
_PRECISION = "write dtype, for instance dtype='bfloat16'"
_VALIDATION = "write validation, for instance validation={'fraction': 0.05, 'steps': 50}"
_PACKED = "examples are always packed, without padding; leave it out"
_TRAINED = "write loss_on='answers', or loss_on='text' for every token"
_ENGINE = "write engine, for instance engine='fsdp2'"
_LEAVE = "the same call resumes by itself; leave it out"
# TRL's names that mean something else here, or are not needed, each with what to write.
NOT_AS_TRL: dict[str, str] = {
    "per_device_train_batch_size": _BATCH,
    "gradient_accumulation_steps": _BATCH,
    "per_device_eval_batch_size": "held-out records are packed as others are; leave it out",
    "loss_type": "write loss, for instance loss='ipo'",
    "loss_weights": "write the weights into loss: loss={'sigmoid': 1.0, 'sft': 0.1}",
    "optim": "write optimizer, for instance optimizer='adamw'",
    "bf16": _PRECISION,
    "fp16": _PRECISION,
    "model_init_kwargs": "write dtype, attention, quantization or model_revision themselves",
    "peft_config": "write lora=tandem.LoRA(r=...), or full=True to train all weights",
    "args": "write the settings as keyword arguments of this call",
    "train_dataset": "the data is the second argument",
    "eval_dataset": _VALIDATION,
    "eval_strategy": _VALIDATION,
    "eval_steps": _VALIDATION,
    "processing_class": "the model's own tokenizer is used; chat_template names a template",
    "ref_model": "the reference is the model that training starts from; leave it out",
    "precompute_ref_log_probs": "they always are, and kept; leave it out",
    "packing": _PACKED,
    "padding_free": _PACKED,
    "assistant_only_loss": _TRAINED,
    "completion_only_loss": _TRAINED,
    "truncation_mode": "write too_long='keep_start' or too_long='keep_end'",
    "load_best_model_at_end": "write keep='best', with validation",
    "metric_for_best_model": "write best_metric='loss', 'accuracy' or 'margin'",
    "resume_from_checkpoint": _LEAVE,
    "use_cpu": "write device='cpu'",
    "deepspeed": _ENGINE,
    "fsdp": _ENGINE,
    "disable_tqdm": "write quiet=True",
    "disable_dropout": "it always is in preference training; leave it out",
}
NOT_AS_PEFT: dict[str, str] = {
    "init_lora_weights": "write init='zero', 'pissa' or 'pissa_fast'",
    "task_type": "it is always a causal language model; leave it out",
    "bias": "biases are trained as whole modules: modules_to_save=[...]",
}


def by_own_names(
    call: str,
    given: Mapping[str, Any],
    known: Collection[str],
    same: Mapping[str, str],
    others: Mapping[str, str],
) -> dict[str, Any]:
    """Return keyword arguments by the keys of recipes.

    Args:
        call: the function that was called, for messages.
        given: its keyword arguments.
        known: the keys that it has.
        same: other names of the same meaning, each with the key.
        others: names of another meaning, each with what to write.

    Raises UserError for a name of neither kind, and for a setting that is given twice.
    """
    named: dict[str, Any] = {}
    spelled: dict[str, str] = {}
    for name, value in given.items():
        key = same.get(name, name) if name not in known else name
        if key not in known:
            if name in others:
                raise UserError(f"{call}() has no {name}: {others[name]}")
            names = [*known, *(one for one in same if same[one] in known)]
            raise UserError(f"{call}() has no setting {name}.{nearest(name, names)}")
        if key in named:
            raise UserError(
                f"{call}(): {spelled[key]} and {name} are the same setting; keep one of them"
            )
        named[key], spelled[key] = value, name
    return named
