"""TRL's trainers, fed tandem's token ids in tandem's order: configured well, and as they come."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tandem.data.encoded.example import Example

from .plain import load_model, lora_config
from .work import (
    ADAPTERS,
    BETA,
    CHOSEN_WEIGHT,
    LEARNING_RATE,
    MAX_LENGTH,
    SEED,
    Ran,
    Work,
    trained_tokens,
)


@dataclass
class _Seen:
    """The clock of the reference pass, and the micro-batches of the first step."""

    reference_seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    logps: float = 0.0  # of all answers


def run_trl(work: Work, trees: Sequence[Example], tokenizer: Any) -> Ran:
    """One epoch over the records."""
    import datasets

    datasets.disable_progress_bars()
    seen = _Seen()
    trainer = (_dpo if work.stage == "dpo" else _sft)(work, trees, tokenizer, seen)
    if work.side != "trl-default":
        _check(trainer)
    loop = float(trainer.train().metrics["train_runtime"])
    arguments = trainer.args
    micro_batches = len(trainer.get_train_dataloader())
    records = arguments.train_batch_size * arguments.gradient_accumulation_steps
    if work.side == "trl-packed":
        # Rows hold records in an order of their own.
        records = len(trees) if micro_batches <= arguments.gradient_accumulation_steps else 0
    records = min(records, len(trees))
    loss = sum(seen.losses)
    logps = seen.logps / max(1, trained_tokens(trees[:records]))
    return Ran(
        loop_seconds=loop,
        reference_seconds=seen.reference_seconds,
        first_records=records,
        first_loss=loss,
        first_logp=logps if work.stage == "dpo" else -loss,
        live_reference=work.stage == "dpo" and work.side == "trl-default",
        bfloat16=bool(arguments.bf16),
    )


def _watched(trainer: Any, seen: _Seen) -> Any:
    """A trainer that takes tokens as they are, and notes what `_Seen` holds."""

    class Watched(trainer):  # type: ignore[misc]
        def training_step(self, model: Any, inputs: Any, *rest: Any, **named: Any) -> Any:
            loss = super().training_step(model, inputs, *rest, **named)
            if len(seen.losses) < self.args.gradient_accumulation_steps and not (
                self.state.global_step
            ):
                seen.losses.append(float(loss))
                means = self._metrics["train"]
                if "logps/chosen" in means:
                    mean = CHOSEN_WEIGHT * means["logps/chosen"][-1] + means["logps/rejected"][-1]
                    seen.logps += mean * (inputs["input_ids"].shape[0] // 2)
            return loss

        def _precompute_ref_logps(self, *arguments: Any, **named: Any) -> Any:
            began = time.perf_counter()
            found = super()._precompute_ref_logps(*arguments, **named)
            seen.reference_seconds = time.perf_counter() - began
            return found

    return Watched


def _dpo(work: Work, trees: Sequence[Example], tokenizer: Any, seen: _Seen) -> Any:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    class Fed(_watched(DPOTrainer, seen)):  # type: ignore[misc]
        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset

    arguments = _arguments(work)
    if work.side != "trl-default":
        arguments |= {
            "beta": BETA,
            "precompute_ref_log_probs": True,
            "precompute_ref_batch_size": work.size,
        }
    return Fed(
        args=DPOConfig(**arguments, max_length=MAX_LENGTH),
        train_dataset=Dataset.from_list([_pair_row(tree) for tree in trees]),
        processing_class=tokenizer,
        **_model(work),
    )


def _sft(work: Work, trees: Sequence[Example], tokenizer: Any, seen: _Seen) -> Any:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows = [_labelled_row(tree) for tree in trees]
    arguments = _arguments(work)
    if work.side == "trl-packed":
        # A shorter row would cut the longest record in two.
        length = max(work.size, *(len(row["input_ids"]) for row in rows))
        packs = -(-sum(len(row["input_ids"]) for row in rows) // length)
        arguments |= {
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": max(1, round(packs * work.batch_size / len(rows))),
            "max_length": length,
            "packing": True,
            "packing_strategy": "bfd",
        }
    else:
        arguments |= {"max_length": MAX_LENGTH}
    return _watched(SFTTrainer, seen)(
        args=SFTConfig(**arguments),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        **_model(work),
    )


def _arguments(work: Work) -> dict[str, Any]:
    """What the same data on this device needs, and unless for `trl-default` what makes it fast."""
    arguments: dict[str, Any] = {
        "output_dir": str(Path(work.scratch) / "trl"),
        "use_cpu": work.device == "cpu",
        "num_train_epochs": 1,
        "train_sampling_strategy": "sequential",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    if work.side == "trl-default":
        return arguments
    return arguments | {
        "bf16": work.dtype == torch.bfloat16,
        "activation_checkpointing": False,
        "use_liger_kernel": work.side == "trl-liger",
        "per_device_train_batch_size": work.size,
        "gradient_accumulation_steps": max(1, work.batch_size // max(1, work.size)),
        "learning_rate": LEARNING_RATE,
        "max_grad_norm": 1.0,
        "seed": SEED,
        "logging_strategy": "no",
    }


def _model(work: Work) -> dict[str, Any]:
    if work.side == "unsloth":
        return {"model": _unsloth_model(work)}
    # A path is loaded in TRL's own dtype.
    model = work.model if work.side == "trl-default" else load_model(work)
    return {"model": model, "peft_config": lora_config(work.stage)}


def _unsloth_model(work: Work) -> Any:
    from unsloth import FastLanguageModel

    adapter = ADAPTERS[work.stage]
    model, _ = FastLanguageModel.from_pretrained(
        model_name=work.model, max_seq_length=MAX_LENGTH, dtype=work.dtype, load_in_4bit=False
    )
    return FastLanguageModel.get_peft_model(
        model,
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        lora_dropout=0.0,
        target_modules=list(adapter.targets),
        bias="none",
        use_gradient_checkpointing=False,
        random_state=SEED,
    )


def _check(trainer: Any) -> None:
    arguments = trainer.args
    low = arguments.bf16 and arguments.use_cpu
    if arguments.gradient_checkpointing or low or arguments.fp16:
        raise SystemExit("TRL is not in the configuration that the table names")


def _pair_row(tree: Example) -> dict[str, list[int]]:
    chosen, rejected = tree.sequence(0), tree.sequence(1)
    # Answers start at the same place, be it inside the shared prefix or at its end.
    start = int(chosen.trained.argmax())
    return {
        "prompt_ids": chosen.input_ids[:start].tolist(),
        "chosen_ids": chosen.input_ids[start:].tolist(),
        "rejected_ids": rejected.input_ids[start:].tolist(),
    }


def _labelled_row(tree: Example) -> dict[str, list[int]]:
    sequence = tree.sequence(0)
    labels = [
        int(token) if trained else -100
        for token, trained in zip(sequence.input_ids, sequence.trained, strict=True)
    ]
    return {"input_ids": sequence.input_ids.tolist(), "labels": labels}
