"""What a recipe may say: typed sections, unknown keys are errors."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Device = Literal["auto", "cpu", "cuda"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
AttentionBackend = Literal["auto", "segments", "dense"]
Positive = Annotated[int, Field(gt=0)]
Scheduler = Literal["linear", "cosine", "constant", "constant_with_warmup"]


class Section(BaseModel):
    """A part of a recipe: immutable, no unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class DataSource(Section):
    """One data set: a file, a folder, a Hub id, or `demo:NAME` for the embedded data."""

    path: str
    split: str = "train"
    subset: str | None = None
    revision: str | None = None


class Lora(Section):
    """The adapter: `target_modules` are module name endings, or `all-linear`."""

    rank: Positive = 16
    alpha: Annotated[float, Field(gt=0)] = 32.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: tuple[str, ...] | Literal["all-linear"] = "all-linear"


class Training(Section):
    """What both training stages share. `batch_size` is global: examples per optimizer step."""

    data: tuple[DataSource, ...] = Field(min_length=1)
    batch_size: Positive = 64
    epochs: Annotated[float, Field(gt=0)] | None = None
    max_steps: Positive | None = None
    learning_rate: Annotated[float, Field(gt=0)]
    lr_scheduler: Scheduler = "cosine"
    warmup_steps: Annotated[int, Field(ge=0)] | None = None
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] | None = None
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    adam_epsilon: Annotated[float, Field(gt=0)] = 1e-8
    max_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0
    lora: Lora = Lora()
    max_length: Positive = 2048
    max_prompt_length: Positive | None = None
    gradient_checkpointing: bool = False
    logging_steps: Positive = 10
    save_steps: Positive | None = None
    save_total_limit: Positive | None = None
    on_bad_record: Literal["stop", "drop"] = "stop"

    @model_validator(mode="after")
    def _consistent(self) -> Training:
        if self.epochs is not None and self.max_steps is not None:
            raise ValueError("epochs and max_steps are both set; keep one")
        if self.warmup_steps is not None and self.warmup_ratio is not None:
            raise ValueError("warmup_steps and warmup_ratio are both set; keep one")
        if self.max_prompt_length is not None and self.max_prompt_length >= self.max_length:
            raise ValueError(
                f"max_prompt_length {self.max_prompt_length} leaves no room for an answer within "
                f"max_length {self.max_length}"
            )
        return self


class Sft(Training):
    """Supervised fine-tuning; trains `epochs` (default 1) or `max_steps`."""

    learning_rate: Annotated[float, Field(gt=0)] = 1e-4


class Dpo(Training):
    """Direct Preference Optimization. `data` empty means: the pairs stage's output."""

    data: tuple[DataSource, ...] = ()
    learning_rate: Annotated[float, Field(gt=0)] = 5e-6
    beta: Annotated[float, Field(gt=0)] = 0.1


class Merge(Section):
    """Merging an adapter; `dtype` auto keeps the base weights' own."""

    dtype: Dtype = "auto"


class Pairs(Section):
    """Making preference pairs: the set's answer is chosen, a sampled one is rejected.

    `model` is the weaker model that writes the rejected answers (default: the merged SFT model).
    `samples` answers are drawn for each prompt. `keep` says which of them become rejected ones:
    all that differ from the chosen answer, or only wrong ones (those that lack the record's
    `accepted` text or do not stop by themselves).
    """

    prompts: tuple[DataSource, ...] = Field(min_length=1)
    heldout: tuple[DataSource, ...] = ()
    model: str | None = None
    samples: Positive = 1
    temperature: Annotated[float, Field(gt=0)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    max_new_tokens: Positive = 256
    keep: Literal["different", "wrong"] = "different"


class Evaluate(Section):
    """What base, SFT and final model are asked at the end."""

    questions: tuple[DataSource, ...] = ()
    pairs: tuple[DataSource, ...] = ()
    max_new_tokens: Positive = 64
    samples: Annotated[int, Field(ge=0)] = 8


class Recipe(Section):
    """A whole run: base model -> SFT -> merge -> (pairs) -> DPO -> merge -> evaluation."""

    name: str
    description: str = ""
    model: str
    model_revision: str | None = None
    output_dir: str
    chat_template: str | None = None
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42
    device: Device = "auto"
    dtype: Dtype = "auto"
    attention: AttentionBackend = "auto"
    tokens_per_microbatch: Positive | Literal["auto"] = "auto"
    sft: Sft | None = None
    merge: Merge = Merge()
    pairs: Pairs | None = None
    dpo: Dpo | None = None
    evaluate: Evaluate | None = None

    @model_validator(mode="after")
    def _connected(self) -> Recipe:
        if self.sft is None and self.dpo is None:
            raise ValueError("a recipe needs an sft section, a dpo section or both")
        if self.dpo is not None and not self.dpo.data and self.pairs is None:
            raise ValueError("dpo.data is missing: name a data set, or add a pairs section")
        return self
