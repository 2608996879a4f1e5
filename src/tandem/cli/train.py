"""`tandem sft`, `tandem dpo` and `tandem merge`: one stage each, under the seed's flags."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tandem.cli.environment import prepare_devices
from tandem.cli.nproc import add_nproc, in_processes
from tandem.cli.parser import Parser, add_flag, output_folder, path
from tandem.integrations.gaudi.bridge import bridge_installed
from tandem.recipe.flags import DEVICES, DTYPES, Stage, flags_of
from tandem.runtime.launch import launched

if TYPE_CHECKING:
    from rich.console import Console

    from tandem.recipe.tutorial_flags import StageCall


def sft(argv: list[str]) -> int:
    """Supervised fine-tuning of a LoRA adapter."""
    return _train("sft", argv)


def dpo(argv: list[str]) -> int:
    """Direct Preference Optimization of a LoRA adapter."""
    return _train("dpo", argv)


def merge(argv: list[str]) -> int:
    """Merge an adapter into its base model."""
    arguments = _merge_parser().parse(argv)
    from tandem.runtime.console import notice_console
    from tandem.stages.merge import run_merge

    # The template comes with the adapter's folder, unless another one is asked for.
    template = {"chat_template": arguments.chat_template} if arguments.chat_template else {}
    run_merge(
        base=arguments.base_model_path,
        adapter=output_folder(Path(arguments.lora_model_path), "--lora-model-path"),
        output_dir=output_folder(Path(arguments.output_path), "--output-path"),
        dtype=arguments.dtype,
        force=arguments.force,
        device=arguments.device,
        console=notice_console(),
        **template,
    )
    return 0


def stage_parser(stage: Stage) -> Parser:
    """The parser of a training stage; flags that are left out do not appear in its result."""
    titles = {
        "sft": "Supervised fine-tuning: trains a LoRA adapter on the answers of conversations.",
        "dpo": "Direct Preference Optimization: trains a LoRA adapter to prefer chosen answers.",
    }
    parser = Parser(
        prog=f"tandem {stage}",
        usage=f"tandem {stage} --model_name_or_path M --dataset_name D --output_dir O [flags]",
        description=titles[stage],
        epilog="A flag that is left out has the value of the recipe neural-chat-7b-v3-1. Dashes "
        "and underscores\nare the same. The global batch is the per-device batch x accumulation x "
        "devices.",
        argument_default=argparse.SUPPRESS,
    )
    for flag in flags_of(stage):
        add_flag(parser, flag)
    parser.add_argument(
        "--dry_run", action="store_true", help="print the resolved settings and stop"
    )
    add_nproc(parser)
    return parser


def _train(stage: Stage, argv: list[str]) -> int:
    """Run a stage, in this process or with --nproc in others, or print what it would be."""
    values = vars(stage_parser(stage).parse(argv))
    dry_run, nproc = values.pop("dry_run", False), values.pop("nproc", None)
    from tandem.recipe.training_settings import SftSettings
    from tandem.recipe.tutorial_flags import stage_call

    devices = nproc or launched().count
    call = stage_call(stage, values, devices=devices, gaudi=bridge_installed())
    if nproc is not None and not dry_run:
        return in_processes(nproc, stage, argv, device=call.device)
    from tandem.runtime.console import notice_console

    console = notice_console()
    for notice in (*prepare_devices(call), *call.notices):
        console.print(notice, markup=False, soft_wrap=True)
    if dry_run:
        if launched().speaks:
            print(_call_text(call), end="")
        return 0
    if isinstance(call.settings, SftSettings):
        from tandem.stages.sft import run_sft

        run_sft(settings=call.settings, **_common(call))
    else:
        from tandem.stages.dpo import run_dpo

        run_dpo(settings=call.settings, **_common(call))
    from tandem.runtime.process_group import leave

    leave()
    return 0


def _call_text(call: StageCall) -> str:
    from tandem.recipe.yaml_lines import dump_yaml

    return dump_yaml(
        {
            "model": call.model,
            "model_revision": call.revision,
            "output_dir": str(call.output_dir),
            "chat_template": call.chat_template,
            "added_tokens": list(call.added_tokens),
            "seed": call.seed,
            "device": call.device,
            "dtype": "bfloat16, but float32 on a CPU or MPS" if call.bf16 else call.dtype,
            "attention": call.attention,
            "tokens_per_microbatch": call.tokens_per_microbatch,
            "engine": call.engine,
            "timeout_minutes": call.timeout_minutes,
            "quantization": call.quantization,
            "compile": call.compile,
            "hpu": call.hpu.model_dump(mode="json"),
            "settings": call.settings.model_dump(mode="json"),
        }
    )


def _common(call: StageCall) -> dict[str, Any]:
    """What both stages' functions take besides their settings."""
    from tandem.recipe.run_settings import runtime_of
    from tandem.runtime.console import notice_console

    console = notice_console()
    return {
        "model": call.model,
        "revision": call.revision,
        "output_dir": output_folder(call.output_dir, "--output_dir"),
        "chat_template": call.chat_template,
        "added_tokens": call.added_tokens,
        "seed": call.seed,
        "runtime": runtime_of(call, dtype=_dtype(call, console)),
        "console": console,
    }


def _dtype(call: StageCall, console: Console) -> str:
    """The dtype of the weights; --bf16 means bfloat16 where there is hardware for it."""
    if not call.bf16 or call.dtype != "auto":
        return call.dtype
    from tandem.integrations.choose import choose_device

    if choose_device(call.device, "auto").autocast is not None:
        return "bfloat16"
    console.print(
        "--bf16: training in float32, because bfloat16 is slower than float32 on most CPUs and "
        "not on every MPS (--dtype bfloat16 insists)",
        markup=False,
        soft_wrap=True,
    )
    return "float32"


def _merge_parser() -> Parser:
    parser = Parser(
        prog="tandem merge",
        usage="tandem merge --base-model-path B --lora-model-path L --output-path O [flags]",
        description="Merge a LoRA adapter into its base: added in float32, cast once, verified.",
    )
    required: dict[str, Any] = {"required": True, "metavar": "PATH", "type": path}
    parser.add_argument("--base-model-path", help="model folder or Hub id", **required)
    parser.add_argument("--lora-model-path", help="adapter folder", **required)
    parser.add_argument("--output-path", help="folder for the merged model", **required)
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="auto",
        help="of the merged weights; auto: the base's own",
    )
    parser.add_argument(
        "--force", action="store_true", help="merge even into other weights than the adapter's own"
    )
    parser.add_argument(
        "--chat_template",
        type=path,
        metavar="NAME|FILE",
        help="default: the one in the adapter's folder",
    )
    parser.add_argument(
        "--device",
        choices=DEVICES,
        default="auto",
        help="where the check computes",
    )
    return parser
