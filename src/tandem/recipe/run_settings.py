"""Settings of a run as a whole: its model, its seed, and where and how it computes."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from tandem.recipe.choices import (
    ENGINES,
    AttentionName,
    DeviceName,
    DtypeName,
    Quantization,
    TrackerName,
)
from tandem.recipe.section import PathText, Positive, Section, expanded, listed


def checked_engine(engine: str) -> str:
    """Return an engine's name, or the expanded path of a DeepSpeed configuration.

    Raises ValueError for an unknown name, with the nearest one, and for a missing file.
    """
    if engine in ENGINES:
        return engine
    if engine.endswith(".json"):
        path = Path(expanded(engine))
        if path.is_file():
            return str(path)
        raise ValueError(f"there is no DeepSpeed configuration {path}; check the path")
    close = difflib.get_close_matches(engine.lower().replace("_", "-"), ENGINES, n=1, cutoff=0.4)
    hint = f"did you mean {close[0]}?" if close else f"it may be {', '.join(ENGINES)}"
    raise ValueError(f"unknown engine {engine!r}; {hint} (or a DeepSpeed file, NAME.json)")


class HpuSettings(Section):
    """Settings that only Gaudi cards use."""

    lazy_mode: bool = Field(
        default=False, description="Gather graphs and launch them at step boundaries."
    )
    buckets: Annotated[tuple[Positive, ...], Field(min_length=1)] | Literal["auto", "max"] = Field(
        default="auto",
        description="Lengths in tokens that micro-batches are padded to, each compiled once; "
        "`max`: a single one, for the longest.",
    )
    fused_attention: bool = Field(default=False, description="Habana's FusedSDPA.")
    fused_optimizer: bool = Field(default=False, description="Habana's FusedAdamW.")


class RunSettings(Section):
    """Every key that belongs to no single stage.

    For a whole recipe, `model` is the base model and `output_dir` the run's folder. For one stage
    to run, they are the model that the stage starts from and the stage's own folder.
    """

    name: str = Field(default="", description="The run's name.")
    description: str = Field(default="", description="One line about it.")
    model: PathText = Field(description="The base model: a Hub id, a folder, or `demo:base`.")
    model_revision: str | None = Field(
        default=None, description="A commit, tag or branch of a Hub model."
    )
    output_dir: PathText = Field(description="The run's folder; every stage gets a folder in it.")
    chat_template: PathText | None = Field(
        default=None,
        description="A shipped one or a file; null: the model's own, else `neural-chat`.",
    )
    added_tokens: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        default=(),
        description="Special tokens the template needs and the model lacks or never learnt; their "
        "embeddings are trained and merged.",
    )
    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(
        default=42,
        description="Decides the order of the data, the adapter's first weights, dropout and "
        "sampling.",
    )
    device: DeviceName = Field(default="auto", description="The device to train on.")
    dtype: DtypeName = Field(
        default="auto",
        description="Number format of the frozen weights; auto: float32 on CPU and MPS, bfloat16 "
        "elsewhere.",
    )
    attention: AttentionName = Field(
        default="auto",
        description=(
            "How attention is computed: `segments`, `varlen` (CUDA, half precision) and `dense` "
            "(with a plain mask; the only one on Gaudi) compute shared prompts once, `padded` "
            "gives each sequence a row of its own and uses the model's own attention."
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
        default=60, description="Minutes that a process waits for the others."
    )
    quantization: Quantization | None = Field(
        default=None, description="Keep the frozen base in 4 bits (QLoRA); null: in `dtype`."
    )
    compile: bool = Field(
        default=False, description="Compile norms and gated MLPs with torch.compile."
    )
    callbacks: Annotated[
        tuple[Annotated[str, Field(min_length=1)], ...], BeforeValidator(listed)
    ] = Field(
        default=(),
        description="Functions of your own as `module:function`, told each logged step, score and "
        "checkpoint; one that returns `stop` ends the run, to be resumed.",
    )
    trackers: Annotated[tuple[TrackerName, ...], BeforeValidator(listed)] = Field(
        default=(),
        description="Where settings, metrics, held-out scores and the summary go as well: "
        "`tensorboard`, `wandb`, `mlflow`, `trackio`.",
    )
    tracker_project: str | None = Field(
        default=None,
        min_length=1,
        description="The trackers' project (MLflow: experiment); null: the recipe's name.",
    )
    tracker_run: str | None = Field(
        default=None,
        min_length=1,
        description="The run's name in the trackers, before that of the stage; null: the folder's.",
    )
    hpu: HpuSettings = Field(
        default=HpuSettings(), description="Settings that only Gaudi cards use."
    )

    @model_validator(mode="after")
    def _told_once_and_with_effect(self) -> Self:
        for key in ("callbacks", "trackers"):
            names = getattr(self, key)
            if twice := [name for name in names if names.count(name) > 1]:
                raise ValueError(f"{key}: {twice[0]} is named twice; keep one")
        for key in ("tracker_project", "tracker_run"):
            if getattr(self, key) is not None and not self.trackers:
                raise ValueError(f"{key} has no effect without trackers; name some, or remove it")
        return self
