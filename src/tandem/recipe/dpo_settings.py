"""Settings of preference training: the loss, and what each loss makes use of."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Annotated

from pydantic import (
    AfterValidator,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    model_validator,
)

from tandem.errors import UserError
from tandem.losses.answers import DivergenceName
from tandem.losses.custom import check_name, is_custom
from tandem.losses.known import find_loss, known_losses
from tandem.losses.registry import PREFERENCE_LOSSES, Compared, PreferenceLoss
from tandem.recipe import choices
from tandem.recipe.data_source import Sources
from tandem.recipe.training_settings import TrainingSettings


def _checked(value: str | dict[str, float]) -> str | dict[str, float]:
    names = [value] if isinstance(value, str) else list(value)
    if not names:
        raise ValueError("no loss is named; write a name, or a mapping of names to weights")
    for name in names:
        if is_custom(name):  # its module is imported when the stage begins
            check_name(name)
            continue
        try:
            find_loss(name)
        except UserError as error:
            raise ValueError(str(error)) from None
    for name, weight in value.items() if isinstance(value, dict) else ():
        if not (math.isfinite(weight) and weight > 0):
            raise ValueError(
                f"the weight of {name} is {weight:g}, and must be above 0; leave {name} out if it "
                "is not to count"
            )
    return value


Losses = Annotated[str | dict[str, float], AfterValidator(_checked)]


class DpoSettings(TrainingSettings):
    """Preference training. `data` empty means: the pairs stage's output."""

    data: Sources = Field(
        default=(), description="Preference pairs; empty: what the pairs stage makes."
    )
    learning_rate: PositiveFloat = Field(default=5e-6, description="The peak learning rate.")
    loss: Losses = Field(
        default="sigmoid",
        description="A loss by its name (docs/guide/losses.md), or several with their weights: "
        "`{sigmoid: 1, sft: 0.1}`; one of your own is `module:function`.",
    )
    beta: PositiveFloat = Field(
        default=0.1, description="How strongly the policy is held to the reference."
    )
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = Field(
        default=0.0, description="Probability that a pair's answers are swapped."
    )
    f_divergence_type: DivergenceName = Field(
        default="reverse_kl", description="What holds the policy to the reference."
    )
    f_alpha_divergence_coef: PositiveFloat = Field(
        default=0.5, description="Alpha of the alpha-divergence; at 1 it is the reverse KL."
    )
    ld_alpha: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        default=None,
        description="Weight of tokens beyond the shorter answer's length (LD-DPO); null: 1.",
    )
    simpo_gamma: NonNegativeFloat = Field(
        default=0.5, description="SimPO's target margin of the rewards."
    )
    cpo_alpha: NonNegativeFloat = Field(
        default=1.0, description="Weight of the likelihood of chosen answers in CPO."
    )
    dpop_lambda: PositiveFloat = Field(
        default=50.0, description="Weight of a chosen answer's fall in DPO-positive."
    )
    discopop_tau: PositiveFloat = Field(
        default=0.05, description="Temperature of DiscoPOP's blend."
    )

    desirable_weight: PositiveFloat = Field(
        default=1.0, description="Weight of good answers in losses of single answers."
    )
    undesirable_weight: PositiveFloat = Field(
        default=1.0, description="Weight of bad answers in losses of single answers."
    )
    score_temperature: PositiveFloat = Field(
        default=1.0, description="Temperature of the softmax over a row's scores (info_nca, nca)."
    )

    @property
    def trains_on(self) -> choices.RecordKind:
        """Pairs or rows of answers, or single answers with labels, as the loss compares them."""
        return "labelled answers" if self.compared == "answers" else "preference pairs"

    @property
    def compared(self) -> Compared:
        """What the losses compare; functions of the user's own are losses of pairs."""
        first = next(iter(self.losses))
        return "pairs" if is_custom(first) else find_loss(first).compared

    @property
    def losses(self) -> dict[str, float]:
        """The weight of each loss by its name."""
        return {self.loss: 1.0} if isinstance(self.loss, str) else dict(self.loss)

    @property
    def needs_reference(self) -> bool:
        """Whether any of the losses needs log-probs of a reference; imports the user's own."""
        return any(find_loss(name).reference for name in self.losses)

    @property
    def sees_steps(self) -> bool:
        """Whether a loss needs a statistic of each step, for which the step is computed before."""
        return any(one.statistic is not None for one in known_losses(self.losses))

    @property
    def reference_passes(self) -> int:
        """Passes of the reference over the data; the second is of answers to other prompts."""
        more = self.sees_steps and self.compared == "answers"
        return (1 + more) if self.needs_reference else 0

    def idle_options(self) -> dict[str, str]:
        """See `TrainingSettings`; what only other losses use is idle, too."""
        named = " and ".join(self.losses)
        used = {option for loss in known_losses(self.losses) for option in loss.options}
        # What a function of the user's own uses is checked when it is there, see `Mixture.of`.
        unknown = any(map(is_custom, self.losses))
        idle = super().idle_options()
        every = (option for loss in PREFERENCE_LOSSES.values() for option in loss.options)
        for option in dict.fromkeys(every):
            if option not in used and not unknown:
                users = ", ".join(_users(option))
                idle[option] = f"loss {named}; remove it, or take a loss that uses it: {users}"
        if self.f_divergence_type != "alpha_divergence":
            idle.setdefault("f_alpha_divergence_coef", _OTHER_DIVERGENCE)
        return idle

    @model_validator(mode="after")
    def _fits_the_loss(self) -> DpoSettings:
        losses = known_losses(self.losses)
        self._check_compared(losses)
        self._check_rows()
        for loss in losses:
            for option, usual in loss.required.items():
                if getattr(self, option) == type(self).model_fields[option].default:
                    raise ValueError(f"loss {loss.name} needs {option}; {usual} is usual")
        return self

    def _check_compared(self, losses: list[PreferenceLoss]) -> None:
        kinds: dict[str, str] = {loss.compared: loss.name for loss in losses}
        if own := next(filter(is_custom, self.losses), None):
            kinds["pairs"] = own
        if len(kinds) > 1:
            listed = " and ".join(f"{name} (of {kind})" for kind, name in kinds.items())
            raise ValueError(f"{listed} are losses of different things, and cannot be mixed")

    def _check_rows(self) -> None:
        """Whole rows are what `completions: ranked` makes, and nothing else does."""
        validation = () if self.validation is None else self.validation.data
        for source in (*self.data, *validation):
            ranked = source.completions == "ranked"
            if self.compared == "rows" and not ranked:
                raise ValueError(
                    f"loss {next(iter(self.losses))} compares all answers of a row, but "
                    f"{source.path} is read as pairs; set its completions to ranked"
                )
            if ranked and self.compared != "rows":
                rows = [one.name for one in PREFERENCE_LOSSES.values() if one.compared == "rows"]
                raise ValueError(
                    f"{source.path}: completions: ranked is for losses of whole rows "
                    f"({', '.join(rows)}); for loss {next(iter(self.losses))} take all_pairs or "
                    "best_vs_all"
                )
        if self.compared == "rows" and not self.data:
            raise ValueError(
                f"loss {next(iter(self.losses))} compares all answers of a row, which the pairs "
                "stage does not make; name data with completions: ranked"
            )


_OTHER_DIVERGENCE = "another f_divergence_type than alpha_divergence; remove it"


def uses_beta(losses: str | Iterable[str]) -> bool:
    """Whether any of some losses, which may be unknown, uses `beta`."""
    names = [losses] if isinstance(losses, str) else list(losses)
    known = known_losses(names)
    return len(known) < len(names) or any("beta" in loss.options for loss in known)


def _users(option: str) -> list[str]:
    """The losses that use an option."""
    return [loss.name for loss in PREFERENCE_LOSSES.values() if option in loss.options]
