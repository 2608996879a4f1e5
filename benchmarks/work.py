"""What a benchmark does: the model, the records and the settings that every side is given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, MistralConfig

from tandem.data.batching.sampler import StepSampler
from tandem.data.build_dataset import build_dataset
from tandem.data.encoded.encode_chunk import EncodingOptions
from tandem.data.encoded.example import Example
from tandem.data.formats.format import Kind
from tandem.data.ledger import Ledger
from tandem.data.tokenize.chat_template import resolve_template
from tandem.data.tokenize.encode import ChatTokenizer
from tandem.data.truncation.limits import Limits
from tandem.recipe.data_source import DataSource

Stage = Literal["dpo", "sft"]
TEMPLATE = "neural-chat"
SEED = 1
# Longer than any record used, so that nothing is cut and all sides see the same tokens.
MAX_LENGTH = 4096
LEARNING_RATE = 5e-5
BETA = 0.1
# In the comparison of first steps, so that swapped answers are noticed.
CHOSEN_WEIGHT = 2.0
# Records of TRL's default step: per_device_train_batch_size 8, no accumulation, one device.
PADDED = 8


@dataclass(frozen=True)
class Adapter:
    """LoRA without dropout, so that all sides compute the same function."""

    rank: int
    alpha: int
    targets: tuple[str, ...]


# Those of the neural-chat-7b-v3-1 recipe.
ADAPTERS: dict[Stage, Adapter] = {
    "sft": Adapter(16, 64, ("q_proj", "k_proj", "v_proj", "o_proj")),
    "dpo": Adapter(16, 16, ("q_proj", "k_proj", "v_proj")),
}


@dataclass(frozen=True)
class Work:
    """One measurement: a side does a stage once over the records.

    Attributes:
        side: tandem, tandem-rows (a record has all answers to a prompt), tandem-again (its
            reference store is warm), tandem-nf4 (the base in 4 bits), tandem-compiled,
            plain, trl, trl-default, trl-packed, trl-liger or unsloth.
        stage: dpo or sft.
        model: folder of the model and its tokenizer.
        data: JSON lines.
        scratch: a folder for outputs, new for each measurement.
        batch_size: records of an optimizer step (TRL's default has its own).
        threads: torch's threads.
        size: records of a forward (one at a time is unpadded in the plain loop); trl-packed:
            tokens of a packed row.
        records: only the first so many in the order of training; 0 is all.
        device: cpu (float32) or cuda (bfloat16).
    """

    side: str
    stage: Stage
    model: str
    data: str
    scratch: str
    batch_size: int
    threads: int
    size: int = 0
    records: int = 0
    device: str = "cpu"

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for a command line."""
        return asdict(self)

    @property
    def name(self) -> str:
        """How tables call the side."""
        unit = "pair" if self.stage == "dpo" else "conversation"
        batch = "1 at a time" if self.size == 1 else f"{self.size} {unit}s padded"
        return {
            "tandem": "tandem",
            "tandem-rows": "tandem, whole rows",
            "tandem-again": "tandem, second run",
            "tandem-nf4": "tandem, base in 4 bits",
            "tandem-compiled": "tandem, compiled",
            "plain": f"plain loop, {batch}",
            "trl": f"TRL, {batch}",
            "trl-default": "TRL, its defaults",
            "trl-packed": f"TRL, packed to {self.size} tokens",
            "trl-liger": f"TRL with Liger, {batch}",
            "unsloth": f"Unsloth, {batch}",
        }[self.side]

    @property
    def dtype(self) -> torch.dtype:
        """Of the frozen weights, as tandem's `auto` has it; adapters are float32."""
        return torch.bfloat16 if self.device == "cuda" else torch.float32


@dataclass(frozen=True)
class Ran:
    """What a side says of its run.

    Attributes:
        loop_seconds: all optimizer steps.
        reference_seconds: DPO's reference log-probs, computed before the loop; otherwise 0.
        first_records: records of the first step; 0 when it held other records than tandem's, or
            the base's weights were others.
        first_loss: the loss that the first step minimised.
        first_logp: log-probability per trained token of the first step's records, before it;
            chosen answers weigh CHOSEN_WEIGHT.
        logps: first_logp of the first 1, 2, ... records, from the side that the others are
            checked against.
        live_reference: the loop computes the reference as it goes.
        bfloat16: products are not in float32.
    """

    loop_seconds: float
    reference_seconds: float
    first_records: int
    first_loss: float
    first_logp: float
    logps: tuple[float, ...] = ()
    live_reference: bool = False
    bfloat16: bool = False


@dataclass(frozen=True)
class Measured(Ran):
    """What one measurement found; seconds exclude imports, loading and tokenising.

    Attributes:
        records: pairs or conversations.
        tokens: of all their sequences, prompts counted for each answer.
        peak_bytes: most memory held: by the process, the interpreter and libraries included; on
            CUDA by torch on the device.
    """

    records: int = 0
    tokens: int = 0
    peak_bytes: int = 0

    @property
    def seconds(self) -> float:
        """Loop and reference pass."""
        return self.loop_seconds + self.reference_seconds


def shape(size: int) -> dict[str, int]:
    """Mistral's proportions at about `size` million parameters with 32000 tokens."""
    hidden, layers, heads, key_value_heads = {
        1: (16, 2, 2, 1),
        10: (128, 8, 4, 2),
        60: (512, 8, 8, 4),
        150: (768, 12, 12, 4),
        7000: (4096, 32, 32, 8),
    }[size]
    return {
        "hidden_size": hidden,
        "intermediate_size": hidden * 7 // 2,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
    }


def write_model(
    size: int,
    tokenizer_folder: Path,
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> None:
    """A Mistral with random weights, drawn on `device`, and the tokenizer, as a model folder."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder, local_files_only=True)
    torch.manual_seed(SEED)
    config = MistralConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=MAX_LENGTH,
        # Peers would build masks for a window that no record reaches.
        sliding_window=None,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **shape(size),
    )
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.save_pretrained(folder)
    resolve_template(tokenizer, TEMPLATE)
    # Last: a folder without it was not written whole.
    tokenizer.save_pretrained(folder)


def write_first_lines(source: Path, count: int, target: Path) -> None:
    """The first `count` records of a JSON lines file."""
    with source.open(encoding="utf-8") as lines:
        chosen = list(islice(lines, count))
    if len(chosen) < count:
        raise SystemExit(f"{source} has only {len(chosen)} records, {count} were asked for")
    target.write_text("".join(chosen), encoding="utf-8")


def source_of(work: Work) -> DataSource:
    """The records, and what is made of several answers."""
    return DataSource(
        path=work.data, completions="all_pairs" if work.side == "tandem-rows" else None
    )


def read_trees(stage: Stage, model: Path, source: DataSource) -> list[Example]:
    """The records as tandem encodes them; the peers are fed the same token ids."""
    tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
    chat = ChatTokenizer.of(tokenizer, resolve_template(tokenizer, TEMPLATE))
    kind: Kind = "preference pairs" if stage == "dpo" else "conversations"
    options = EncodingOptions(kind, Limits(MAX_LENGTH, None), "stop")
    ledger = Ledger(None)
    trees = build_dataset([source], chat, options, ledger)
    counts = ledger.summary()
    if counts["truncated"] or counts["dropped"]:
        raise SystemExit(f"records do not fit whole: {counts['reasons']}; use fewer")
    return list(trees)


def sequence_tokens(trees: Sequence[Example]) -> int:
    """Tokens of all sequences, nothing shared."""
    return sum(len(t.sequence(b).input_ids) for t in trees for b in range(len(t.branches)))


def in_training_order(trees: Sequence[Example], work: Work) -> list[Example]:
    """The records as tandem's steps take them, which is how the peers are given them."""
    sampler = StepSampler(len(trees), work.batch_size, SEED)
    epoch = sampler.steps(0, sampler.steps_per_epoch())
    order = [i for step in epoch for i in step.examples]
    return [trees[i] for i in order[: work.records or len(order)]]


def trained_tokens(trees: Sequence[Example]) -> int:
    """Trained tokens of all sequences."""
    return sum(int(t.sequence(b).trained.sum()) for t in trees for b in range(len(t.branches)))
