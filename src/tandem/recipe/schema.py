"""What a recipe may say: typed sections, unknown keys are errors."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

Device = Literal["auto", "cpu", "cuda", "hpu", "xpu", "mps"]
Quantization = Literal["nf4"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
AttentionBackend = Literal["auto", "segments", "varlen", "dense", "padded"]
Positive = Annotated[int, Field(gt=0)]
Role = Literal["system", "user", "assistant", "tool"]
TooLong = Literal["drop", "keep_start", "keep_end", "drop_old_turns"]
# As data/languages.py can tell them.
Language = Literal[
    "en", "de", "fr", "es", "it", "pt", "nl", "pl", "sv", "tr", "id", "vi", "ro", "ru", "uk", "el",
    "he", "ar", "hi", "bn", "ta", "th", "ja", "ko", "zh",
]  # fmt: skip
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


def checked_address(base_url: str) -> str:
    """A server's address; raises ValueError, without saying it, for one with a secret in it."""
    try:
        parts = urlsplit(base_url)
        sound = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        sound = False
    if not sound:
        raise ValueError("this is no address of a server; write it as http://localhost:8000/v1")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ValueError(
            "a name, a password or a query in the address would be written into the run's files; "
            "leave them out, and name the environment variable that holds the key in key_variable"
        )
    return base_url


def checked_variable(name: str) -> str:
    """An environment variable's name; raises ValueError, without saying it, for another text."""
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        raise ValueError(
            "this is no name of an environment variable; if it is the key itself, put that into a "
            "variable, and the variable's name here"
        )
    return name


def checked_regex(pattern: str) -> str:
    """A regular expression; raises ValueError for a text that is none."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is no regular expression: {error}") from None
    return pattern


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
        description="A file (JSON, JSONL, CSV, TSV, Parquet, Arrow), a folder, a Hub id, or "
        "`demo:NAME`."
    )
    split: str = Field(
        default="train", description="Which split of a Hub data set or `datasets` folder."
    )
    subset: str | None = Field(default=None, description="Which configuration of a Hub data set.")
    revision: str | None = Field(
        default=None, description="A commit, tag or branch of a Hub data set."
    )
    format: str | None = Field(
        default=None, description="A known format's name; null: told by the keys of the first rows."
    )
    fields: dict[str, str] = Field(
        default={}, description="Keys of the format, each with the data's own name for it."
    )
    roles: dict[str, Role] = Field(
        default={}, description="The data's own names of roles, each with the role it means."
    )
    completions: Literal["best_vs_worst", "best_vs_rest"] | None = Field(
        default=None,
        description="Which pairs scored answers make (UltraFeedback); null: `best_vs_worst`.",
    )
    weight: Annotated[float, Field(gt=0)] = Field(
        default=1.0,
        description="How often an epoch shows each record that is trained on: 2 twice, 0.5 every "
        "second one in turn.",
    )


def _unweighted(sources: tuple[DataSource, ...]) -> tuple[DataSource, ...]:
    """Refuse weights where records are not trained on."""
    for source in sources:
        if source.weight != 1.0:
            raise ValueError(
                f"weight {source.weight:g} of {source.path} has no effect here: it says how often "
                "training shows a record. Remove it"
            )
    return sources


Regex = Annotated[str, AfterValidator(checked_regex)]
Sources = Annotated[tuple[DataSource, ...], BeforeValidator(_as_sources)]
# Data that is asked or scored as it is.
Unweighted = Annotated[Sources, AfterValidator(_unweighted)]


class Validation(Section):
    """Records that are held out of training and scored on the way.

    One of `data`, `split` and `fraction` says which. They are scored before the first step, every
    `steps`, and at the end, with the model as it stands.
    """

    data: Unweighted = Field(default=(), description="Data sets of their own.")
    split: str | None = Field(
        default=None, description="Another split of the data sets that are trained on."
    )
    fraction: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        default=None,
        description="A share of the training records; no prompt is in both parts.",
    )
    steps: Positive | None = Field(
        default=None, description="Scored every so many steps; null: ten times a run."
    )

    @model_validator(mode="after")
    def _one_way(self) -> Validation:
        ways = {"data": bool(self.data), "split": self.split is not None}
        ways["fraction"] = self.fraction is not None
        given = [name for name, is_given in ways.items() if is_given]
        if len(given) != 1:
            raise ValueError(
                f"{' and '.join(given)} are set; keep one"
                if given
                else "set one of data, split and fraction, which say what is held out"
            )
        return self


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
    too_long: TooLong = Field(
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
        default=None, description="A checkpoint every so many steps; null: ten times a run."
    )
    save_total_limit: Positive | None = Field(
        default=None, description="How many checkpoints are kept; null keeps all."
    )
    max_dropped: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.05,
        description="Share of records that may be dropped; more stops the run before it trains.",
    )
    validation: Validation | None = Field(
        default=None, description="Held-out records, scored on the way; null: none."
    )
    keep: Literal["last", "best"] = Field(
        default="last",
        description="Which adapter becomes the stage's: the last, or the one that scored best on "
        "held-out records.",
    )
    best_metric: Literal["loss", "accuracy", "margin"] = Field(
        default="loss",
        description="What `keep: best` goes by: held-out loss, or reward accuracy or margin.",
    )
    on_bad_record: Literal["stop", "drop"] = Field(
        default="stop",
        description="What an unparsable line does: stop the run, or drop into the ledger.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Training:
        if self.keep == "best" and self.validation is None:
            raise ValueError("keep: best needs a validation section, which says what is scored")
        if self.keep == "last" and self.best_metric != "loss":
            raise ValueError(f"best_metric {self.best_metric} has no effect without keep: best")
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

    loss_on: Literal["answers", "text"] = Field(
        default="answers",
        description="What is trained: the assistant's answers, or every token of the text.",
    )
    learning_rate: Annotated[float, Field(gt=0)] = Field(
        default=1e-4, description="The peak learning rate."
    )
    best_metric: Literal["loss"] = Field(
        default="loss", description="What `keep: best` goes by: held-out loss."
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


class Select(Section):
    """Which prompts of `pairs.prompts` are asked: filters first, then a seeded sample.

    Lengths are in characters. What is left out is counted by reason. A language is guessed from
    script and common words; texts that do not say are kept.
    """

    count: Positive | None = Field(
        default=None, description="So many prompts, sampled with the recipe's seed; null: all."
    )
    stratify: Literal["source", "length"] | None = Field(
        default=None,
        description="Sample within each data set, or each class of prompt length (each class twice "
        "as wide as the one before).",
    )
    shares: Literal["proportional", "equal"] = Field(
        default="proportional",
        description="What each stratum gives: its share of the data, or equal parts.",
    )
    distinct: bool = Field(default=False, description="Leave out prompts that occurred before.")
    min_prompt_characters: Positive | None = Field(
        default=None, description="Of the user's text, at least."
    )
    max_prompt_characters: Positive | None = Field(
        default=None, description="Of the user's text, at most."
    )
    min_answer_characters: Positive | None = Field(
        default=None, description="Of the set's answer, at least."
    )
    max_answer_characters: Positive | None = Field(
        default=None, description="Of the set's answer, at most."
    )
    language: Language | None = Field(default=None, description="Of prompt and answer.")
    matches: Regex | None = Field(
        default=None, description="A regular expression to be found in the user's text."
    )
    excludes: Regex | None = Field(
        default=None, description="A regular expression not to be found in the user's text."
    )
    decontaminate: Unweighted = Field(
        default=(),
        description="Evaluation sets; prompts and answers that share a run of words with one are "
        "left out.",
    )
    decontaminate_words: Annotated[int, Field(ge=4)] = Field(
        default=13, description="How many words in a row count as shared."
    )

    @model_validator(mode="after")
    def _effective(self) -> Select:
        if self.count is None and (self.stratify is not None or self.shares != "proportional"):
            raise ValueError("stratify and shares are about a sample; set count as well")
        if self.stratify is None and self.shares != "proportional":
            raise ValueError("shares are those of strata; set stratify as well")
        for what in ("prompt", "answer"):
            least = getattr(self, f"min_{what}_characters")
            most = getattr(self, f"max_{what}_characters")
            if least is not None and most is not None and least > most:
                raise ValueError(
                    f"min_{what}_characters {least} exceeds max_{what}_characters {most}"
                )
        return self


class PairFilters(Section):
    """What a generated answer must not be. Each one that is passed over is counted by reason.

    Empty answers, and those equal to the chosen one but for white space, are always passed over.
    """

    max_similarity: Annotated[float, Field(ge=0, le=1)] | None = Field(
        default=None,
        description="Pass over answers more like the chosen one than this, by the pairs of "
        "neighbouring words that they share (Dice coefficient).",
    )
    drop_refusals: bool = Field(
        default=False,
        description="Pass over refusals and disclaimers (`As an AI language model, ...`), known by "
        "their English openings, and prompts whose chosen answer is one.",
    )
    language: Language | Literal["same"] | None = Field(
        default=None, description="Pass over other languages; `same`: than the chosen answer's."
    )
    max_characters: Positive | None = Field(
        default=None, description="Pass over answers with more characters."
    )
    drop_unfinished: bool = Field(
        default=False, description="Pass over answers that `max_new_tokens` ended."
    )
    check: str | None = Field(
        default=None,
        description="A Python function, `module:function` or `file.py:function`, that takes a pair "
        "as a dict and returns True, or False or a reason to pass it over.",
    )


class Server(Section):
    """A model behind an OpenAI-compatible server. The key is never in a recipe or a run's files."""

    base_url: Annotated[str, AfterValidator(checked_address)] = Field(
        description="Up to where `/chat/completions` follows."
    )
    model: str = Field(description="What the server calls the model.")
    key_variable: Annotated[str, AfterValidator(checked_variable)] | None = Field(
        default=None, description="The environment variable that holds the key; null: no key."
    )
    concurrency: Positive = Field(default=8, description="Requests on their way at once.")
    timeout: Annotated[float, Field(gt=0)] = Field(
        default=120.0, description="Seconds that a request may take."
    )
    retries: Annotated[int, Field(ge=0)] = Field(
        default=5, description="Further tries after what may pass: 429, 5xx, timeouts, cut answers."
    )
    requests_per_minute: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="At most; null: as the server's 429 and Retry-After say."
    )
    limit_key: Literal["max_tokens", "max_completion_tokens"] = Field(
        default="max_tokens", description="What the server calls the limit of an answer's tokens."
    )


class Vllm(Section):
    """vLLM in this process, where it is installed."""

    tensor_parallel: Positive = Field(default=1, description="Devices that share each layer.")
    memory: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.9, description="Share of a device's memory that vLLM may take."
    )


class Rank(Section):
    """Both answers by one model: of `samples` answers the best is chosen, the worst rejected.

    A reward model scores them, or a judge on a server gives each a number from 1 to 10.
    """

    reward_model: str | None = Field(
        default=None, description="A sequence classifier with one label: a folder or a Hub id."
    )
    judge: Server | None = Field(default=None, description="A model that is asked for a number.")
    margin: Annotated[float, Field(ge=0)] = Field(
        default=0.0, description="Best and worst differ by more than this, or there is no pair."
    )

    @model_validator(mode="after")
    def _one(self) -> Rank:
        if (self.reward_model is None) == (self.judge is None):
            raise ValueError("set one of reward_model and judge")
        return self


class Pairs(Section):
    """Making preference pairs: the set's answer is chosen, a sampled one is rejected.

    `model` is the weaker model that writes the rejected answers (default: the merged SFT model), in
    this process unless `vllm` or `server` is set. `samples` answers are drawn for each prompt; the
    first that passes `keep` and `filters` is rejected. With `rank`, both answers are the model's.
    """

    prompts: Unweighted = Field(
        min_length=1, description="Records whose own answers become the chosen ones."
    )
    heldout: Unweighted = Field(
        default=(),
        description="Records for held-out pairs, which are evaluated and never trained on.",
    )
    select: Select = Field(default=Select(), description="Which of the prompts are asked.")
    model: str | None = Field(
        default=None,
        description="Writes the rejected answers, a weaker model; null: the merged SFT model.",
    )
    vllm: Vllm | None = Field(default=None, description="Generate with vLLM; null: do not.")
    server: Server | None = Field(
        default=None, description="Generate on a server, in place of `model`; null: do not."
    )
    samples: Positive = Field(default=1, description="Answers drawn for each prompt.")
    temperature: Annotated[float, Field(ge=0)] = Field(
        default=1.0, description="Sampling temperature; 0 takes the likeliest token."
    )
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(
        default=1.0,
        description="Nucleus sampling: the smallest set of tokens with this probability mass.",
    )
    top_k: Annotated[int, Field(ge=0)] = Field(
        default=0, description="Sample from so many of the likeliest tokens; 0: from all."
    )
    max_new_tokens: Positive = Field(default=256, description="Tokens of a sampled answer at most.")
    keep: Literal["different", "wrong"] = Field(
        default="different",
        description="Which answers become rejected: all unlike the chosen one, or only wrong ones.",
    )
    filters: PairFilters = Field(
        default=PairFilters(), description="Which answers are passed over besides."
    )
    rank: Rank | None = Field(
        default=None, description="Choose both answers by score; null: the set's answer is chosen."
    )
    on_bad_record: Literal["stop", "drop"] = Field(
        default="stop",
        description="What an unparsable line of conversations does: stop, or drop into the ledger.",
    )
    format: Literal["jsonl", "parquet"] = Field(
        default="jsonl", description="Of the files that are written."
    )

    @model_validator(mode="after")
    def _consistent(self) -> Pairs:
        if self.server is not None and (self.vllm is not None or self.model is not None):
            other = "vllm" if self.vllm is not None else "model"
            raise ValueError(f"server and {other} are both set; keep one, the other is null")
        if self.server is not None and self.top_k:
            raise ValueError("top_k is not among what OpenAI-compatible servers take; remove it")
        if self.temperature == 0 and self.samples > 1 and self.server is None:
            raise ValueError("temperature 0 draws the same answer `samples` times; set samples: 1")
        if self.temperature == 0 and (self.top_p < 1 or self.top_k):
            raise ValueError("top_p and top_k cannot act at temperature 0; remove them")
        if self.rank is not None and self.samples < 2:
            raise ValueError("rank chooses among answers; set samples to 2 or more")
        if self.rank is not None and self.keep == "wrong":
            raise ValueError("keep: wrong is about the set's answers, which rank does not use")
        return self


class Evaluate(Section):
    """What base, SFT and final model are asked at the end, and the tasks they are measured on.

    Tasks need the extra `eval` (lm-evaluation-harness); evaluation.md says what they measure.
    """

    questions: Unweighted = Field(
        default=(), description="Questions with known answers, for answer accuracy."
    )
    pairs: Unweighted = Field(
        default=(), description="Held-out preference pairs; empty: the pairs stage's."
    )
    heldout: Unweighted = Field(
        default=(), description="Held-out conversations, for the loss on their answers."
    )
    max_new_tokens: Positive = Field(default=64, description="Tokens of an answer at most.")
    samples: Annotated[int, Field(ge=0)] = Field(
        default=8, description="Answers shown side by side in the report."
    )
    suite: Literal["leaderboard-v1"] | None = Field(
        default=None,
        description="The Open LLM Leaderboard's first six tasks, with its few-shot examples.",
    )
    tasks: tuple[str, ...] = Field(
        default=(), description="Tasks of lm-evaluation-harness, by its names for them."
    )
    task_data: str | None = Field(
        default=None, description="A folder of task data; null: the harness's own, from the Hub."
    )
    num_fewshot: Annotated[int, Field(ge=0)] | None = Field(
        default=None, description="Few-shot examples of all tasks; null: each task's own number."
    )
    chat: bool = Field(
        default=False,
        description="Put tasks through the chat template, few-shot examples as turns.",
    )
    judge: Server | None = Field(
        default=None,
        description="A model that says whose answers to the questions are better than the first "
        "model's; see evaluation.md.",
    )
    batch_size: Positive | Literal["auto"] = Field(
        default=1, description="Requests that the harness feeds at once; scores may round with it."
    )
    limit: Positive | None = Field(
        default=None, description="Only the first so many items of everything; for trials."
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
        if self.sft is None and self.dpo is None and self.pairs is None:
            raise ValueError(
                "a recipe needs an sft section, a dpo section or both, or a pairs section"
            )
        if self.dpo is not None and not self.dpo.data and self.pairs is None:
            raise ValueError("dpo.data is missing: name a data set, or add a pairs section")
        return self
