"""Adapters that change what a model says."""

from __future__ import annotations

from pathlib import Path

import torch

from tandem.data.tokenize.chat_template import resolve_template
from tandem.model.load_model import load_model
from tandem.model.model_folder import load_tokenizer


def make_adapter(base: Path, folder: Path, scale: float = 0.3) -> Path:
    """An adapter whose B is not zero, with its tokenizer and a chat template."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    torch.manual_seed(0)
    model = get_peft_model(load_model(base, dtype=torch.float32), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=scale)
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(str(folder))
    tokenizer = load_tokenizer(base)
    resolve_template(tokenizer, "zephyr")
    tokenizer.save_pretrained(str(folder))
    return folder
