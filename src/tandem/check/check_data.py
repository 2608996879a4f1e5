"""`tandem check` as a whole: survey every data set, and print the results."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from tandem import __version__
from tandem.check.check_page import as_json, print_survey
from tandem.check.inputs import StageChat, doubts_of, other_sets, require_context, with_validation
from tandem.check.survey import survey
from tandem.check.survey_result import CheckTarget, Survey
from tandem.data.encoded.worker_pool import EncodingWork
from tandem.errors import UserError
from tandem.recipe.recipe import Recipe
from tandem.runtime.console import notice_console, phase, result_console


@dataclass(frozen=True)
class CheckJob:
    """What `tandem check` inspects."""

    targets: Sequence[CheckTarget]  # the data of each stage
    chat: StageChat | None
    recipe: Recipe | None
    against: Sequence[str]  # names of sets with which nothing should be shared
    limit: int | None  # rows of each target to read, None for all
    shown: int  # rows shown of each finding
    notices: Sequence[str]  # what to print first


def check_data(job: CheckJob, folder: Path, *, as_one_object: bool) -> None:
    """Survey the data and print pages, or one JSON object; raise UserError if it would not train.

    `folder` is for the embedded demo's data.
    """
    surveys, notices = surveys_of(job, folder, notice_console())
    if as_one_object:
        _print_json(job, surveys, notices)
    else:
        _print_pages(job.chat, surveys, notices)
    _require_trainable(surveys, whole=as_one_object)


def surveys_of(job: CheckJob, folder: Path, console: Console) -> tuple[list[Survey], list[str]]:
    """Survey the data of each stage, its validation data after it; returns notices as well."""
    surveys = [_survey(job, target, folder, console) for target in with_validation(job.targets)]
    notices = [*(job.chat.notices if job.chat else ()), *job.notices]
    if job.recipe is not None and job.limit is None:
        for one in surveys:
            if one.target.stage is not None and not one.target.held_out:
                doubts = doubts_of(one.target.stage, job.recipe, one.examples)
                notices = [*doubts, *notices]
    return surveys, notices


def _survey(job: CheckJob, target: CheckTarget, folder: Path, console: Console) -> Survey:
    if job.chat is not None:
        require_context(job.chat, target)
        target = replace(target, chat=job.chat.chat, special=job.chat.special)
    return survey(
        target,
        others=other_sets(target, job.recipe, job.against, folder),
        limit=job.limit,
        shown=job.shown,
        encoding_work=EncodingWork(progress=lambda text, total: phase(console, text, total)),
    )


def check_as_json(
    job: CheckJob, surveys: Sequence[Survey], notices: Sequence[str]
) -> dict[str, Any]:
    """Return all that was found as plain values; keys are only ever added."""
    return {
        "tandem": __version__,
        "recipe": job.recipe.name if job.recipe else None,
        "model": job.chat.model if job.chat else None,
        "chat_template": job.chat.template if job.chat else None,
        "notices": list(notices),
        "trains": all(one.problem is None for one in surveys),
        "data": [as_json(one) for one in surveys],
    }


def _print_json(job: CheckJob, surveys: Sequence[Survey], notices: Sequence[str]) -> None:
    # In ASCII: keys and file names may have bytes that are no UTF-8.
    sys.stdout.write(json.dumps(check_as_json(job, surveys, notices), indent=2) + "\n")


def _print_pages(chat: StageChat | None, surveys: Sequence[Survey], notices: Sequence[str]) -> None:
    for notice in notices:
        notice_console().print(notice, markup=False, soft_wrap=True)
    tokenizer = f"{chat.model}, template {chat.template}" if chat else None
    # Where nothing could be read, only the problem is reported.
    pages = [one for one in surveys if one.counts["read"] or one.problem is None]
    for number, one in enumerate(pages):
        if number:
            result_console().print()
        print_survey(result_console(), one, tokenizer)


def _require_trainable(surveys: Sequence[Survey], *, whole: bool) -> None:
    """Raise UserError for data that would not train; it names the problem unless a page does."""
    problems = [
        one.problem
        if whole or not one.counts["read"]
        else f"{' and '.join(source.path for source in one.target.sources)}: a run would stop, "
        "for the reason at the end of the page"
        for one in surveys
        if one.problem is not None
    ]
    if problems:
        raise UserError("\n".join(problems))
