"""The padded path: right for every model that cannot read packed trees, and only for those."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from tandem.data.batching.collate import collate, padded_shape, record_key
from tandem.errors import UserError
from tandem.model.attention.select import choose_backend
from tandem.model.logprobs.sequence_logps import (
    check_head,
    micro_batches,
    padded_rows,
    sequence_logps,
    token_logps,
    tokens_fed,
)
from tandem.model.lora.adapter import LoraWeights
from tandem.model.lora.targets import unreached_layers
from tandem.recipe.training_settings import LoraSettings

from .families import PADDED, RECURRENT_GEMMA, TREES
from .made import (
    adapt,
    attend,
    gradients,
    largest_relative_error,
    make_model,
    make_tree,
    make_trees,
    oracle_logps,
    recompute,
    without_sharing,
)
from .precision import everything_in_float64


@pytest.mark.parametrize("family", PADDED)
def test_equals_one_sequence_at_a_time(family: str) -> None:
    made, reason = PADDED[family]
    trees = make_trees()
    with everything_in_float64():
        plain = made.make()
        backend, why = choose_backend("auto", plain)
        assert backend == "padded"
        assert reason in why
        left_out = unreached_layers(plain)

        reference = adapt(made.make(), unreached=left_out)
        wanted = oracle_logps(reference, trees)
        weights = torch.randn(len(wanted), generator=torch.manual_seed(2))
        (wanted * weights).sum().backward()

        attend(plain, backend)
        model = adapt(plain, unreached=left_out)
        found = sequence_logps(model, collate(trees))
        (found * weights).sum().backward()

    assert found.dtype == wanted.dtype == torch.float64
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)
    expected = gradients(reference)
    # Nothing that is trained stands idle.
    trained = [name for name, p in reference.named_parameters() if p.requires_grad]
    assert sorted(expected) == sorted(trained)
    assert largest_relative_error(gradients(model), expected) < 1e-9


def test_checkpointing_changes_nothing() -> None:
    results = []
    for checkpointing in (False, True):
        plain = PADDED["stablelm"][0].make()
        attend(plain, "padded")
        model = adapt(plain)
        if checkpointing:
            recompute(model)
        model.train()
        sequence_logps(model, collate(make_trees())).sum().backward()
        results.append(gradients(model))
    assert largest_relative_error(results[1], results[0]) < 1e-12


def test_rows_show_each_sequence_up_to_its_last_target() -> None:
    rng = np.random.default_rng(0)
    # The second branch of the second tree feeds nothing: its target follows the prefix.
    trees = [make_tree(rng, 2, (3, 2), 1), make_tree(rng, 3, (2, 1), 0)]
    batch = collate(trees)
    padded = padded_rows(batch)
    assert padded.rows.tolist() == [[0, 1, 2, 3], [0, 1, 4, 0], [5, 6, 7, 8], [5, 6, 7, 0]]
    assert padded.tokens == 4 + 3 + 4 + 3
    assert padded.target_sequence.tolist() == [0, 0, 0, 0, 1, 1, 1, 2, 2, 3]
    assert padded.target_position.tolist() == [0, 1, 2, 3, 0, 1, 2, 2, 3, 2]
    model = make_model()
    assert sum(tokens_fed(model, tree) for tree in trees) == batch.tokens
    attend(model, "padded")
    assert sum(tokens_fed(model, tree) for tree in trees) == padded.tokens


def test_a_micro_batch_of_rows_keeps_to_the_budget() -> None:
    trees = make_trees()
    model = make_model()
    attend(model, "padded")
    shapes = [(2, 28), (2, 18), (2, 44), (2, 4), (2, 19)]
    assert [padded_shape(tree) for tree in trees] == shapes
    # 4 x 44 and 4 x 28 fit; 6 x 44 would not.
    assert micro_batches(model, trees, 200) == [(0, 2), (1, 3, 4)]
    assert micro_batches(model, trees, 1) == [(i,) for i in range(5)]
    assert micro_batches(model, trees, 10 * 44) == [(0, 1, 2, 3, 4)]
    for budget in (90, 120, 200):
        found = micro_batches(model, trees, budget)
        assert sorted(i for members in found for i in members) == list(range(5))
        for members in found:
            rows = padded_rows(collate([trees[i] for i in members])).rows
            assert rows.numel() <= budget or len(members) == 1


def test_a_recipe_may_ask_for_it_and_padding_is_never_read() -> None:
    model = make_model()
    trees = make_trees()
    assert choose_backend("padded", model) == ("padded", "asked for")
    with torch.no_grad():
        wanted = oracle_logps(model, trees)
        attend(model, "padded")
        batch = collate(trees)
        torch.testing.assert_close(sequence_logps(model, batch), wanted, rtol=0, atol=1e-6)
        # Another token in row 0, which padding shows, moves nothing but the first record.
        before = token_logps(model, batch)
        ids = batch.input_ids.clone()
        ids[0] = 5 if ids[0] != 5 else 6
        after = token_logps(model, replace(batch, input_ids=ids))
    first = batch.target_sequence < 2
    assert torch.equal(before[~first], after[~first])
    assert not torch.equal(before[first], after[first])


def test_dropout_masks_are_those_of_the_packed_path() -> None:
    trees = [part for tree in make_trees() for part in without_sharing(tree)]
    keys = [record_key(1, 2, i) for i in range(len(trees))]
    found = []
    for backend in ("segments", "padded"):
        plain = make_model()
        attend(plain, backend)
        model = adapt(plain, dropout=0.3).train()
        found.append(sequence_logps(model, collate(trees, keys)))
        # They act.
        assert (found[-1] - sequence_logps(model.eval(), collate(trees))).abs().max() > 1e-3
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-6)


def test_last_rows_are_not_skipped() -> None:
    model = make_model()
    batch = collate(make_trees())
    seen: list[tuple[int, ...]] = []
    attend(model, "padded")
    model.model.layers[-1].mlp.gate_proj.register_forward_pre_hook(
        lambda _, inputs: seen.append(tuple(inputs[0].shape[:2]))
    )
    with torch.no_grad():
        token_logps(model, batch)
    assert seen == [tuple(padded_rows(batch).rows.shape)]


def test_what_cannot_be_computed_is_refused() -> None:
    mamba, lfm2 = PADDED["mamba"][0].make(), PADDED["lfm2"][0].make()
    for model in (mamba, lfm2):
        for backend in ("segments", "dense"):
            with pytest.raises(UserError, match=r"reads packed trees.*attention: padded"):
                choose_backend(backend, model)
    with pytest.raises(UserError, match="attention interface"):
        attend(PADDED["stablelm"][0].make(), "segments")
    with pytest.raises(UserError, match="soft-caps"):
        choose_backend("segments", TREES["gemma2"].make())
    sinks = PADDED["gpt-oss"][0].make()
    attend(sinks, "dense")
    with pytest.raises(UserError, match="sinks"), torch.no_grad():
        sequence_logps(sinks, collate(make_trees()))


def test_an_adapter_that_would_do_nothing_is_refused() -> None:
    mamba = PADDED["mamba"][0].make()
    left_out = unreached_layers(mamba)
    assert {name.rsplit(".", 1)[-1] for name in left_out} == {"dt_proj", "out_proj"}
    assert unreached_layers(make_model()) == []
    lora = LoraSettings(rank=2, alpha=2, target_modules=("in_proj", "dt_proj"))
    with pytest.raises(UserError, match="dt_proj"):
        LoraWeights(lora).attach(mamba, unreached=left_out)


@pytest.mark.parametrize("family", [*TREES, *PADDED])
def test_the_head_is_the_models_own(family: str) -> None:
    check_head(TREES[family].make() if family in TREES else PADDED[family][0].make())


def test_a_head_that_tandem_does_not_know_is_refused() -> None:
    capped = RECURRENT_GEMMA.make()
    capped.get_output_embeddings().weight.data *= 5  # far enough for its soft-cap to bend them
    check_head(capped)
    model = make_model()
    whole = model.lm_head.forward
    model.lm_head.forward = lambda hidden: 0.5 * whole(20.0 * hidden)
    with pytest.raises(UserError, match="MistralForCausalLM does more to its logits"):
        check_head(model)
