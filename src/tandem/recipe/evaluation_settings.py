"""A recipe's settings of the evaluation at the end."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, NonNegativeInt, model_validator

from tandem.recipe.choices import Suite
from tandem.recipe.data_source import DataSource, Unweighted
from tandem.recipe.pairs_settings import ServerSettings
from tandem.recipe.section import PathText, Positive, Section


def _of_two(sources: tuple[DataSource, ...]) -> tuple[DataSource, ...]:
    """Refuse what makes records of more than two answers, which evaluation does not compare."""
    for source in sources:
        if source.completions in ("all_pairs", "best_vs_all", "ranked"):
            raise ValueError(
                f"{source.path}: completions: {source.completions} makes records of whole rows, "
                "and two answers are compared here; take best_vs_worst or best_vs_rest"
            )
    return sources


class EvaluationSettings(Section):
    """What base, SFT and final model are asked at the end, and the tasks they are measured on.

    Tasks need the extra `eval` (lm-evaluation-harness); evaluation.md says what they measure.
    """

    questions: Unweighted = Field(
        default=(), description="Questions with known answers, for answer accuracy."
    )
    pairs: Annotated[Unweighted, AfterValidator(_of_two)] = Field(
        default=(), description="Held-out preference pairs; empty: the pairs stage's."
    )
    heldout: Unweighted = Field(
        default=(), description="Held-out conversations, for the loss on their answers."
    )
    max_new_tokens: Positive = Field(default=64, description="Tokens of an answer at most.")
    samples: NonNegativeInt = Field(
        default=8, description="Answers shown side by side in the report."
    )
    suite: Suite | None = Field(
        default=None,
        description="The Open LLM Leaderboard's first six tasks, with its few-shot examples.",
    )
    tasks: tuple[str, ...] = Field(
        default=(), description="Tasks of lm-evaluation-harness, by its names for them."
    )
    task_data: PathText | None = Field(
        default=None, description="A folder of task data; null: the harness's own, from the Hub."
    )
    num_fewshot: NonNegativeInt | None = Field(
        default=None, description="Few-shot examples of all tasks; null: each task's own number."
    )
    chat: bool = Field(
        default=False,
        description="Put tasks through the chat template, few-shot examples as turns.",
    )
    judge: ServerSettings | None = Field(
        default=None,
        description="A model that says which answers to the questions are better than the first "
        "model's; see evaluation.md.",
    )
    batch_size: Positive | Literal["auto"] = Field(
        default=1, description="Requests that the harness feeds at once; scores may round with it."
    )
    limit: Positive | None = Field(
        default=None, description="Use only the first so many items of everything; for trials."
    )

    @model_validator(mode="after")
    def _effective(self) -> EvaluationSettings:
        of_tasks = {
            "task_data": self.task_data is not None,
            "num_fewshot": self.num_fewshot is not None,
            "chat": self.chat,
            "batch_size": self.batch_size != 1,
        }
        unused = [name for name, is_set in of_tasks.items() if is_set]
        if unused and not self.tasks and self.suite is None:
            raise ValueError(
                f"{' and '.join(unused)} {'are' if len(unused) > 1 else 'is'} about tasks, and no "
                "tasks and no suite are named; name some, or remove it"
            )
        return self
