"""`tandem eval MODEL [MODEL ...]`: what models can do, side by side."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from tandem.cli.parser import Parser, add_flag, output_folder, path
from tandem.errors import UserError
from tandem.recipe.evaluation_settings import EvaluationSettings
from tandem.recipe.flags.flag import Flag, flag_of
from tandem.recipe.pairs_settings import ServerSettings
from tandem.recipe.run_settings import RunSettings
from tandem.runtime.launch import announce

if TYPE_CHECKING:
    from tandem.recipe.jobs import EvaluationJob


def _data(key: str) -> Flag:
    """Make a flag that names the user's own data by path."""
    about = EvaluationSettings.model_fields[key].description or ""
    about = about.partition("; empty")[0].rstrip(".") + "."
    return Flag(key, path, about, many=True, field=(key,), metavar="DATA")


# By the groups of the help text; `samples` has a default of its own.
_GROUPS: dict[str, tuple[Flag, ...]] = {
    "tasks (they need the extra eval)": (
        flag_of(EvaluationSettings, "suite"),
        flag_of(EvaluationSettings, "tasks", metavar="NAME"),
        flag_of(EvaluationSettings, "task_data", "data", metavar="FOLDER"),
        flag_of(EvaluationSettings, "num_fewshot"),
        flag_of(EvaluationSettings, "chat"),
        flag_of(EvaluationSettings, "batch_size"),
    ),
    "data of your own": (
        _data("questions"),
        _data("pairs"),
        _data("heldout"),
        flag_of(EvaluationSettings, "max_new_tokens"),
        flag_of(EvaluationSettings, "samples", help="Answers kept side by side (3)."),
    ),
    "a judge of the answers to --questions": (
        flag_of(ServerSettings, "model", "judge", at=("judge",), metavar="MODEL",
                help="A model on an OpenAI-compatible server, by its name there."),
        flag_of(ServerSettings, "base_url", "judge_url", at=("judge",), metavar="URL"),
        flag_of(ServerSettings, "key_variable", "judge_key_variable", at=("judge",),
                metavar="NAME"),
    ),
}  # fmt: skip
_LIMIT = flag_of(EvaluationSettings, "limit")
_RUN = (
    flag_of(RunSettings, "chat_template", help="For models without a template of their own."),
    flag_of(RunSettings, "device", help="The device to compute on."),
    flag_of(RunSettings, "dtype"),
)


def evaluate(argv: list[str]) -> int:
    """Measure models on tasks and data, and print one table."""
    arguments = _parser().parse(argv)
    job = _job(arguments)
    from tandem.evaluate.evaluate_models import check_something, evaluate_models
    from tandem.report import terminal_tables
    from tandem.result_warnings import evaluation_warnings
    from tandem.runtime.console import notice_console, result_console

    check_something(job.settings)
    output_folder(job.folder, "--output_dir")
    announce(f"evaluation of {', '.join(job.models.values())} -> {job.folder}")
    measured = evaluate_models(job, notice_console())
    if arguments.json:
        print(json.dumps(measured, indent=2, ensure_ascii=False))
        return 0
    console = result_console()
    console.print(terminal_tables.comparison_table(measured))
    for note in terminal_tables.comparison_notes(measured):
        console.print(note, markup=False, soft_wrap=True)
    if measured["samples"]:
        console.print(terminal_tables.samples_table(measured, job.settings.samples))
    for line in terminal_tables.warning_lines(evaluation_warnings(measured)):
        console.print(line, soft_wrap=True)
    console.print(f"all figures: {job.folder / 'evaluation.json'}", soft_wrap=True, markup=False)
    return 0


def _job(arguments: argparse.Namespace) -> EvaluationJob:
    """Make the job of some flags; raise UserError naming the flag of a wrong value."""
    from pydantic import ValidationError

    from tandem.recipe.explain_errors import explain
    from tandem.recipe.jobs import EvaluationJob
    from tandem.recipe.yaml_lines import Location
    from tandem.storage.run_folder import labels_of, model_in_run

    values = vars(arguments)
    given: dict[str, Any] = {"samples": 3}
    names = {}
    for flag in (*(flag for flags in _GROUPS.values() for flag in flags), _LIMIT):
        names[flag.field] = f"--{flag.name}"
        if flag.name in values:
            *above, key = flag.field
            inner = given.setdefault(above[0], {}) if above else given
            inner[key] = values[flag.name]
    if "tasks" in given:
        given["tasks"] = [name for text in given["tasks"] for name in text.split(",") if name]
    _check_judge(given.get("judge", {}))

    def place(location: Location) -> str:
        keys = tuple(map(str, location))
        flags = (names.get(keys[:n]) for n in range(len(keys), 0, -1))
        return next(filter(None, flags), "tandem eval")

    try:
        settings = EvaluationSettings.model_validate(given)
    except ValidationError as error:
        message = explain(error, EvaluationSettings, place)
        raise UserError(message.replace("task_data", "data")) from None
    models = [model_in_run(model) for model in arguments.models]
    run = RunSettings(
        model=models[0],
        output_dir=values.get("output_dir", "runs/evaluation"),
        seed=0,
        **{flag.name: values[flag.name] for flag in _RUN if flag.name in values},
    )
    labelled = dict(zip(labels_of(models), models, strict=True))
    return EvaluationJob(run, settings, labelled, replace=True)


def _check_judge(judge: dict[str, Any]) -> None:
    """Raise UserError if only a part of a judge's server is named."""
    if judge.keys() == {"key_variable"}:
        raise UserError("--judge_key_variable is a judge's; name --judge and --judge_url")
    if judge and not {"model", "base_url"} <= judge.keys():
        raise UserError("a judge needs both --judge, its name on the server, and --judge_url")


def _parser() -> Parser:
    parser = Parser(
        prog="tandem eval",
        usage="tandem eval MODEL [MODEL ...] [flags]",
        description="Measure models side by side: tasks of lm-evaluation-harness, and data of "
        "your own.\nOne table, with standard errors and differences from the first model.",
        epilog="example: tandem eval BASE runs/my-run --suite leaderboard-v1 --output_dir "
        "runs/comparison\nThe same command resumes where it was stopped.",
        argument_default=argparse.SUPPRESS,
    )
    add = parser.add_argument
    add("models", type=path, metavar="MODEL", nargs="+",
        help="A model, adapter or run folder, or a Hub id.")  # fmt: skip
    for title, flags in _GROUPS.items():
        group = parser.add_argument_group(title)
        for flag in flags:
            add_flag(group, flag)
    for flag in (_LIMIT, *_RUN):
        add_flag(parser, flag)
    add("--output_dir", type=path, metavar="FOLDER",
        help="What is measured is kept there (runs/evaluation).")  # fmt: skip
    add("--json", action="store_true", default=False, help="Print all figures as JSON.")
    return parser
