"""The words that settings choose among: each closed set once, as a type and as its values."""

from __future__ import annotations

from typing import Literal, get_args

# Words that name files and folders of a run.
from tandem.storage.run_folder import STAGES as STAGES
from tandem.storage.run_folder import TRAINING_STAGES as TRAINING_STAGES
from tandem.storage.run_folder import PairsFormat as PairsFormat
from tandem.storage.run_folder import StageName as StageName
from tandem.storage.run_folder import TrainingStageName as TrainingStageName

DeviceName = Literal["auto", "cpu", "cuda", "hpu", "xpu", "mps"]
DtypeName = Literal["auto", "float32", "bfloat16", "float16"]
AttentionName = Literal["auto", "segments", "varlen", "dense", "padded"]
EngineName = Literal["auto", "single", "ddp", "deepspeed-zero2", "deepspeed-zero3", "fsdp2"]
Quantization = Literal["nf4"]
OptimizerName = Literal[
    "adamw", "adamw_8bit", "adafactor", "lion", "muon", "schedule_free_adamw"
]  # fmt: skip
Scheduler = Literal[
    "linear", "cosine", "constant", "constant_with_warmup", "wsd", "polynomial"
]  # fmt: skip

LoraInit = Literal["zero", "pissa", "pissa_fast"]

RecordKind = Literal["conversations", "preference pairs", "labelled answers"]
Role = Literal["system", "user", "assistant", "tool"]
Completions = Literal["best_vs_worst", "best_vs_rest", "all_pairs", "best_vs_all", "ranked"]
TooLong = Literal["drop", "keep_start", "keep_end", "drop_old_turns"]
OnBadRecord = Literal["stop", "drop"]
LossOn = Literal["answers", "text"]
SftLoss = Literal["nll", "dft"]
KeptAdapter = Literal["last", "best"]
BestMetric = Literal["loss", "accuracy", "margin"]

TrackerName = Literal["tensorboard", "wandb", "mlflow", "trackio"]

RejectedAnswers = Literal["different", "wrong"]
Strata = Literal["source", "length"]
Shares = Literal["proportional", "equal"]
LimitKey = Literal["max_tokens", "max_completion_tokens"]
# Those that data/text can tell apart.
Language = Literal[
    "en", "de", "fr", "es", "it", "pt", "nl", "pl", "sv", "tr", "id", "vi", "ro", "ru", "uk", "el",
    "he", "ar", "hi", "bn", "ta", "th", "ja", "ko", "zh",
]  # fmt: skip
Suite = Literal["leaderboard-v1"]

BEST_METRICS: tuple[BestMetric, ...] = get_args(BestMetric)
ENGINES: tuple[EngineName, ...] = get_args(EngineName)
SUITES: tuple[Suite, ...] = get_args(Suite)

# What each engine divides among its processes; the rest is whole in each of them.
SHARDS: dict[str, frozenset[str]] = {
    "single": frozenset(),
    "ddp": frozenset(),
    "deepspeed-zero2": frozenset({"gradients", "optimizer"}),
    "deepspeed-zero3": frozenset({"weights", "gradients", "optimizer"}),
    "fsdp2": frozenset({"weights", "gradients", "optimizer"}),
}
