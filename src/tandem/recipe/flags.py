"""The flags of `tandem sft` and `tandem dpo`: the seed's own names, and tandem's recipe keys.

`--model_name_or_path M --per_device_train_batch_size 8 ...` is how the public tutorial calls its
two training scripts. What the flags stand for is in seed_call.py.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import ValidationError

from tandem.errors import UserError
from tandem.recipe.data_source import DataSource
from tandem.recipe.explain_errors import explain
from tandem.recipe.section import expanded

Stage = Literal["sft", "dpo"]


@dataclass(frozen=True, slots=True)
class Flag:
    """One flag: its name with underscores, the type of its value, and what it says."""

    name: str
    kind: Callable[[str], Any]
    help: str
    stages: tuple[Stage, ...] = ("sft", "dpo")
    many: bool = False
    choices: tuple[str, ...] = ()
    key: str | None = None  # the section's key that it sets as it is
    metavar: str = ""  # what its values look like, where the type does not say it


def boolean(text: str) -> bool:
    """A flag's true or false, in the spellings that argument parsers of the field take."""
    lowered = text.lower()
    if lowered in ("true", "1", "yes", "y", "on"):
        return True
    if lowered in ("false", "0", "no", "n", "off"):
        return False
    raise ValueError(f"{text!r} is neither true nor false")


_SCHEDULERS = ("linear", "cosine", "constant", "constant_with_warmup")

_ATTENTION = ("auto", "segments", "varlen", "dense", "padded")

_TOO_LONG = ("drop", "keep_start", "keep_end", "drop_old_turns")

DTYPES = ("auto", "float32", "bfloat16", "float16")

DEVICES = ("auto", "cpu", "cuda", "hpu", "xpu", "mps")

# What a recipe says of a data set, by the names of its keys; `tandem check` and `tandem show` have
# these flags as well.
DATA_FLAGS: tuple[Flag, ...] = (
    Flag("format", str, "format of the data; default: told by its keys", metavar="NAME"),
    Flag("fields", str, "the data's own names of keys", many=True, metavar="KEY=NAME"),
    Flag("roles", str, "the data's own names of roles", many=True, metavar="NAME=ROLE"),
    Flag("completions", str, "best_vs_worst or best_vs_rest of scored answers", metavar="WHICH"),
    Flag("split", str, "split of a Hub data set (train)", metavar="NAME"),
    Flag("subset", str, "configuration of a Hub data set", metavar="NAME"),
)

FLAGS: tuple[Flag, ...] = (
    Flag("model_name_or_path", expanded, "base model: a folder or a Hub id (required)"),
    Flag("model_revision", str, "commit, tag or branch of a Hub model"),
    Flag("dataset_name", expanded, "Hub id, folder or file; several are read in turn", many=True),
    *DATA_FLAGS,
    Flag("dataset_revision", str, "commit, tag or branch of a Hub data set"),
    Flag("output_dir", expanded, "folder for the adapter, checkpoints and metrics (required)"),
    Flag("per_device_train_batch_size", int, "examples a device; a factor of the global batch"),
    Flag("gradient_accumulation_steps", int, "a factor of the global batch"),
    Flag("batch_size", int, "global batch, in place of the two flags above"),
    Flag("num_train_epochs", float, "passes over the data"),
    Flag("max_steps", int, "optimizer steps, in place of epochs; -1 is none"),
    Flag("learning_rate", float, "peak learning rate", key="learning_rate"),
    Flag("lr_scheduler_type", str, "schedule", choices=_SCHEDULERS, key="lr_scheduler"),
    Flag("warmup_steps", int, "steps of linear warm-up"),
    Flag("warmup_ratio", float, "warm-up as a share of all steps"),
    Flag("weight_decay", float, "AdamW weight decay", key="weight_decay"),
    Flag("adam_beta1", float, "AdamW beta1", key="adam_beta1"),
    Flag("adam_beta2", float, "AdamW beta2", key="adam_beta2"),
    Flag("adam_epsilon", float, "AdamW epsilon", key="adam_epsilon"),
    Flag("max_grad_norm", float, "clip gradients to this norm; 0 leaves them alone"),
    Flag("lora_rank", int, "rank of the adapter"),
    Flag("lora_alpha", float, "the update is scaled by alpha / rank"),
    Flag("lora_dropout", float, "dropout before the update; off in DPO"),
    Flag("lora_target_modules", str, "module name endings", many=True),
    Flag("lora_all_linear", boolean, "adapt every linear layer but the head"),
    Flag("max_length", int, "tokens of a whole sequence"),
    Flag("max_seq_length", int, "another name of --max_length", stages=("sft",)),
    Flag("max_prompt_length", int, "tokens of the prompt", key="max_prompt_length"),
    Flag("too_long", str, "what a longer record loses", choices=_TOO_LONG, key="too_long"),
    Flag("loss_on", str, "what is trained", ("sft",), choices=("answers", "text"), key="loss_on"),
    Flag("beta", float, "how strongly the policy is held to the reference", ("dpo",), key="beta"),
    Flag("gradient_checkpointing", boolean, "less memory, more time", key="gradient_checkpointing"),
    Flag("logging_steps", int, "steps between lines of metrics", key="logging_steps"),
    Flag("save_steps", int, "steps between checkpoints", key="save_steps"),
    Flag("save_total_limit", int, "checkpoints kept", key="save_total_limit"),
    Flag(
        "on_bad_record", str, "on an unparsable line", choices=("stop", "drop"), key="on_bad_record"
    ),
    Flag("max_dropped", float, "share of records that may be dropped (0.05)", key="max_dropped"),
    Flag(
        "chat_template", expanded, "a shipped one (neural-chat) or a file; default: the model's own"
    ),
    Flag("added_tokens", str, "special tokens that the template needs, to be trained", many=True),
    Flag("seed", int, "order of the data, adapter weights and dropout follow from it (42)"),
    Flag("bf16", boolean, "bfloat16; a CPU trains in float32 and says so"),
    Flag("device", str, "where to train", choices=DEVICES),
    Flag("dtype", str, "of the weights", choices=DTYPES),
    Flag("attention", str, "attention form", choices=_ATTENTION),
    Flag("tokens_per_microbatch", str, "tokens fed at once, or auto; never changes the result"),
    Flag("engine", str, "single, ddp, deepspeed-zero2, deepspeed-zero3, fsdp2 or a DeepSpeed JSON"),
    Flag("timeout_minutes", int, "how long a process waits for the others (60)"),
    Flag("quantization", str, "the frozen base in 4 bits", choices=("nf4",)),
    Flag("compile", boolean, "compile norms and gated MLPs with torch.compile"),
    Flag("use_habana", boolean, "train on Gaudi cards, where there are some"),
    Flag("use_lazy_mode", boolean, "Gaudi's lazy mode"),
    Flag("pad_max", boolean, "on Gaudi: one length for every micro-batch"),
    Flag("hpu_buckets", str, "on Gaudi: lengths of micro-batches, or auto", many=True),
    Flag("hpu_fused_attention", boolean, "on Gaudi: Habana's FusedSDPA"),
    Flag("hpu_fused_optimizer", boolean, "on Gaudi: Habana's FusedAdamW"),
)


def flags_of(stage: Stage) -> list[Flag]:
    """The flags that a stage command takes."""
    return [flag for flag in FLAGS if stage in flag.stages]


def nearest_flag(name: str, known: Iterable[str]) -> str | None:
    """The known flag that a misspelt one is closest to, if any is close."""
    spelled = {flag.replace("_", "-"): flag for flag in known}
    close = difflib.get_close_matches(name.replace("_", "-"), spelled, n=1, cutoff=0.6)
    return spelled[close[0]] if close else None


_EXAMPLES = {"fields": "--fields prompt=question", "roles": "--roles caller=user"}


def said_of_data(values: Mapping[str, Any]) -> dict[str, Any]:
    """What flags say of data, as a recipe would: `DATA_FLAGS` and `revision`, if they were given.

    Args:
        values: flags by name; None is one that was not given.

    Raises UserError for a pair that is none, and for a name that is given two meanings.
    """
    said: dict[str, Any] = {}
    for flag in DATA_FLAGS:
        value = values.get(flag.name)
        if value is not None:
            said[flag.name] = _pairs(flag.name, flag.metavar, value) if flag.many else value
    if values.get("revision") is not None:
        said["revision"] = values["revision"]
    return said


def named_data(paths: Sequence[str], said: Mapping[str, Any]) -> tuple[DataSource, ...]:
    """Data sets as a recipe would have them.

    Args:
        paths: files, folders, Hub ids or `demo:NAME`.
        said: of each of them, by the recipe's keys.

    Raises UserError for what a recipe cannot say, naming the flag.
    """
    try:
        return tuple(DataSource.model_validate({**said, "path": path}) for path in paths)
    except ValidationError as error:
        raise UserError(explain(error, DataSource, lambda key: f"--{key[0]}")) from None


def _pairs(name: str, form: str, given: Sequence[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for one in given:
        key, _, value = one.partition("=")
        if not key or not value:
            raise UserError(f"--{name}: {one!r} is not {form}; write it as in {_EXAMPLES[name]}")
        if key in found:
            raise UserError(f"--{name}: {key} is said twice; keep one")
        found[key] = value
    return found
