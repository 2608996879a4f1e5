"""A tiny model folder and small data files on disk, for stages to run on in seconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

QUIET = Console(quiet=True)
WORDS = ["red", "green", "blue", "one", "two", "three", "sun", "moon", "star", "sea"]


def make_model_folder(
    folder: Path, *, dtype: torch.dtype = torch.float32, config: Any | None = None
) -> Path:
    """A random Llama of two layers with a word tokenizer, its vocabulary's size not round.

    Another configuration, whose vocabulary size is set here, gives another model.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(WORDS)] * 10, trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>"
    ).save_pretrained(str(folder))
    torch.manual_seed(0)
    config = config or LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=1,
    )
    config.get_text_config().vocab_size = tokenizer.get_vocab_size()
    AutoModelForCausalLM.from_config(config).to(dtype).save_pretrained(str(folder))
    return folder


def make_conversations(path: Path, count: int = 24) -> Path:
    """Short SlimOrca records, one of them with two exchanges."""
    with path.open("w") as file:
        for i in range(count):
            turns = [
                {"from": "human", "value": f"say {WORDS[i % 10]}"},
                {"from": "gpt", "value": " ".join(WORDS[: 1 + i % 7])},
            ] * (2 if i == 3 else 1)
            file.write(json.dumps({"conversations": turns}) + "\n")
    return path


def make_pairs(path: Path, count: int = 24) -> Path:
    """Short orca_dpo_pairs records; chosen counts up, rejected is one word."""
    with path.open("w") as file:
        for i in range(count):
            row = {
                "system": "",
                "question": f"say {WORDS[i % 10]} {i}",
                "chosen": " ".join(WORDS[: 2 + i % 5]),
                "rejected": WORDS[(i * 3) % 10],
            }
            file.write(json.dumps(row) + "\n")
    return path
