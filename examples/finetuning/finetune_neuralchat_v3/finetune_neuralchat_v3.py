"""Supervised fine-tuning of neural-chat-7b-v3-1, with the settings that the tutorial states.

Set the three lines below as the tutorial says: on NVIDIA cards, and on a CPU, to False, False and
"auto". `tandem sft --help` lists every other setting, and `--dry-run` behind the script's name
shows the values that are taken.
"""

import sys

from tandem.cli.main import entry_point
from tandem.integrations.choose import has_bridge

use_habana = True
use_lazy_mode = True
device = "hpu"

SETTINGS = [
    "--model_name_or_path", "mistralai/Mistral-7B-v0.1",
    "--dataset_name", "Open-Orca/SlimOrca",
    "--output_dir", "finetuned_model",
    "--engine", "deepspeed-zero2",
    "--max_length", "2560", "--max_prompt_length", "1024",
    "--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "8",
    "--num_train_epochs", "2", "--learning_rate", "1e-4", "--warmup_ratio", "0.03",
    "--save_steps", "1000", "--save_total_limit", "10", "--logging_steps", "10",
    "--lora_rank", "16", "--lora_alpha", "64", "--lora_dropout", "0.05",
    "--lora_target_modules", "q_proj", "k_proj", "v_proj", "o_proj",
    "--bf16",
]  # fmt: skip

if __name__ == "__main__":
    if use_habana and not has_bridge():
        sys.exit(
            "This machine has no Gaudi card (Habana's bridge is not installed). Set use_habana = "
            f'False, use_lazy_mode = False and device = "auto" at the top of {__file__}.'
        )
    on_gaudi = ["--use_habana", str(use_habana), "--use_lazy_mode", str(use_lazy_mode)]
    # What deepspeed adds, and flags of your own, come behind.
    sys.argv[1:] = ["sft", *SETTINGS, *on_gaudi, "--device", device, *sys.argv[1:]]
    sys.exit(entry_point())
