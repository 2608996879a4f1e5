"""DPO against TRL's DPOTrainer and against a plain padded float64 oracle, on real pairs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor

from tandem.data.batching.sampler import StepSampler
from tandem.data.batching.views import with_length_weights
from tandem.data.encoded.example import Example
from tandem.model.lora.adapter import LoraWeights
from tandem.recipe.data_source import DataSource
from tandem.recipe.dpo_settings import DpoSettings
from tandem.recipe.training_settings import LoraSettings
from tandem.stages.dpo import run_dpo
from tandem.train.objectives.answers import Answers
from tandem.train.objectives.mixture import Mixture
from tandem.train.objectives.objective import sequence_tokens
from tandem.train.objectives.preference import PreferenceObjective
from tests.jobs import training_job

from ..data.built import prepare_pairs
from . import ours, plain

BETA = 0.1


@dataclass(frozen=True)
class Expected:
    """What a peer says of one step: [P, 2] log-probs, the loss and the adapter's gradients."""

    policy: Tensor
    reference: Tensor
    loss: float
    gradients: dict[str, Tensor]
    metrics: dict[str, float]


@pytest.fixture(scope="module")
def trl(
    stories_path: Path,
    pairs: list[plain.Pair],
    chat_tokenizer: Any,
    tmp_path_factory: pytest.TempPathFactory,
) -> Any:
    """TRL's trainer on the same model and pairs, given as messages, with the moved adapter."""
    import datasets
    from trl import DPOConfig, DPOTrainer

    datasets.disable_progress_bars()
    rows = [{"prompt": p.prompt, "chosen": p.chosen, "rejected": p.rejected} for p in pairs]
    trainer = DPOTrainer(
        model=plain.load(stories_path),
        args=DPOConfig(
            output_dir=str(tmp_path_factory.mktemp("trl")),
            use_cpu=True,
            bf16=False,
            report_to="none",
            disable_tqdm=True,
            activation_checkpointing=False,
            max_length=plain.CONTEXT,
            beta=BETA,
            per_device_train_batch_size=len(pairs),
        ),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=chat_tokenizer,
        peft_config=plain.lora_config(),
    )
    plain.move_adapter(trainer.model)
    return trainer


@pytest.fixture(scope="module")
def oracle(stories_path: Path, pairs: list[plain.Pair]) -> Expected:
    """The plain model in float64."""
    with pytest.MonkeyPatch.context() as patch:
        plain.keep_float64(patch)
        model = plain.fresh_adapter(plain.load(stories_path, torch.float64), seed=1)
        plain.move_adapter(model)
        with plain.adapter_off(model):
            reference = plain.pair_logps(model, pairs)
        policy = plain.pair_logps(model, pairs)
        loss = plain.dpo_loss(policy, reference, BETA)
        loss.backward()
    return Expected(policy.detach(), reference, loss.item(), plain.gradients(model), {})


@pytest.fixture(scope="module")
def trees(pairs_file: Path, chat_tokenizer: Any) -> list[Example]:
    """The same pairs through tandem's data path."""
    return ours.trees_of(prepare_pairs, pairs_file, chat_tokenizer)


def test_token_ids_equal_trls(trl: Any, pairs: list[plain.Pair], trees: list[Example]) -> None:
    assert any(tree.prefix.trained.any() for tree in trees), "no pair shares an answer's start"
    for row, pair, tree in zip(trl.train_dataset, pairs, trees, strict=True):
        assert row["prompt_ids"] == pair.prompt_ids
        for branch, key in enumerate(("chosen_ids", "rejected_ids")):
            sequence = tree.sequence(branch)
            assert sequence.input_ids.tolist() == row["prompt_ids"] + row[key]
            trained = [False] * len(row["prompt_ids"]) + [True] * len(row[key])
            assert sequence.trained.tolist() == trained


def test_rows_that_trl_made_are_the_same_examples(
    trl: Any, trees: list[Example], chat_tokenizer: Any, tmp_path: Path
) -> None:
    """Its columns beside them are those of the pairs; what its collator feeds is what is fed."""
    keys = ("prompt_ids", "chosen_ids", "rejected_ids")
    rows = [{key: row[key] for key in keys} for row in trl.train_dataset]
    file = plain.write_rows(tmp_path / "rows.jsonl", rows)
    found = ours.trees_of(prepare_pairs, file, chat_tokenizer)
    fed = trl.data_collator(rows)
    for number, (tree, expected) in enumerate(zip(found, trees, strict=True)):
        for branch in (0, 1):
            sequence, other = tree.sequence(branch), expected.sequence(branch)
            assert sequence.input_ids.tolist() == other.input_ids.tolist()
            assert sequence.trained.tolist() == other.trained.tolist()
            place = number + branch * len(rows)
            seen = fed["attention_mask"][place].bool()
            assert fed["input_ids"][place][seen].tolist() == sequence.input_ids.tolist()
        assert len(tree.prefix.input_ids) == len(expected.prefix.input_ids)


def test_loss_logps_and_gradients_equal_trls(
    trl: Any, trees: list[Example], oracle: Expected, stories_path: Path
) -> None:
    found = _ours(stories_path, trees, torch.float32, "segments")
    expected = _trls(trl)
    assert (found.policy - found.reference).abs().min() > 1e-2, "the adapter does nothing"
    close = {"rtol": 1e-5, "atol": 0.0, "check_dtype": False}
    torch.testing.assert_close(found.policy, expected.policy, **close)
    torch.testing.assert_close(found.reference, expected.reference, **close)
    assert found.loss == pytest.approx(expected.loss, rel=1e-5)
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"):
        assert found.metrics[name] == pytest.approx(expected.metrics[name], rel=1e-4), name
    assert plain.distance(found.gradients, expected.gradients) <= 1e-5
    # A single tensor may be further from TRL's than ours is from the truth.
    truth = {name: gradient.float() for name, gradient in oracle.gradients.items()}
    plain.assert_close_tensors(found.gradients, truth, 2e-5)
    plain.assert_close_tensors(expected.gradients, truth, 2e-5)


@pytest.mark.parametrize("backend", ["segments", "dense"])
def test_loss_logps_and_gradients_equal_a_padded_float64_oracle(
    backend: str,
    oracle: Expected,
    trees: list[Example],
    stories_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain.keep_float64(monkeypatch)
    found = _ours(stories_path, trees, torch.float64, backend)
    assert found.policy.dtype == torch.float64
    torch.testing.assert_close(found.reference, oracle.reference, rtol=1e-9, atol=0.0)
    torch.testing.assert_close(found.policy, oracle.policy, rtol=1e-9, atol=0.0)
    assert found.loss == pytest.approx(oracle.loss, rel=1e-9)
    plain.assert_close_tensors(found.gradients, oracle.gradients, 1e-9)


# Settings of tandem, and of TRL's trainer where its names differ.
LOSSES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "sigmoid_norm": ({"beta": 2.0}, {}),
    "robust": ({"label_smoothing": 0.1}, {}),
    "hinge": ({}, {}),
    "ipo": ({}, {}),
    "exo_pair": ({"label_smoothing": 0.1}, {}),
    "nca_pair": ({}, {}),
    "bco_pair": ({}, {}),
    "sppo_hard": ({"beta": 0.5}, {}),
    "aot": ({"label_smoothing": 0.1}, {}),
    "aot_unpaired": ({"label_smoothing": 0.1}, {}),
    "apo_zero": ({}, {}),
    "apo_down": ({}, {}),
    "discopop": ({}, {}),
    "sft": ({}, {}),
    "sigmoid": ({"ld_alpha": 0.3}, {}),
    "sigmoid, forward KL": ({"f_divergence_type": "forward_kl"}, {}),
    "sigmoid, JS": ({"f_divergence_type": "js_divergence"}, {}),
    "ipo, alpha": (
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.7},
        {},
    ),
    "mixed": (
        {"loss": {"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.0}},
        {"loss_types": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    ),
}


_FEW = 4  # pairs, for each of many losses


def test_every_loss_that_trl_has_equals_trls(
    trl: Any, trees: list[Example], stories_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loss and gradients of a step of several micro-batches, against TRL's of one batch."""
    trees, rows = trees[:_FEW], list(trl.train_dataset)[:_FEW]
    model = ours.adapted(stories_path, torch.float32, "segments")
    plain.move_adapter(model)
    engine = ours.engine_of(model)
    for case, (options, theirs) in LOSSES.items():
        beta = {} if case == "sft" else {"beta": BETA}
        settings = DpoSettings(**{"loss": case.partition(",")[0], **beta, **options})
        examples: Any = trees
        if settings.ld_alpha is not None:
            examples = list(with_length_weights(trees, settings.ld_alpha))
        with LoraWeights(LoraSettings()).reference(model):
            reference = ours.scores(engine, examples)
        metrics = ours.accumulate(engine, examples, _objective(trees, reference, settings))
        found = {name: gradient.clone() for name, gradient in plain.gradients(model).items()}
        engine.gradients.clear()  # type: ignore[attr-defined]
        given = {"loss_types": [case.partition(",")[0]], "loss_weights": [1.0], **theirs}
        given |= {key: value for key, value in options.items() if key != "loss"}
        with monkeypatch.context() as patch:
            for key, value in ({"beta": BETA, "ld_alpha": None} | given).items():
                patch.setattr(trl, key, value)
            trl.model.zero_grad()
            loss = trl.compute_loss(trl.model, trl.data_collator(rows))
            loss.backward()
        # These raise e to the ratios, and their rounding with it.
        close = 1e-3 if case in ("sigmoid, forward KL", "ipo, alpha") else 2e-5
        assert metrics["loss"] == pytest.approx(loss.item(), rel=close), case
        assert plain.distance(found, plain.gradients(trl.model)) <= close, case


def _objective(trees: list[Example], reference: Tensor, settings: DpoSettings) -> Any:
    tokens = np.array([count for tree in trees for count in sequence_tokens(tree)])
    mixture, scores = Mixture.of(settings), np.tile([1.0, 0.0], len(trees))
    first = np.arange(0, 2 * len(trees) + 1, 2)
    answers = Answers(first, tokens, scores, reference.flatten().numpy(), mixture.divergence)
    return PreferenceObjective(mixture, answers, relative_tolerance=0.0)


def _ours(
    folder: Path,
    trees: list[Example],
    dtype: torch.dtype,
    backend: str,
    settings: DpoSettings | None = None,
) -> Expected:
    settings = settings or DpoSettings(beta=BETA)
    model = ours.adapted(folder, dtype, backend)
    plain.move_adapter(model)
    engine = ours.engine_of(model)
    with LoraWeights(LoraSettings()).reference(model):
        reference = ours.scores(engine, trees)
    policy = ours.scores(engine, trees)
    metrics = ours.accumulate(engine, trees, _objective(trees, reference, settings))
    return Expected(policy, reference, metrics["loss"], plain.gradients(model), metrics)


def _trls(trl: Any) -> Expected:
    batch = trl.data_collator(list(trl.train_dataset))
    trl.model.train()
    loss = trl.compute_loss(trl.model, batch)
    loss.backward()
    metrics = {name: values[0] for name, values in trl._metrics["train"].items()}
    reference = torch.stack(trl.compute_ref_log_probs(trl.model, batch), dim=1)
    with torch.no_grad():
        policy = _trl_policy(trl, batch)
    return Expected(policy, reference, loss.item(), plain.gradients(trl.model), metrics)


def _trl_policy(trl: Any, batch: dict[str, Tensor]) -> Tensor:
    """[P, 2] from TRL's own forward; `compute_loss` keeps only their means."""
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    outputs = trl.model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        labels=labels,
        fused_lm_head=True,
    )
    return torch.stack(outputs.log_probs.sum(1).chunk(2), dim=1)


def test_a_short_run_equals_a_plain_loop(
    pairs: list[plain.Pair],
    pairs_file: Path,
    stories_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In float64; in float32 a step is compared with TRL's, and a run in test_sft.py."""
    plain.keep_float64(monkeypatch)
    settings = DpoSettings(
        data=(DataSource(path=str(pairs_file)),),
        batch_size=3,
        max_steps=3,
        learning_rate=plain.RATE,
        adam_epsilon=plain.EPSILON,
        beta=BETA,
        max_length=plain.CONTEXT,
        lora=LoraSettings(rank=plain.RANK, alpha=plain.ALPHA, target_modules="all-linear"),
    )
    folder = run_dpo(
        training_job(
            settings,
            stories_path,
            tmp_path / "dpo",
            chat_template="neural-chat",
            seed=5,
            dtype="float64",
            tokens_per_microbatch=ours.BUDGET,
        ),
        Console(quiet=True),
    )

    model = plain.fresh_adapter(plain.load(stories_path, torch.float64), seed=5)
    with plain.adapter_off(model):
        reference = plain.pair_logps(model, pairs)

    def loss(examples: tuple[int, ...]) -> Tensor:
        policy = plain.pair_logps(model, [pairs[i] for i in examples])
        return plain.dpo_loss(policy, reference[list(examples)], BETA)

    steps = StepSampler(len(pairs), 3, seed=5).steps(0, 3)
    plain.train(model, [partial(loss, step.examples) for step in steps])
    trained = load_file(folder / "adapter_model.safetensors")
    plain.assert_close_tensors(trained, plain.trained_parameters(model), 1e-9)
