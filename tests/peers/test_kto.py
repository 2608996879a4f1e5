"""KTO against TRL's KTOTrainer on real answers: the estimate of the divergence, loss, gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tandem.data.batching import views
from tandem.data.build_dataset import build_dataset
from tandem.data.encoded.dataset import EncodedDataset
from tandem.data.encoded.encode_chunk import EncodingOptions
from tandem.data.ledger import Ledger
from tandem.data.tokenize.chat_template import resolve_template
from tandem.data.tokenize.encode import ChatTokenizer
from tandem.data.truncation.limits import Limits
from tandem.model.lora.adapter import LoraWeights
from tandem.recipe.data_source import DataSource
from tandem.recipe.dpo_settings import DpoSettings
from tandem.recipe.training_settings import LoraSettings
from tandem.train.objectives.answers import Answers
from tandem.train.objectives.labelled import LabelledObjective
from tandem.train.objectives.mixture import Mixture

from . import ours, plain

BETA = 0.2


@pytest.fixture(scope="module")
def rows(pairs: list[plain.Pair]) -> list[dict[str, Any]]:
    """One answer of each pair: good ones and bad ones in turn, and two good ones at the end."""
    good = [number % 2 == 0 for number in range(len(pairs) - 1)] + [True]
    return [
        {"prompt": p.prompt, "completion": p.chosen if is_good else p.rejected, "label": is_good}
        for p, is_good in zip(pairs, good, strict=True)
    ]


def dataset_of(path: Path, tokenizer: Any) -> EncodedDataset:
    chat = ChatTokenizer.of(tokenizer, resolve_template(tokenizer, "neural-chat"))
    options = EncodingOptions("labelled answers", Limits(plain.CONTEXT, None), "stop")
    return build_dataset([DataSource(path=str(path))], chat, options, Ledger(None))


def turn_adapter(model: Any) -> None:
    """Move the adapter a little, to where answers to other prompts are likelier."""
    plain.move_adapter(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(-0.05)


@pytest.mark.parametrize("loss", ["kto", "apo_zero_unpaired"])
def test_loss_and_gradients_equal_trls(
    loss: str,
    rows: list[dict[str, Any]],
    stories_path: Path,
    chat_tokenizer: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import datasets
    from trl import KTOConfig, KTOTrainer

    datasets.disable_progress_bars()
    weights = {"desirable_weight": 0.8, "undesirable_weight": 1.3}
    trainer: Any = KTOTrainer(
        model=plain.load(stories_path),
        args=KTOConfig(
            output_dir=str(tmp_path / "trl"), use_cpu=True, bf16=False, report_to="none",
            disable_tqdm=True, activation_checkpointing=False, max_length=plain.CONTEXT, beta=BETA,
            per_device_train_batch_size=len(rows), loss_type=loss, **weights,
        ),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=chat_tokenizer,
        peft_config=plain.lora_config(),
    )  # fmt: skip
    turn_adapter(trainer.model)
    trainer.model.train()
    expected = trainer.compute_loss(
        trainer.model, trainer.data_collator(list(trainer.train_dataset))
    )
    expected.backward()

    # TRL takes the answer of the record before in a batch.
    before = (np.arange(len(rows)) - 1) % len(rows)
    monkeypatch.setattr(views, "_partners", lambda _: before)
    dataset = dataset_of(plain.write_rows(tmp_path / "rows.jsonl", rows), chat_tokenizer)
    other = views.with_other_answers(dataset, plain.CONTEXT)
    model = ours.adapted(stories_path, torch.float32, "segments")
    turn_adapter(model)
    engine = ours.engine_of(model)
    with LoraWeights(LoraSettings()).reference(model):
        references = [ours.scores(engine, some).flatten().numpy() for some in (dataset, other)]
    first, scores = np.arange(len(rows) + 1), dataset.scores
    answers, mismatched = (
        Answers(first, dataset.sequence_targets, scores, reference) for reference in references
    )
    mixture = Mixture.of(DpoSettings(loss=loss, beta=BETA, **weights))
    objective = LabelledObjective(mixture, answers, mismatched, 0.0)
    metrics = ours.accumulate(engine, list(dataset), objective, observed=list(other))
    assert metrics["loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert plain.distance(plain.gradients(model), plain.gradients(trainer.model)) <= 1e-5
    for name in ("rewards/chosen", "rewards/rejected"):
        assert metrics[name] == pytest.approx(trainer._metrics["train"][name][0], abs=1e-4)
    if loss == "kto":
        divergence = trainer._metrics["train"]["kl"][0]
        assert metrics["divergence/kto"] == pytest.approx(divergence, abs=1e-4)
        assert divergence > 0, "an estimate of 0 compares nothing"


def test_partners_have_other_prompts() -> None:
    prompts = np.array([7, 7, 8, 9, 9, 7], dtype=np.uint64)
    assert views._partners(prompts).tolist() == [2, 2, 3, 5, 5, 2]
    assert views._partners(np.array([7, 7], dtype=np.uint64)).tolist() == [1, 0]
