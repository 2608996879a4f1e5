"""Settings of the training stages and of merging."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from tandem.recipe import choices
from tandem.recipe.data_source import Sources, Unweighted
from tandem.recipe.lora_settings import LoraSettings as LoraSettings
from tandem.recipe.method_options import in_words, without_effect
from tandem.recipe.samples_settings import SamplesSettings
from tandem.recipe.section import Positive, Section


class ValidationSettings(Section):
    """Records that are held out of training and scored on the way.

    One of `data`, `split` and `fraction` says which. They are scored before the first step, every
    `steps`, and at the end, with the model as it stands.
    """

    data: Unweighted = Field(default=(), description="Data sets of their own.")
    split: str | None = Field(
        default=None, description="Another split of the data sets that are trained on."
    )
    fraction: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        default=None, description="A share of the training records; no prompt is in both parts."
    )
    steps: Positive | None = Field(
        default=None, description="Scored every so many steps; null scores ten times in a run."
    )

    @model_validator(mode="after")
    def _one_way(self) -> ValidationSettings:
        ways = {"data": self.data or None, "split": self.split, "fraction": self.fraction}
        names = [name for name, value in ways.items() if value is not None]
        if not names:
            raise ValueError("set one of data, split and fraction, which say what is held out")
        if len(names) > 1:
            raise ValueError(f"{' and '.join(names)} are set; keep one")
        return self


class EarlyStoppingSettings(Section):
    """Ends a stage, as a finished one, when held-out scores after its steps no longer improve."""

    metric: choices.BestMetric = Field(
        default="loss",
        description="The held-out score that counts: loss, reward accuracy or margin; SFT has the "
        "loss.",
    )
    patience: Positive = Field(
        default=3, description="So many scores in a row without an improvement end the stage."
    )
    min_delta: NonNegativeFloat = Field(
        default=0.0, description="An improvement is more than this difference."
    )


class TrainingSettings(Section):
    """What both training stages share. `batch_size` is global: examples per optimizer step."""

    data: Sources = Field(
        min_length=1,
        description="Data sets, read one after the other: a path, a mapping, or a list of them.",
    )
    batch_size: Positive = Field(
        default=64,
        description="Examples in one optimizer step, over all devices; the memory needed does not "
        "depend on it.",
    )
    epochs: PositiveFloat | None = Field(
        default=None, description="Passes over the data; 1 if neither this nor `max_steps` is set."
    )
    max_steps: Positive | None = Field(
        default=None, description="Optimizer steps, in place of `epochs`."
    )
    optimizer: choices.OptimizerName = Field(
        default="adamw",
        description="What moves the weights. `adamw_8bit` (bitsandbytes) and `adafactor` keep less "
        "for each weight, `lion` and `muon` half of AdamW's; `schedule_free_adamw` needs no "
        "falling rate.",
    )
    learning_rate: PositiveFloat = Field(description="The peak learning rate.")
    lr_scheduler: choices.Scheduler = Field(
        default="cosine",
        description="How the learning rate falls after warm-up. `wsd` keeps the peak and falls at "
        "the end, by 1 minus the square root of the fall's share that is done.",
    )
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.0,
        description="Share of the peak that the learning rate falls to; not with constant ones.",
    )
    decay_ratio: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.1, description="Share of all steps in which `wsd` falls, at the end."
    )
    lr_power: PositiveFloat = Field(
        default=1.0, description="Power of the remaining share of steps that `polynomial` follows."
    )
    warmup_steps: NonNegativeInt | None = Field(
        default=None, description="Steps of linear warm-up."
    )
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        default=None, description="Warm-up as a share of all steps, in place of `warmup_steps`."
    )
    weight_decay: NonNegativeFloat = Field(default=0.0, description="Decoupled weight decay.")
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.9, description="Decay of AdamW's first moment."
    )
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.999, description="Decay of AdamW's second moment."
    )
    adam_epsilon: PositiveFloat = Field(default=1e-8, description="AdamW's denominator term.")
    lion_beta1: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.9, description="Share of the momentum in the direction of `lion`'s step."
    )
    lion_beta2: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.99, description="Decay of `lion`'s momentum."
    )
    muon_momentum: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.95, description="Decay of `muon`'s momentum."
    )
    max_grad_norm: PositiveFloat | None = Field(
        default=1.0, description="Gradients are clipped to this norm; null: they are not."
    )
    full: bool = Field(
        default=False,
        description="Train all weights instead of an adapter; the stage leaves a whole model.",
    )
    save_dtype: choices.DtypeName = Field(
        default="auto",
        description="Number format of the model that `full` leaves; auto: the base weights' own.",
    )
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        default=None,
        description="Share that a moving average of the trained weights keeps at each step. The "
        "average is what is scored, and the stage's result; null: none is kept.",
    )
    lora: LoraSettings = Field(default=LoraSettings(), description="The adapter that is trained.")
    max_length: Positive = Field(
        default=2048,
        description="Tokens of a whole sequence; an answer is cut there, without an end token.",
    )
    too_long: choices.TooLong = Field(
        default="drop_old_turns",
        description="What a record beyond `max_length` loses: everything, its end, its beginning "
        "after the system turn, or its oldest turns first.",
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
        default=None, description="A checkpoint every so many steps; null writes ten in a run."
    )
    save_total_limit: Positive | None = Field(
        default=None, description="How many checkpoints are kept; null: all."
    )
    max_dropped: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.05,
        description="Largest share of records that may be dropped; if more are, the run stops "
        "before it trains.",
    )
    validation: ValidationSettings | None = Field(
        default=None, description="Held-out records, scored on the way; null: none."
    )
    keep: choices.KeptAdapter = Field(
        default="last",
        description="Which adapter becomes the stage's: the last, or the one that scored best on "
        "held-out records.",
    )
    best_metric: choices.BestMetric = Field(
        default="loss",
        description="What decides under `keep: best`: held-out loss, reward accuracy or margin.",
    )
    early_stopping: EarlyStoppingSettings | None = Field(
        default=None,
        description="Ends the stage when held-out scores no longer improve; null: never.",
    )
    samples: SamplesSettings | None = Field(
        default=None,
        description="Prompts answered before the first step and at every checkpoint; null: none.",
    )
    on_bad_record: choices.OnBadRecord = Field(
        default="stop",
        description="At a line that cannot be parsed, stop the run, or drop the line and note it "
        "in the ledger.",
    )

    @property
    def trains_on(self) -> choices.RecordKind:
        """What the records are that it trains on."""
        return "conversations"

    @model_validator(mode="after")
    def _consistent(self) -> TrainingSettings:
        if self.keep == "best" and self.validation is None:
            raise ValueError("keep: best needs a validation section, which says what is scored")
        if self.early_stopping is not None and self.validation is None:
            raise ValueError(
                "early_stopping needs a validation section, which says what is scored and how often"
            )
        if self.keep == "last" and self.best_metric != "loss":
            raise ValueError(f"best_metric {self.best_metric} has no effect without keep: best")
        if self.epochs is not None and self.max_steps is not None:
            raise ValueError("epochs and max_steps are both set; keep one, the other is null")
        if self.warmup_steps is not None and self.warmup_ratio is not None:
            raise ValueError(
                "warmup_steps and warmup_ratio are both set; keep one, the other is null"
            )
        if self.lr_scheduler == "constant" and (self.warmup_steps or self.warmup_ratio):
            raise ValueError(
                "a warm-up has no effect with lr_scheduler: constant; take constant_with_warmup, "
                "or remove it"
            )
        if self.lr_scheduler == "wsd" and (self.warmup_ratio or 0.0) + self.decay_ratio > 1:
            raise ValueError(
                f"warmup_ratio {self.warmup_ratio:g} and decay_ratio {self.decay_ratio:g} are more "
                "than the whole run together; lower one of them"
            )
        if self.optimizer == "schedule_free_adamw":
            self._without_a_schedule()
        if self.max_prompt_length is not None and self.max_prompt_length >= self.max_length:
            raise ValueError(
                f"max_prompt_length {self.max_prompt_length} leaves no room for an answer within "
                f"max_length {self.max_length}"
            )
        return self

    def _without_a_schedule(self) -> None:
        if self.lr_scheduler not in ("constant", "constant_with_warmup"):
            raise ValueError(
                f"optimizer: schedule_free_adamw takes the place of lr_scheduler: "
                f"{self.lr_scheduler}; set lr_scheduler to constant or constant_with_warmup"
            )
        if not self.adam_beta1:
            raise ValueError(
                "adam_beta1 is 0, where optimizer: schedule_free_adamw would compute gradients at "
                "weights that are not averaged at all; take adamw, or a larger one"
            )
        if self.ema_decay is not None:
            raise ValueError(
                "ema_decay averages the weights, as optimizer: schedule_free_adamw does; keep one"
            )

    @model_validator(mode="after")
    def _nothing_without_effect(self) -> TrainingSettings:
        idle = self.idle_options()
        for key in type(self).model_fields:  # in the order of the page of all keys
            if key in idle and key in self.model_fields_set:
                raise ValueError(f"{key} has no effect with {idle[key]}")
        return self

    def idle_options(self) -> dict[str, str]:
        """The settings that have no effect beside others, each with those and a way out."""
        methods = without_effect(self.optimizer, self.lr_scheduler)
        idle = {key: f"{in_words(method)}; remove it" for key, method in methods.items()}
        if self.full:
            idle["lora"] = "full: true, which trains all weights and no adapter; set one to null"
        else:
            idle["save_dtype"] = "an adapter, which merge.dtype is for; remove it"
        return idle

    @model_serializer(mode="wrap")
    def _what_has_effect(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out what has no effect: a recipe that was written whole can be read again."""
        idle = self.idle_options()
        return {key: value for key, value in handler(self).items() if key not in idle}


class SftSettings(TrainingSettings):
    """Supervised fine-tuning; trains `epochs` (default 1) or `max_steps`."""

    loss: choices.SftLoss = Field(
        default="nll",
        description="What a token costs: its negative log-likelihood, or that times its "
        "probability (dft, arXiv 2508.05629).",
    )
    loss_on: choices.LossOn = Field(
        default="answers",
        description="What is trained: the assistant's answers, or every token of the text; then "
        "rows of raw text (`text`) are read as well.",
    )
    neftune_alpha: PositiveFloat | None = Field(
        default=None,
        description="Noise on the input embeddings in training (NEFTune): uniform, up to this over "
        "the square root of tokens times channels; usual are 5 to 15; null: none.",
    )
    learning_rate: PositiveFloat = Field(default=1e-4, description="The peak learning rate.")
    best_metric: Literal["loss"] = Field(
        default="loss", description="What decides under `keep: best`: held-out loss."
    )

    @model_validator(mode="after")
    def _scored_by_loss(self) -> SftSettings:
        early = self.early_stopping
        if early is not None and early.metric != "loss":
            raise ValueError(
                f"early_stopping.metric {early.metric} is of preference pairs; SFT has the loss"
            )
        return self


class MergeSettings(Section):
    """Merging an adapter into its base."""

    dtype: choices.DtypeName = Field(
        default="auto",
        description="Number format of the merged weights; auto: the base weights' own.",
    )
