"""What a benchmark does: the model, the records and the settings that every side is given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, MistralConfig

from tandem.data.ledger import Ledger
from tandem.data.prepare import prepare_conversations, prepare_pairs
from tandem.data.records import Tree
from tandem.data.sources import SourceSpec
from tandem.data.template import resolve_template

Stage = Literal["dpo", "sft"]
TEMPLATE = "neural-chat"
SEED = 1
# Longer than any record used, so that nothing is cut and all sides see the same tokens.
MAX_LENGTH = 4096
# The recipe's DPO adapter: rank 16 on the attention's projections.
TARGETS = ("q_proj", "k_proj", "v_proj")
RANK, ALPHA = 16, 16
LEARNING_RATE = 5e-5
BETA = 0.1


@dataclass(frozen=True)
class Work:
    """One measurement: a side does a stage once over all records.

    Attributes:
        side: tandem, plain, trl or trl-packed.
        stage: dpo or sft.
        model: folder of the model and its tokenizer.
        data: JSON lines.
        scratch: a folder for outputs, new for each measurement.
        batch_size: records of an optimizer step.
        threads: torch's threads.
        size: trl: sequences or pairs of a forward; trl-packed: tokens of a packed row.
    """

    side: str
    stage: Stage
    model: str
    data: str
    scratch: str
    batch_size: int
    threads: int
    size: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for a command line."""
        return asdict(self)

    @property
    def name(self) -> str:
        """How tables call the side."""
        if self.side == "trl-packed":
            return f"TRL, packed to {self.size} tokens"
        if self.side == "trl":
            unit = "pair" if self.stage == "dpo" else "sequence"
            return f"TRL, {self.size} {unit}{'s' if self.size > 1 else ''} at a time"
        return "plain loop" if self.side == "plain" else self.side


@dataclass(frozen=True)
class Measured:
    """What one measurement found; seconds exclude imports, loading and tokenising.

    Attributes:
        loop_seconds: all optimizer steps.
        reference_seconds: DPO's reference log-probs, computed before the loop; otherwise 0.
        records: pairs or conversations.
        tokens: of all their sequences, prompts counted for each answer.
        peak_bytes: most memory the process held, the interpreter and libraries included.
    """

    loop_seconds: float
    reference_seconds: float
    records: int
    tokens: int
    peak_bytes: int


def shape(size: int) -> dict[str, int]:
    """Mistral's proportions at about `size` million parameters with 32000 tokens."""
    hidden, layers, heads, key_value_heads = {
        1: (16, 2, 2, 1),
        10: (128, 8, 4, 2),
        60: (512, 8, 8, 4),
        150: (768, 12, 12, 4),
    }[size]
    return {
        "hidden_size": hidden,
        "intermediate_size": hidden * 7 // 2,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
    }


def write_model(size: int, tokenizer_folder: Path, folder: Path) -> None:
    """A Mistral with random float32 weights, and the tokenizer, as a model folder."""
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
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    resolve_template(tokenizer, TEMPLATE)
    tokenizer.save_pretrained(folder)


def write_first_lines(source: Path, count: int, target: Path) -> None:
    """The first `count` records of a JSON lines file."""
    with source.open(encoding="utf-8") as lines:
        chosen = list(islice(lines, count))
    if len(chosen) < count:
        raise SystemExit(f"{source} has only {len(chosen)} records, {count} were asked for")
    target.write_text("".join(chosen), encoding="utf-8")


def read_trees(stage: Stage, model: Path, data: Path) -> list[Tree]:
    """The records as tandem encodes them; the peers are fed the same token ids."""
    tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
    prepare = prepare_pairs if stage == "dpo" else prepare_conversations
    ledger = Ledger(None)
    trees = prepare(
        [SourceSpec(str(data))],
        tokenizer=tokenizer,
        template=resolve_template(tokenizer, TEMPLATE),
        max_length=MAX_LENGTH,
        ledger=ledger,
    )
    counts = ledger.summary()
    if counts["truncated"] or counts["dropped"]:
        raise SystemExit(f"records do not fit whole: {counts['reasons']}; use fewer")
    return list(trees)


def sequence_tokens(trees: Sequence[Tree]) -> int:
    """Tokens of all sequences, nothing shared."""
    return sum(len(t.sequence(b).input_ids) for t in trees for b in range(len(t.branches)))
