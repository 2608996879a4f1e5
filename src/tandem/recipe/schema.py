"""What a recipe may say: typed sections, unknown keys are errors."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

Device = Literal["auto", "cpu", "cuda", "hpu", "xpu", "mps"]
Quantization = Literal["nf4"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
AttentionBackend = Literal["auto", "segments", "varlen", "dense", "padded"]
Positive = Annotated[int, Field(gt=0)]
Scheduler = Literal["linear", "cosine", "constant", "constant_with_warmup"]
ENGINES = ("auto", "single", "ddp", "deepspeed-zero2", "deepspeed-zero3", "fsdp2")


def checked_engine(engine: str) -> str:
    """An engine's name, or the path of a DeepSpeed configuration, `~` resolved.

    Raises ValueError for a name that is none, with the nearest one, and a file that is not there.
    """
    if engine in ENGINES:
        return engine
    if engine.endswith(".json"):
        path = Path(engine).expanduser()
        if path.is_file():
            return str(path)
        raise ValueError(f"there is no DeepSpeed configuration {path}; check the path")
    close = difflib.get_close_matches(engine.lower().replace("_", "-"), ENGINES, n=1, cutoff=0.4)
    hint = f"did you mean {close[0]}?" if close else f"it may be {', '.join(ENGINES)}"
    raise ValueError(f"unknown engine {engine!r}; {hint} (or a DeepSpeed file, NAME.json)")


def _as_sources(value: object) -> object:
    """A data set may be written as its path alone, and a single one without a list."""
    items = value if isinstance(value, list | tuple) else [value]
    if value is None or not all(isinstance(item, str | dict | BaseModel) for item in items):
        return value
    # A tuple, because pydantic's strict mode takes no list from a validator.
    return tuple({"path": item} if isinstance(item, str) else item for item in items)


class Section(BaseModel):
    """A part of a recipe: immutable, no unknown keys."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False
    )


class DataSource(Section):
    """One data set: a file, a folder, a Hub id, or `demo:NAME` for the embedded data."""

    path: str = Field(
        description="A file (JSON, JSONL, Parquet), a folder, a Hub id, or `demo:NAME`."
    )
    split: str = Field(
        default="train", description="Which split of a Hub data set or `datasets` folder."
    )
    subset: str | None = Field(default=None, description="Which configuration of a Hub data set.")
    revision: str | None = Field(
        default=None, description="A commit, tag or branch of a Hub data set."
    )


Sources = Annotated[tuple[DataSource, ...], BeforeValidator(_as_sources)]


class Lora(Section):
    """The adapter: `target_modules` are module name endings, or `all-linear`."""

    rank: Positive = Field(default=16, description="Rank of the update matrices.")
    alpha: Annotated[float, Field(gt=0)] = Field(
        default=32.0, description="The update is scaled by alpha / rank."
    )
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.0,
        description="Dropout before the update; off in DPO, whose reference must equal the policy.",
    )
    target_modules: tuple[str, ...] | Literal["all-linear"] = Field(
        default="all-linear", description="Module name endings such as `q_proj`, or `all-linear`."
    )


class Training(Section):
    """What both training stages share. `batch_size` is global: examples per optimizer step."""

    data: Sources = Field(
        min_length=1,
        description="Data sets, read one after the other: a path, a mapping, or a list of them.",
    )
    batch_size: Positive = Field(
        default=64,
        description="Examples in one optimizer step, over all devices; memory does not follow it.",
    )
    epochs: Annotated[float, Field(gt=0)] | None = Field(
        default=None,
        description="How often the data is gone through (default 1 when `max_steps` is not set).",
    )
    max_steps: Positive | None = Field(
        default=None, description="Optimizer steps, in place of `epochs`."
    )
    learning_rate: Annotated[float, Field(gt=0)] = Field(description="The peak learning rate.")
    lr_scheduler: Scheduler = Field(
        default="cosine", description="How the learning rate goes down after warm-up."
    )
    warmup_steps: Annotated[int, Field(ge=0)] | None = Field(
        default=None, description="Steps of linear warm-up."
    )
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        default=None, description="Warm-up as a share of all steps, in place of `warmup_steps`."
    )
    weight_decay: Annotated[float, Field(ge=0)] = Field(
        default=0.0, description="AdamW's decoupled weight decay."
    )
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.9, description="Decay of AdamW's first moment."
    )
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.999, description="Decay of AdamW's second moment."
    )
    adam_epsilon: Annotated[float, Field(gt=0)] = Field(
        default=1e-8, description="AdamW's denominator term."
    )
    max_grad_norm: Annotated[float, Field(gt=0)] | None = Field(
        default=1.0, description="Gradients are clipped to this norm; null leaves them alone."
    )
    lora: Lora = Field(default=Lora(), description="The adapter that is trained.")
    max_length: Positive = Field(
        default=2048,
        description="Tokens of a whole sequence; an answer is cut there, without an end token.",
    )
    max_prompt_length: Positive | None = Field(
        default=None,
        description="Tokens of the prompt; its oldest text after the system turn goes first.",
    )
    gradient_checkpointing: bool = Field(
        default=False,
        description="Recompute activations in the backward: less memory, about a third more time.",
    )
    logging_steps: Positive = Field(
        default=10, description="A line of metrics every so many steps."
    )
    save_steps: Positive | None = Field(
        default=None, description="A checkpoint every so many steps; null: ten times a run."
    )
    save_total_limit: Positive | None = Field(
        default=None, description="How many checkpoints are kept; null keeps all."
    )
    max_dropped: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.05,
        description="Share of records that may be dropped; more stops the run before it trains.",
    )
    on_bad_record: Literal["stop", "drop"] = Field(
        default="stop",
        description="What an unparsable line does: stop the run, or drop into the ledger.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Training:
        if self.epochs is not None and self.max_steps is not None:
            raise ValueError("epochs and max_steps are both set; keep one, the other is null")
        if self.warmup_steps is not None and self.warmup_ratio is not None:
            raise ValueError(
                "warmup_steps and warmup_ratio are both set; keep one, the other is null"
            )
        if self.max_prompt_length is not None and self.max_prompt_length >= self.max_length:
            raise ValueError(
                f"max_prompt_length {self.max_prompt_length} leaves no room for an answer within "
                f"max_length {self.max_length}"
            )
        return self


class Sft(Training):
    """Supervised fine-tuning; trains `epochs` (default 1) or `max_steps`."""

    learning_rate: Annotated[float, Field(gt=0)] = Field(
        default=1e-4, description="The peak learning rate."
    )


class Dpo(Training):
    """Direct Preference Optimization. `data` empty means: the pairs stage's output."""

    data: Sources = Field(
        default=(), description="Preference pairs; empty: what the pairs stage makes."
    )
    learning_rate: Annotated[float, Field(gt=0)] = Field(
        default=5e-6, description="The peak learning rate."
    )
    beta: Annotated[float, Field(gt=0)] = Field(
        default=0.1, description="How strongly the policy is held to the reference."
    )


class Merge(Section):
    """Merging an adapter; `dtype` auto keeps the base weights' own."""

    dtype: Dtype = Field(
        default="auto", description="Of the merged weights; auto keeps the base weights' own."
    )


class Pairs(Section):
    """Making preference pairs: the set's answer is chosen, a sampled one is rejected.

    `model` is the weaker model that writes the rejected answers (default: the merged SFT model).
    `samples` answers are drawn for each prompt. `keep` says which of them become rejected ones:
    all that differ from the chosen answer, or only wrong ones (those that lack the record's
    `accepted` text or do not stop by themselves).
    """

    prompts: Sources = Field(
        min_length=1, description="Records whose own answers become the chosen ones."
    )
    heldout: Sources = Field(
        default=(),
        description="Records for held-out pairs, which are evaluated and never trained on.",
    )
    model: str | None = Field(
        default=None,
        description="Writes the rejected answers, a weaker model; null: the merged SFT model.",
    )
    samples: Positive = Field(default=1, description="Answers drawn for each prompt.")
    temperature: Annotated[float, Field(gt=0)] = Field(
        default=1.0, description="Sampling temperature."
    )
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(
        default=1.0,
        description="Nucleus sampling: the smallest set of tokens with this probability mass.",
    )
    max_new_tokens: Positive = Field(default=256, description="Tokens of a sampled answer at most.")
    keep: Literal["different", "wrong"] = Field(
        default="different",
        description="Which answers become rejected: all unlike the chosen one, or only wrong ones.",
    )


class Evaluate(Section):
    """What base, SFT and final model are asked at the end."""

    questions: Sources = Field(
        default=(), description="Questions with known answers, for answer accuracy."
    )
    pairs: Sources = Field(
        default=(), description="Held-out preference pairs; empty: the pairs stage's."
    )
    max_new_tokens: Positive = Field(default=64, description="Tokens of an answer at most.")
    samples: Annotated[int, Field(ge=0)] = Field(
        default=8, description="Answers shown side by side in the report."
    )


class Hpu(Section):
    """What only Gaudi cards heed."""

    lazy_mode: bool = Field(
        default=False, description="Gather graphs and launch them at step boundaries."
    )
    buckets: Annotated[tuple[Positive, ...], Field(min_length=1)] | Literal["auto", "max"] = Field(
        default="auto",
        description="Lengths in tokens that micro-batches are filled up to, each compiled once; "
        "`max`: one, of the longest.",
    )
    fused_attention: bool = Field(default=False, description="Habana's FusedSDPA.")
    fused_optimizer: bool = Field(default=False, description="Habana's FusedAdamW.")


class Recipe(Section):
    """A whole run: base model -> SFT -> merge -> (pairs) -> DPO -> merge -> evaluation."""

    name: str = Field(description="The run's name.")
    description: str = Field(default="", description="One line about it.")
    model: str = Field(description="The base model: a Hub id, a folder, or `demo:base`.")
    model_revision: str | None = Field(
        default=None, description="A commit, tag or branch of a Hub model."
    )
    output_dir: str = Field(description="The run's folder; every stage gets a folder in it.")
    chat_template: str | None = Field(
        default=None,
        description="A shipped one, a file, or null: the model's own, else `neural-chat`.",
    )
    added_tokens: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        default=(),
        description="Special tokens the template needs and the model lacks; their embeddings are "
        "trained and merged.",
    )
    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(
        default=42,
        description="Order of the data, adapter weights, dropout and sampling follow from it.",
    )
    device: Device = Field(default="auto", description="Where to train.")
    dtype: Dtype = Field(
        default="auto",
        description="Of the frozen weights; auto: float32 on CPU and MPS, bfloat16 elsewhere.",
    )
    attention: AttentionBackend = Field(
        default="auto",
        description=(
            "`segments` and `varlen` (CUDA, half precision) compute shared prompts once, `dense` "
            "too, under a plain mask, and alone on Gaudi; `padded` feeds one row a sequence to the "
            "model's own attention."
        ),
    )
    tokens_per_microbatch: Positive | Literal["auto"] = Field(
        default="auto",
        description="Tokens fed at once; changes memory and speed, never the result.",
    )
    engine: Annotated[str, AfterValidator(checked_engine)] = Field(
        default="auto",
        description=(
            "How processes share the work: `single`, `ddp`, `deepspeed-zero2`, `deepspeed-zero3`, "
            "`fsdp2`, or a DeepSpeed JSON file; auto: `single`, or `ddp` for several processes."
        ),
    )
    timeout_minutes: Positive = Field(
        default=60, description="How long a process waits for the others."
    )
    quantization: Quantization | None = Field(
        default=None, description="The frozen base in 4 bits (QLoRA); null: in `dtype`."
    )
    compile: bool = Field(
        default=False, description="Compile norms and gated MLPs with torch.compile."
    )
    hpu: Hpu = Field(default=Hpu(), description="Settings of Gaudi cards; others do without.")
    sft: Sft | None = Field(
        default=None, description="Supervised fine-tuning; null leaves the stage out."
    )
    merge: Merge = Field(default=Merge(), description="How adapters are merged.")
    pairs: Pairs | None = Field(
        default=None, description="Making preference pairs; null: `dpo.data` has them."
    )
    dpo: Dpo | None = Field(
        default=None, description="Direct Preference Optimization; null leaves the stage out."
    )
    evaluate: Evaluate | None = Field(
        default=None, description="Questions at the end; null leaves the stage out."
    )

    @model_validator(mode="after")
    def _connected(self) -> Recipe:
        if self.sft is None and self.dpo is None:
            raise ValueError("a recipe needs an sft section, a dpo section or both")
        if self.dpo is not None and not self.dpo.data and self.pairs is None:
            raise ValueError("dpo.data is missing: name a data set, or add a pairs section")
        return self
