"""TRL's trainers, configured for speed on a CPU and fed tandem's token ids."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tandem.data.records import Tree

from .plain import load_model, lora_config
from .work import BETA, LEARNING_RATE, MAX_LENGTH, SEED, Work


def run_trl(work: Work, trees: Sequence[Tree], tokenizer: Any) -> tuple[float, float]:
    """One epoch; returns the seconds of the loop and of the reference pass."""
    import datasets

    datasets.disable_progress_bars()
    if work.stage == "dpo":
        return _dpo(work, trees, tokenizer)
    trainer = _sft_trainer(work, trees, tokenizer)
    return _train(trainer), 0.0


def _arguments(work: Work, micro_batch: int, accumulation: int) -> dict[str, Any]:
    return {
        "output_dir": str(Path(work.scratch) / "trl"),
        "use_cpu": True,
        "bf16": False,
        "activation_checkpointing": False,
        "per_device_train_batch_size": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "num_train_epochs": 1,
        "learning_rate": LEARNING_RATE,
        "max_grad_norm": 1.0,
        "seed": SEED,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def _dpo(work: Work, trees: Sequence[Tree], tokenizer: Any) -> tuple[float, float]:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    reference_seconds = 0.0

    class Fed(DPOTrainer):  # type: ignore[misc]
        """Takes tokens as they are, and a clock to the reference pass."""

        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset

        def _precompute_ref_logps(self, *arguments: Any, **named: Any) -> Any:
            nonlocal reference_seconds
            began = time.perf_counter()
            found = super()._precompute_ref_logps(*arguments, **named)
            reference_seconds = time.perf_counter() - began
            return found

    arguments = _arguments(work, work.size, max(1, work.batch_size // work.size))
    trainer = Fed(
        model=load_model(work.model),
        args=DPOConfig(
            **arguments,
            beta=BETA,
            max_length=MAX_LENGTH,
            precompute_ref_log_probs=True,
            precompute_ref_batch_size=work.size,
        ),
        train_dataset=Dataset.from_list([_pair_row(tree) for tree in trees]),
        processing_class=tokenizer,
        peft_config=lora_config(),
    )
    _check(trainer)
    return _train(trainer), reference_seconds


def _sft_trainer(work: Work, trees: Sequence[Tree], tokenizer: Any) -> Any:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows = [_labelled_row(tree) for tree in trees]
    if work.side == "trl-packed":
        # A shorter row would cut the longest record in two.
        length = max(work.size, *(len(row["input_ids"]) for row in rows))
        packs = -(-sum(len(row["input_ids"]) for row in rows) // length)
        arguments = _arguments(work, 1, max(1, round(packs * work.batch_size / len(rows))))
        arguments |= {"max_length": length, "packing": True, "packing_strategy": "bfd"}
    else:
        arguments = _arguments(work, work.size, max(1, work.batch_size // work.size))
        arguments |= {"max_length": MAX_LENGTH, "packing": False}
    trainer = SFTTrainer(
        model=load_model(work.model),
        args=SFTConfig(**arguments),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=lora_config(),
    )
    _check(trainer)
    return trainer


def _train(trainer: Any) -> float:
    return float(trainer.train().metrics["train_runtime"])


def _check(trainer: Any) -> None:
    arguments = trainer.args
    if arguments.gradient_checkpointing or arguments.bf16 or arguments.fp16:
        raise SystemExit("TRL is not in the configuration that the table names")


def _pair_row(tree: Tree) -> dict[str, list[int]]:
    chosen, rejected = tree.sequence(0), tree.sequence(1)
    # Answers start at the same place, be it inside the shared prefix or at its end.
    start = int(chosen.trained.argmax())
    return {
        "prompt_ids": chosen.input_ids[:start].tolist(),
        "chosen_ids": chosen.input_ids[start:].tolist(),
        "rejected_ids": rejected.input_ids[start:].tolist(),
    }


def _labelled_row(tree: Tree) -> dict[str, list[int]]:
    sequence = tree.sequence(0)
    labels = [
        int(token) if trained else -100
        for token, trained in zip(sequence.input_ids, sequence.trained, strict=True)
    ]
    return {"input_ids": sequence.input_ids.tolist(), "labels": labels}
