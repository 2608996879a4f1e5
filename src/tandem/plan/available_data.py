"""What of a recipe's data is here when it is planned, and what is taken for the rest."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tandem.data.ledger import Ledger
from tandem.data.resolve_sources import held_out_of, resolve_sources
from tandem.data.sources.rows import looks_like_path, not_read
from tandem.errors import UserError
from tandem.pairs.prompts import Prompt
from tandem.pairs.select_prompts import asked_prompts
from tandem.recipe.data_source import DataSource
from tandem.recipe.recipe import Recipe
from tandem.recipe.training_settings import TrainingSettings
from tandem.storage.run_folder import made_pairs, stage_folder


@dataclass(frozen=True)
class PlannedData:
    """A stage's data as far as it is here.

    Attributes:
        sources: none where they are not here.
        held_out: data sets that are held out as a whole; None where they are not here.
        notes: what is away or guessed.
    """

    sources: Sequence[DataSource]
    held_out: Sequence[DataSource] | None = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Guess:
    """What is taken for data that is not here: how many records, and tokens of each."""

    records: int
    tokens: int


@dataclass(frozen=True)
class DataHere:
    """Looks for a recipe's data, in which what is on the Hub is only read if it may be.

    Attributes:
        recipe: whose data.
        download: whether data sets of the Hub may be fetched.
        scratch: a folder for what is only needed meanwhile.
    """

    recipe: Recipe
    download: bool
    scratch: Path

    def of(self, settings: TrainingSettings) -> PlannedData:
        """The data of one training stage."""
        notes: list[str] = []
        sources = self._here(settings.data, notes) if settings.data else self._pairs(notes)
        if not sources:
            return PlannedData((), (), tuple(notes))
        before = len(notes)
        held_out = held_out_of(settings, sources, lambda named: self._here(named, notes))
        if len(notes) > before:
            notes[-1] += ", so nothing is said of the held-out records"
            return PlannedData(sources, None, tuple(notes))
        notes += not_read([*sources, *held_out])
        return PlannedData(sources, held_out, tuple(notes))

    def _here(self, wanted: Sequence[DataSource], notes: list[str]) -> list[DataSource]:
        """Sources for the readers; none of them when one is away, which is noted."""
        away = [source.path for source in wanted if not _is_here(source.path)]
        if away and not self.download:
            notes.append(f"{', '.join(away)}: on the Hub, and not read")
            return []
        return resolve_sources(wanted, self.scratch, self.recipe.seed)

    def _pairs(self, notes: list[str]) -> list[DataSource]:
        """What the pairs stage has made, or pairs as its prompts let one expect."""
        settings = self.recipe.pairs
        assert settings is not None
        made = made_pairs(stage_folder(self.recipe.output_dir, "pairs"))
        if made is not None:
            notes.append(f"pairs: those of {made}")
            return [DataSource(path=str(made))]
        prompts = self._here(settings.prompts, notes)
        if not prompts:
            return []
        before = len(notes)
        decontaminate = self._here(settings.select.decontaminate, notes)
        if len(notes) > before:
            notes[-1] += ", so no prompt is left out for what it shares with them"
        asked, _ = asked_prompts(prompts, decontaminate, settings, self.recipe.seed, Ledger(None))
        if not asked:
            raise UserError(f"pairs: none of the records of {settings.prompts} can be asked")
        guessed = self.scratch / "guessed-pairs.jsonl"
        rows = (json.dumps(_guessed(prompt), ensure_ascii=False) + "\n" for prompt in asked)
        guessed.write_text("".join(rows), encoding="utf-8")
        notes.append(
            f"guessed: the pairs are not made yet. Taken are {len(asked)} prompts, with rejected "
            "answers as long as the chosen ones"
        )
        return [DataSource(path=str(guessed))]


def guess_for(guesses: Sequence[Guess], number: int) -> Guess | None:
    """What is taken for the data of a stage, counted from 0; the last is for all that follow."""
    return guesses[min(number, len(guesses) - 1)] if guesses else None


def check_guesses(
    guesses: Sequence[Guess], longest: Mapping[str, int], data: Sequence[PlannedData]
) -> None:
    """Raise UserError for guesses that no stage would use, or whose records it would not train.

    Args:
        guesses: see `guess_for`.
        longest: the max_length of each training stage.
        data: of each.
    """
    stages = list(longest)
    away = [number for number, found in enumerate(data, start=1) if not found.sources]
    if guesses and not away:
        raise UserError(
            "tandem plan: --records and --tokens-per-record are for data that is not here, and "
            f"that of {' and '.join(stages) or 'this recipe'} is; leave them out"
        )
    if guesses and len(guesses) > away[-1]:
        raise UserError(
            f"tandem plan: --records has {len(guesses)} numbers, one for each of "
            f"{', '.join(stages)} or one for all, and after {stages[away[-1] - 1]} no data is "
            f"missing; leave the last {len(guesses) - away[-1]} out"
        )
    for number in away:
        if guess := guess_for(guesses, number - 1):
            _check_tokens(guess.tokens, stages[number - 1], longest[stages[number - 1]])


def _check_tokens(tokens: int, stage: str, longest: int) -> None:
    if tokens < 2:
        raise UserError(
            f"tandem plan: --tokens-per-record {tokens} leaves none to train after a first one; "
            "give at least 2"
        )
    if tokens > longest:
        raise UserError(
            f"tandem plan: --tokens-per-record {tokens} is above {stage}.max_length {longest}: "
            f"no record that is trained is longer; give at most {longest}, or raise it"
        )


def _is_here(path: str) -> bool:
    return path.startswith("demo:") or looks_like_path(path)


def _guessed(prompt: Prompt) -> dict[str, str]:
    """A pair in orca_dpo_pairs' form: the answer's own words in another order are rejected."""
    words = prompt.answer.split(" ")
    rejected = " ".join(reversed(words))
    return {
        "system": prompt.system,
        "question": prompt.question,
        "chosen": prompt.answer,
        "rejected": rejected if rejected != prompt.answer else f"{rejected} {rejected}",
    }
