"""A recipe's settings for making preference pairs."""

from __future__ import annotations

import re
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, NonNegativeInt, PositiveFloat, model_validator

from tandem.recipe import choices
from tandem.recipe.data_source import Unweighted
from tandem.recipe.section import PathText, Positive, Section


def checked_address(base_url: str) -> str:
    """Return a server's address; raise ValueError, without quoting it, for one with a secret."""
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
    """Return an environment variable's name; raise ValueError for a text that cannot be one.

    The message does not quote the text, which may be the key itself.
    """
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        raise ValueError(
            "this is no name of an environment variable; if it is the key itself, put that into a "
            "variable, and the variable's name here"
        )
    return name


def checked_regex(pattern: str) -> str:
    """Return a regular expression; raise ValueError for a text that is none."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is no regular expression: {error}") from None
    return pattern


Regex = Annotated[str, AfterValidator(checked_regex)]


class SelectSettings(Section):
    """Which prompts of `pairs.prompts` are asked: filters first, then a seeded sample.

    Lengths are in characters. What is left out is counted by reason. A language is guessed from
    script and common words; texts that do not say are kept.
    """

    count: Positive | None = Field(
        default=None, description="So many prompts, sampled with the recipe's seed; null: all."
    )
    stratify: choices.Strata | None = Field(
        default=None,
        description="Sample within each data set, or each class of prompt length (each class twice "
        "as wide as the one before).",
    )
    shares: choices.Shares = Field(
        default="proportional",
        description="What each stratum gives: its share of the data, or equal parts.",
    )
    distinct: bool = Field(default=False, description="Leave out prompts that occurred before.")
    min_prompt_characters: Positive | None = Field(
        default=None, description="Characters of the user's text, at least."
    )
    max_prompt_characters: Positive | None = Field(
        default=None, description="Characters of the user's text, at most."
    )
    min_answer_characters: Positive | None = Field(
        default=None, description="Characters of the set's answer, at least."
    )
    max_answer_characters: Positive | None = Field(
        default=None, description="Characters of the set's answer, at most."
    )
    language: choices.Language | None = Field(
        default=None, description="Keep prompts and answers in this language."
    )
    matches: Regex | None = Field(
        default=None,
        description="Keep prompts in whose user's text this regular expression is found.",
    )
    excludes: Regex | None = Field(
        default=None,
        description="Leave out prompts in whose user's text this regular expression is found.",
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
    def _effective(self) -> SelectSettings:
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


class FilterSettings(Section):
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
    language: choices.Language | Literal["same"] | None = Field(
        default=None, description="Pass over other languages; `same`: than the chosen answer's."
    )
    max_characters: Positive | None = Field(
        default=None, description="Pass over answers with more characters."
    )
    drop_unfinished: bool = Field(
        default=False, description="Pass over answers that `max_new_tokens` ended."
    )
    check: PathText | None = Field(
        default=None,
        description="A Python function, `module:function` or `file.py:function`, that takes a pair "
        "as a dict and returns True, or False or a reason to pass it over.",
    )


class ServerSettings(Section):
    """A model behind an OpenAI-compatible server. The key is never in a recipe or a run's files."""

    base_url: Annotated[str, AfterValidator(checked_address)] = Field(
        description="The server's address, up to where `/chat/completions` follows."
    )
    model: str = Field(description="What the server calls the model.")
    key_variable: Annotated[str, AfterValidator(checked_variable)] | None = Field(
        default=None, description="The environment variable that holds the key; null: no key."
    )
    concurrency: Positive = Field(default=8, description="Requests in flight at once.")
    timeout: PositiveFloat = Field(default=120.0, description="Seconds that a request may take.")
    retries: NonNegativeInt = Field(
        default=5,
        description="Further tries after errors that may pass: 429, 5xx, timeouts, cut answers.",
    )
    requests_per_minute: PositiveFloat | None = Field(
        default=None,
        description="Requests a minute at most; null: as the server's 429 and Retry-After say.",
    )
    limit_key: choices.LimitKey = Field(
        default="max_tokens", description="What the server calls the limit of an answer's tokens."
    )


class VllmSettings(Section):
    """vLLM in this process, where it is installed."""

    tensor_parallel: Positive = Field(default=1, description="Devices that share each layer.")
    memory: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.9, description="Share of a device's memory that vLLM may take."
    )


class RankSettings(Section):
    """Both answers by one model: of `samples` answers the best is chosen, the worst rejected.

    A reward model scores them, or a judge on a server gives each a number from 1 to 10.
    """

    reward_model: PathText | None = Field(
        default=None, description="A sequence classifier with one label: a folder or a Hub id."
    )
    judge: ServerSettings | None = Field(
        default=None, description="A model that is asked for a number."
    )
    margin: Annotated[float, Field(ge=0)] = Field(
        default=0.0, description="Best and worst differ by more than this, or there is no pair."
    )

    @model_validator(mode="after")
    def _one(self) -> RankSettings:
        if (self.reward_model is None) == (self.judge is None):
            raise ValueError("set one of reward_model and judge")
        return self


class PairsSettings(Section):
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
    select: SelectSettings = Field(
        default=SelectSettings(), description="Which of the prompts are asked."
    )
    parts: Positive = Field(
        default=1,
        description="Divide the selected prompts into so many parts, of which each round asks one; "
        "1: every round asks all of them, with a seed of its own.",
    )
    model: PathText | None = Field(
        default=None,
        description="The weaker model that writes the rejected answers; null: the merged SFT "
        "model, in a later round that of the round before.",
    )
    vllm: VllmSettings | None = Field(default=None, description="Generate with vLLM; null: do not.")
    server: ServerSettings | None = Field(
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
    top_k: NonNegativeInt = Field(
        default=0, description="Sample from so many of the likeliest tokens; 0: from all."
    )
    max_new_tokens: Positive = Field(default=256, description="Tokens of a sampled answer at most.")
    keep: choices.RejectedAnswers = Field(
        default="different",
        description="Which answers become rejected: all unlike the chosen one, or only wrong ones.",
    )
    filters: FilterSettings = Field(
        default=FilterSettings(), description="Which other answers are passed over."
    )
    rank: RankSettings | None = Field(
        default=None, description="Choose both answers by score; null: the set's answer is chosen."
    )
    on_bad_record: choices.OnBadRecord = Field(
        default="stop",
        description="At a line of conversations that cannot be parsed, stop, or drop it and note "
        "it in the ledger.",
    )
    format: choices.PairsFormat = Field(
        default="jsonl", description="Format of the files that are written."
    )

    @model_validator(mode="after")
    def _consistent(self) -> PairsSettings:
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
        if self.rank is not None and self.filters.language == "same":
            raise ValueError(
                "filters.language: same is about the set's answers, which rank does not use; name "
                "a language, or remove it"
            )
        return self
