"""What a recipe may say: typed sections, unknown keys are errors."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from tandem.recipe.evaluation_settings import EvaluationSettings
from tandem.recipe.pairs_settings import PairsSettings
from tandem.recipe.section import PathText, Positive, Section, expanded
from tandem.recipe.training_settings import DpoSettings, Dtype, MergeSettings, SftSettings

Device = Literal["auto", "cpu", "cuda", "hpu", "xpu", "mps"]
Quantization = Literal["nf4"]
AttentionBackend = Literal["auto", "segments", "varlen", "dense", "padded"]
ENGINES = ("auto", "single", "ddp", "deepspeed-zero2", "deepspeed-zero3", "fsdp2")


def checked_engine(engine: str) -> str:
    """An engine's name, or the path of a DeepSpeed configuration, `~` and variables resolved.

    Raises ValueError for a name that is none, with the nearest one, and a file that is not there.
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
    model: PathText = Field(description="The base model: a Hub id, a folder, or `demo:base`.")
    model_revision: str | None = Field(
        default=None, description="A commit, tag or branch of a Hub model."
    )
    output_dir: PathText = Field(description="The run's folder; every stage gets a folder in it.")
    chat_template: PathText | None = Field(
        default=None,
        description="A shipped one, a file, or null: the model's own, else `neural-chat`.",
    )
    added_tokens: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        default=(),
        description="Special tokens the template needs and the model lacks or never learnt; their "
        "embeddings are trained and merged.",
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
    hpu: HpuSettings = Field(
        default=HpuSettings(), description="Settings of Gaudi cards; others do without."
    )
    sft: SftSettings | None = Field(
        default=None, description="Supervised fine-tuning; null leaves the stage out."
    )
    merge: MergeSettings = Field(default=MergeSettings(), description="How adapters are merged.")
    pairs: PairsSettings | None = Field(
        default=None, description="Making preference pairs; null: `dpo.data` has them."
    )
    dpo: DpoSettings | None = Field(
        default=None, description="Direct Preference Optimization; null leaves the stage out."
    )
    evaluate: EvaluationSettings | None = Field(
        default=None, description="Questions at the end; null leaves the stage out."
    )

    @model_validator(mode="after")
    def _connected(self) -> Recipe:
        if self.sft is None and self.dpo is None and self.pairs is None:
            raise ValueError(
                "a recipe needs an sft section, a dpo section or both, or a pairs section"
            )
        if self.dpo is not None and not self.dpo.data and self.pairs is None:
            raise ValueError("dpo.data is missing: name a data set, or add a pairs section")
        return self
