"""`tandem sft`, `tandem dpo` and `tandem merge`: one stage each, under the tutorial's flags."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tandem.cli.nproc import add_nproc, in_processes
from tandem.cli.parser import Parser, add_dry_run, add_flag, output_folder, path
from tandem.integrations.choose import has_bridge, prepare_devices
from tandem.recipe.choices import TrainingStageName
from tandem.recipe.flags.flag import flag_of
from tandem.recipe.flags.tutorial_flags import SETTINGS, job_from_flags, stage_flags
from tandem.recipe.run_settings import RunSettings
from tandem.recipe.training_settings import MergeSettings, TrainingSettings
from tandem.runtime.launch import announce, launched

if TYPE_CHECKING:
    from rich.console import Console

    from tandem.recipe.jobs import TrainingJob

_TITLES = {
    "sft": "Supervised fine-tuning: on the answers of conversations; an adapter, or all weights.",
    "dpo": "Preference training: Direct Preference Optimization, or another loss with --loss.",
}


def sft(argv: list[str]) -> int:
    """Supervised fine-tuning of a LoRA adapter."""
    return _train("sft", argv)


def dpo(argv: list[str]) -> int:
    """Direct Preference Optimization of a LoRA adapter."""
    return _train("dpo", argv)


def merge(argv: list[str]) -> int:
    """Merge an adapter into its base model."""
    arguments = _merge_parser().parse(argv)
    from tandem.recipe.jobs import MergeJob
    from tandem.runtime.console import notice_console
    from tandem.stages.finished import merge_is_finished

    run = RunSettings(
        model=arguments.base_model_path,
        output_dir=str(output_folder(Path(arguments.output_path), "--output-path")),
        chat_template=arguments.chat_template,
        device=arguments.device,
    )
    adapter = output_folder(Path(arguments.lora_model_path), "--lora-model-path")
    settings = MergeSettings(dtype=arguments.dtype)
    job, console = MergeJob(run, settings, adapter, force=arguments.force), notice_console()
    announce(f"merge of {adapter} into {run.model} -> {job.folder}")
    if not merge_is_finished(job, console):
        from tandem.stages.merge import run_merge

        run_merge(job, console)
    return 0


def stage_parser(
    stage: TrainingStageName, settings: type[TrainingSettings] | None = None
) -> Parser:
    """Make the parser of a training stage; its result lacks missing flags.

    `settings` is the class of the stage's settings, if it has more fields.
    """
    parser = Parser(
        prog=f"tandem {stage}",
        usage=f"tandem {stage} --model_name_or_path M --dataset_name D --output_dir O [flags]",
        description=_TITLES[stage],
        epilog="A flag that is left out has the value of the recipe neural-chat-7b-v3-1. Dashes "
        "and underscores\nare the same. The global batch is the per-device batch x accumulation x "
        "devices.",
        argument_default=argparse.SUPPRESS,
    )
    for flag in stage_flags(settings or SETTINGS[stage]):
        add_flag(parser, flag)
    add_dry_run(parser)
    add_nproc(parser)
    return parser


def _train(stage: TrainingStageName, argv: list[str]) -> int:
    """Run a stage, in this process or with --nproc in others, or print its settings."""
    values = vars(stage_parser(stage).parse(argv))
    dry_run, nproc = values.pop("dry_run", False), values.pop("nproc", None)
    devices = nproc or launched().count
    job, notices = job_from_flags(stage, values, devices=devices, cards=has_bridge())
    if not dry_run:
        announce(f"{stage} of {job.run.model} -> {job.folder}")
    if nproc is not None and not dry_run:
        return in_processes(nproc, stage, argv, device=job.run.device)
    from tandem.runtime.console import notice_console

    console = notice_console()
    for notice in (*prepare_devices(job.run), *notices):
        console.print(notice, markup=False, soft_wrap=True)
    # --bf16 means bfloat16 only on hardware that gains from it.
    half = bool(values.get("bf16")) and job.run.dtype == "auto"
    if dry_run:
        if launched().speaks:
            print(dry_run_text(job, half=half), end="")
        return 0
    output_folder(job.folder, "--output_dir")
    if half:
        job = _in_half(job, console)
    from tandem.pipeline.run_pipeline import run_training

    run_training(stage, job, console)
    from tandem.runtime.process_group import leave

    leave()
    return 0


def dry_run_text(job: TrainingJob, *, half: bool = False) -> str:
    """Write the job as YAML; `half` if its dtype follows from the device."""
    from tandem.recipe.yaml_lines import dump_yaml

    run = job.run.model_dump(mode="json", exclude={"name", "description"})
    if half:
        run["dtype"] = "bfloat16, but float32 on a CPU or MPS"
    return dump_yaml({**run, "settings": job.settings.model_dump(mode="json")})


def _in_half(job: TrainingJob, console: Console) -> TrainingJob:
    """Choose bfloat16 if the device gains from it, else float32, and say so."""
    from tandem.integrations.choose import device_names

    dtype = device_names(job.run).dtype_name  # that of its settings is auto
    if dtype == "float32":
        console.print(
            "--bf16: training in float32, because bfloat16 is slower than float32 on most CPUs "
            "and not on every MPS (--dtype bfloat16 insists)",
            markup=False,
            soft_wrap=True,
        )
    return replace(job, run=job.run.model_copy(update={"dtype": dtype}))


def _merge_parser() -> Parser:
    parser = Parser(
        prog="tandem merge",
        usage="tandem merge --base-model-path B --lora-model-path L --output-path O [flags]",
        description="Merge a LoRA adapter into its base: added in float32, cast once, verified.",
    )
    required: dict[str, Any] = {"required": True, "metavar": "PATH", "type": path}
    parser.add_argument("--base-model-path", help="The model's folder or Hub id.", **required)
    parser.add_argument("--lora-model-path", help="The adapter's folder.", **required)
    parser.add_argument("--output-path", help="The folder for the merged model.", **required)
    add_flag(parser, flag_of(MergeSettings, "dtype"), default="auto")
    parser.add_argument(
        "--force", action="store_true", help="Merge even into other weights than the adapter's own."
    )
    own = "A shipped one or a file; by default the one in the adapter's folder."
    add_flag(parser, flag_of(RunSettings, "chat_template", help=own))
    where = flag_of(RunSettings, "device", help="The device that the check computes on.")
    add_flag(parser, where, default="auto")
    return parser
