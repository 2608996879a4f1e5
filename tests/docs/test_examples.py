"""The tutorial's three commands, letter for letter, in the folder of examples."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tandem.storage.atomic_files import read_json

from ..stages.made_inputs import make_conversations, make_model_folder, make_pairs
from ..train.meeting import free_port
from ..warm.python import python
from .pages import ROOT

EXAMPLES = ROOT / "examples"
PLACE = Path("finetuning") / "finetune_neuralchat_v3"
DPO = (
    'python ../dpo_pipeline/dpo_clm.py --model_name_or_path "./finetuned_model_lora" '
    '--output_dir "./finetuned_model_lora_plus_dpo" --per_device_train_batch_size 8 '
    "--gradient_accumulation_steps 8 --learning_rate 5e-4 --max_steps 1000 --save_steps 10 "
    "--logging_steps 10 --lora_alpha 16 --lora_rank 16 --lora_dropout 0.05 "
    "--dataset_name Intel/orca_dpo_pairs --bf16 --max_length 1536 --max_prompt_length 1024 "
    '--lr_scheduler_type "cosine" --warmup_steps 100 --use_habana --use_lazy_mode --pad_max true '
    "--gradient_checkpointing true --lora_all_linear false "
    "--lora_target_modules 'k_proj' 'q_proj' 'v_proj'"
)
MERGE = (
    "python apply_lora.py --base-model-path mistralai/Mistral-7B-v0.1 "
    "--lora-model-path finetuned_model/ --output-path finetuned_model_lora"
)
SFT = "deepspeed --include localhost:{} --master_port {} finetune_neuralchat_v3.py"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the examples, with folders under the Hub's names."""
    home = tmp_path_factory.mktemp("examples")
    shutil.copytree(EXAMPLES, home, dirs_exist_ok=True)
    place = home / PLACE
    model = make_model_folder(place / "mistralai" / "Mistral-7B-v0.1")
    config = read_json(model / "config.json") | {"max_position_embeddings": 4096}
    (model / "config.json").write_text(json.dumps(config))
    for name in ("Open-Orca/SlimOrca", "Intel/orca_dpo_pairs"):
        (place / name).mkdir(parents=True)
    make_conversations(place / "Open-Orca" / "SlimOrca" / "train.jsonl", 16)
    make_pairs(place / "Intel" / "orca_dpo_pairs" / "train.jsonl", 6)
    return place


def _run(command: str, place: Path, **changes: str) -> tuple[int, str]:
    """Run a line in a shell whose `python`, and the Python of `deepspeed`, start at once."""
    bin_folder = place / "bin"
    if not bin_folder.exists():
        bin_folder.mkdir()
        (bin_folder / "python").symlink_to(python())
        launcher = Path(sys.executable).with_name("deepspeed")
        (bin_folder / "deepspeed").write_text(f'#!/bin/sh\nexec {python()} {launcher} "$@"\n')
        (bin_folder / "deepspeed").chmod(0o700)
    environment = {name: v for name, v in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    environment |= {"PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    environment |= {"XDG_CACHE_HOME": str(place / "cache"), "DS_ACCELERATOR": "cpu", **changes}
    done = subprocess.run(
        command, shell=True, cwd=place, env=environment, capture_output=True, text=True, timeout=300
    )
    return done.returncode, done.stdout + done.stderr


def test_the_page_shows_the_tutorials_lines() -> None:
    page = (EXAMPLES / "README.md").read_text()
    for line in (DPO, MERGE, SFT.format("0,1,2,3,4,5,6,7", 29501), f"cd examples/{PLACE}"):
        assert f"\n{line}\n" in page


def test_without_a_gaudi_the_first_says_what_to_set(place: Path) -> None:
    code, said = _run("python finetune_neuralchat_v3.py", place)
    assert code == 1
    assert 'Set use_habana = False, use_lazy_mode = False and device = "auto" at the top' in said
    assert not (place / "finetuned_model").exists()


def test_the_three_commands_run_as_they_stand(place: Path) -> None:
    script = place / "finetune_neuralchat_v3.py"
    text = script.read_text()
    for line, instead in (
        ("use_habana = True", "use_habana = False"),
        ("use_lazy_mode = True", "use_lazy_mode = False"),
        ('device = "hpu"', 'device = "auto"'),
    ):
        assert text.count(f"\n{line}\n") == 1
        text = text.replace(f"\n{line}\n", f"\n{instead}\n")
    script.write_text(text)
    code, said = _run(SFT.format("0,1", free_port()), place, LOCAL_SIZE="2")
    assert code == 0, said
    assert "2 processes on cpu (deepspeed-zero2)" in said
    summary = read_json(place / "finetuned_model" / "summary.json")
    assert (summary["processes"], summary["steps"]) == (2, 2)  # 16 records, 16 a step, two epochs
    code, said = _run(MERGE, place)
    assert code == 0, said
    # A thousand steps are the tutorial's; a few show the same.
    code, said = _run(DPO.replace("--max_steps 1000", "--max_steps 2"), place)
    assert code == 0, said
    assert "--use_habana does nothing here" in said
    assert (
        shlex.split(DPO)[-1]
        in read_json(place / "finetuned_model_lora_plus_dpo" / "adapter_config.json")[
            "target_modules"
        ]
    )
