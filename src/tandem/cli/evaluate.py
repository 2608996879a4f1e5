"""`tandem eval MODEL [MODEL ...]`: what models can do, side by side."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tandem.cli.parser import Parser, count, output_folder, path, positive
from tandem.errors import UserError
from tandem.recipe.flags import DEVICES, DTYPES

if TYPE_CHECKING:
    from tandem.recipe.evaluation_settings import EvaluationSettings
    from tandem.recipe.pairs_settings import ServerSettings


def evaluate(argv: list[str]) -> int:
    """Measure models on tasks and data, and print one table."""
    arguments = _parser().parse(argv)
    settings = _settings(arguments)
    from tandem.chat.session import labels_of, model_in_run
    from tandem.evaluate.evaluate_models import check_something, run_evaluation
    from tandem.recipe.run_settings import Runtime
    from tandem.report.terminal_tables import (
        comparison_notes,
        comparison_table,
        samples_table,
        warning_lines,
    )
    from tandem.result_warnings import evaluation_warnings
    from tandem.runtime.console import notice_console, result_console

    check_something(settings)
    folder = output_folder(Path(arguments.output_dir), "--output_dir")
    models = [model_in_run(path) for path in arguments.models]
    found = run_evaluation(
        models=dict(zip(labels_of(models), models, strict=True)),
        settings=settings,
        output_dir=folder,
        chat_template=arguments.chat_template,
        seed=0,
        runtime=Runtime(device=arguments.device, dtype=arguments.dtype),
        console=notice_console(),
        replace=True,
    )
    if arguments.json:
        print(json.dumps(found, indent=2, ensure_ascii=False))
        return 0
    console = result_console()
    console.print(comparison_table(found))
    for note in comparison_notes(found):
        console.print(note, markup=False, soft_wrap=True)
    if found["samples"]:
        console.print(samples_table(found, arguments.samples))
    for line in warning_lines(evaluation_warnings(found)):
        console.print(line, soft_wrap=True)
    console.print(f"all figures: {folder / 'evaluation.json'}", soft_wrap=True, markup=False)
    return 0


def _settings(arguments: argparse.Namespace) -> EvaluationSettings:
    from pydantic import ValidationError

    from tandem.recipe.evaluation_settings import EvaluationSettings

    def sources(paths: Sequence[str]) -> Any:
        return tuple({"path": path} for path in paths)

    try:
        return EvaluationSettings(
            questions=sources(arguments.questions),
            pairs=sources(arguments.pairs),
            heldout=sources(arguments.heldout),
            max_new_tokens=arguments.max_new_tokens,
            samples=arguments.samples,
            suite=arguments.suite,
            tasks=tuple(name for text in arguments.tasks for name in text.split(",") if name),
            task_data=arguments.data,
            num_fewshot=arguments.num_fewshot,
            chat=arguments.chat == "on",
            judge=_judge(arguments),
            batch_size=arguments.batch_size,
            limit=arguments.limit,
        )
    except ValidationError as error:
        said = error.errors(include_url=False)[0]["msg"].removeprefix("Value error, ")
        raise UserError(f"tandem eval: {said.replace('task_data', 'data')}") from None


def _judge(arguments: argparse.Namespace) -> ServerSettings | None:
    """The judge's server; raises UserError for one that is named by half."""
    if not arguments.judge and not arguments.judge_url:
        if arguments.judge_key_variable:
            raise UserError("--judge_key_variable is a judge's; name --judge and --judge_url")
        return None
    if not (arguments.judge and arguments.judge_url):
        raise UserError("a judge needs both --judge, its name on the server, and --judge_url")
    from pydantic import ValidationError

    from tandem.recipe.pairs_settings import ServerSettings

    try:
        return ServerSettings(
            base_url=arguments.judge_url,
            model=arguments.judge,
            key_variable=arguments.judge_key_variable,
        )
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        flag = {"base_url": "--judge_url", "key_variable": "--judge_key_variable"}
        where = flag.get(str(first["loc"][0]), "--judge")
        raise UserError(f"{where}: {first['msg'].removeprefix('Value error, ')}") from None


def _parser() -> Parser:
    parser = Parser(
        prog="tandem eval",
        usage="tandem eval MODEL [MODEL ...] [flags]",
        description="Measure models side by side: tasks of lm-evaluation-harness, and data of "
        "your own.\nOne table, with standard errors and differences from the first model.",
        epilog="example: tandem eval BASE runs/my-run --suite leaderboard-v1 --output_dir "
        "runs/comparison\nThe same command again goes on where it was stopped.",
    )
    parser.add_argument(
        "models",
        type=path,
        metavar="MODEL",
        nargs="+",
        help="model, adapter or run folder, or a Hub id",
    )
    many: dict[str, Any] = {"nargs": "+", "default": []}
    tasks = parser.add_argument_group("tasks (they need the extra eval)")
    tasks.add_argument(
        "--suite", choices=("leaderboard-v1",), help="the Open LLM Leaderboard's first six tasks"
    )
    tasks.add_argument("--tasks", metavar="NAME", help="the harness's names for tasks", **many)
    tasks.add_argument(
        "--data",
        type=path,
        metavar="FOLDER",
        help="local task data; left out: each task's own, from the Hub",
    )
    tasks.add_argument(
        "--num_fewshot", type=count, metavar="N", help="few-shot examples of all tasks"
    )
    tasks.add_argument(
        "--chat",
        choices=("on", "off"),
        default="off",
        help="put tasks through the chat template (off)",
    )
    tasks.add_argument(
        "--batch_size",
        type=_batch_size,
        default=1,
        metavar="N|auto",
        help="requests fed at once (1); scores may round with it",
    )
    own = parser.add_argument_group("data of your own")
    data: dict[str, Any] = {**many, "type": path, "metavar": "DATA"}
    own.add_argument("--questions", help="questions with known answers", **data)
    own.add_argument("--pairs", help="held-out preference pairs", **data)
    own.add_argument("--heldout", help="held-out conversations, for loss", **data)
    own.add_argument(
        "--max_new_tokens", type=positive, default=64, metavar="N", help="of an answer (64)"
    )
    own.add_argument(
        "--samples", type=count, default=3, metavar="N", help="answers kept side by side (3)"
    )
    own.add_argument(
        "--chat_template",
        type=path,
        metavar="NAME|FILE",
        help="for models without one of their own",
    )
    judge = parser.add_argument_group("a judge of the answers to --questions")
    judge.add_argument(
        "--judge", metavar="MODEL", help="a model on an OpenAI-compatible server, by its name there"
    )
    judge.add_argument(
        "--judge_url", metavar="URL", help="the server, up to where /chat/completions follows"
    )
    judge.add_argument(
        "--judge_key_variable", metavar="NAME", help="the environment variable that holds its key"
    )
    parser.add_argument(
        "--limit", type=positive, metavar="N", help="only the first N items of everything"
    )
    parser.add_argument("--device", choices=DEVICES, default="auto", help="where to compute")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="auto", help="auto: float32 on a CPU, else bfloat16"
    )
    parser.add_argument(
        "--output_dir",
        type=path,
        default="runs/evaluation",
        metavar="FOLDER",
        help="what is measured is kept there (runs/evaluation)",
    )
    parser.add_argument("--json", action="store_true", help="print all figures as JSON")
    return parser


def _batch_size(text: str) -> int | str:
    return text if text == "auto" else positive(text)
