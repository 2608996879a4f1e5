"""The words that settings choose among: each closed set once, as a type and as its values.

Only `typing` is imported, so that every module can afford to import these.
"""

from __future__ import annotations

from typing import Literal, get_args

DeviceName = Literal["auto", "cpu", "cuda", "hpu", "xpu", "mps"]
DtypeName = Literal["auto", "float32", "bfloat16", "float16"]
AttentionName = Literal["auto", "segments", "varlen", "dense", "padded"]
EngineName = Literal["auto", "single", "ddp", "deepspeed-zero2", "deepspeed-zero3", "fsdp2"]
Quantization = Literal["nf4"]
Scheduler = Literal["linear", "cosine", "constant", "constant_with_warmup"]

TrainingStageName = Literal["sft", "dpo"]

Role = Literal["system", "user", "assistant", "tool"]
Completions = Literal["best_vs_worst", "best_vs_rest"]
TooLong = Literal["drop", "keep_start", "keep_end", "drop_old_turns"]
OnBadRecord = Literal["stop", "drop"]
LossOn = Literal["answers", "text"]
KeptAdapter = Literal["last", "best"]
BestMetric = Literal["loss", "accuracy", "margin"]

RejectedAnswers = Literal["different", "wrong"]
PairsFormat = Literal["jsonl", "parquet"]
Strata = Literal["source", "length"]
Shares = Literal["proportional", "equal"]
LimitKey = Literal["max_tokens", "max_completion_tokens"]
# As data/text/language.py can tell them.
Language = Literal[
    "en", "de", "fr", "es", "it", "pt", "nl", "pl", "sv", "tr", "id", "vi", "ro", "ru", "uk", "el",
    "he", "ar", "hi", "bn", "ta", "th", "ja", "ko", "zh",
]  # fmt: skip
Suite = Literal["leaderboard-v1"]

ENGINES: tuple[EngineName, ...] = get_args(EngineName)
TRAINING_STAGES: tuple[TrainingStageName, ...] = get_args(TrainingStageName)
SUITES: tuple[Suite, ...] = get_args(Suite)

# What each engine divides among its processes; the others hold it whole.
SHARDS: dict[str, frozenset[str]] = {
    "single": frozenset(),
    "ddp": frozenset(),
    "deepspeed-zero2": frozenset({"gradients", "optimizer"}),
    "deepspeed-zero3": frozenset({"weights", "gradients", "optimizer"}),
    "fsdp2": frozenset({"weights", "gradients", "optimizer"}),
}
