"""Each optimizer against values derived by hand, a plain loop in float64, or the peer that has it;
its state goes on from a file with the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tandem.errors import UserError
from tandem.integrations.choose import pieces_of
from tandem.integrations.deepspeed.zero import Zero2Engine, Zero3Engine
from tandem.model.trained_weights import hidden_matrices
from tandem.recipe.choices import SHARDS
from tandem.recipe.data_source import DataSource
from tandem.recipe.training_settings import SftSettings
from tandem.runtime.device import Device
from tandem.train import optimizers
from tandem.train.engines.fsdp2 import Fsdp2Engine
from tandem.train.engines.replicated import ReplicatedEngine
from tandem.train.optimizers import (
    OPTIMIZERS,
    check_optimizer,
    load_state,
    make_optimizer,
    set_rate,
    state_of,
)
from tandem.train.updates.muon import orthogonalised

CPU = Device(torch.device("cpu"), torch.float32)
SHAPES = {"matrix": (6, 40), "tall": (70, 64), "wide": (64, 80), "vector": (9,)}


def settings_of(optimizer: str, **values: Any) -> SftSettings:
    free = {"lr_scheduler": "constant"} if optimizer == "schedule_free_adamw" else {}
    values = {"learning_rate": 0.01, "weight_decay": 0.1, **free, **values}
    return SftSettings(data=(DataSource(path="x"),), optimizer=optimizer, **values)


def made(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        name: nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
        for name, shape in SHAPES.items()
    }


def optimizer_of(parameters: dict[str, Tensor], name: str, **values: Any) -> torch.optim.Optimizer:
    return make_optimizer(parameters, settings_of(name, **values), CPU, {"matrix", "tall", "wide"})


def gradients(step: int, like: dict[str, Tensor]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return {n: torch.randn(p.shape, generator=generator).to(p.dtype) for n, p in like.items()}


def take(optimizer: torch.optim.Optimizer, parameters: dict[str, Tensor], steps: range) -> None:
    """Steps whose rate changes, as under a schedule."""
    for step in steps:
        for name, gradient in gradients(step, parameters).items():
            parameters[name].grad = gradient
        set_rate(optimizer, 0.01 * (step + 1) / 4)
        optimizer.step()


def adamw(p: Tensor, steps: int, rates: list[float]) -> Iterator[Tensor]:
    """AdamW with a plain loop; yields the weight before each step and takes its gradient."""
    m, v = torch.zeros_like(p), torch.zeros_like(p)
    for t in range(1, steps + 1):
        gradient = yield p
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        update = (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
        p = p * (1 - rates[t - 1] * 0.1) - rates[t - 1] * update
    yield p


def by_loop(rule: Callable[..., Any], name: str, steps: int) -> Tensor:
    start = made()
    rates = [0.01 * (step + 1) / 4 for step in range(steps)]
    run = rule(start[name].detach(), steps, rates)
    weight: Tensor = next(run)
    for step in range(steps):
        weight = run.send(gradients(step, start)[name])
    return weight


def taken(name: str, steps: int) -> dict[str, Tensor]:
    parameters = made()
    take(optimizer_of(parameters, name), parameters, range(steps))
    return {name: p.detach() for name, p in parameters.items()}


@pytest.mark.parametrize("name", SHAPES)
def test_adamw_is_a_plain_loop(name: str) -> None:
    assert optimizer_of(made(), "adamw").defaults["fused"]
    torch.testing.assert_close(taken("adamw", 5)[name], by_loop(adamw, name, 5), rtol=1e-12, atol=0)


def test_lion_is_as_derived_by_hand() -> None:
    weight = nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    optimizer = make_optimizer({"w": weight}, settings_of("lion", learning_rate=0.1), CPU)
    # c = 0.1 x 0.5 > 0: w = 1 x (1 - 0.1 x 0.1) - 0.1; m = 0.01 x 0.5
    # c = 0.9 x 0.005 - 0.1 x 0.1 < 0: w = 0.89 x 0.99 + 0.1; m = 0.99 x 0.005 - 0.01 x 0.1
    # c = 0.9 x 0.00395 + 0 > 0: w = 0.9811 x 0.99 - 0.1
    for gradient, wanted in ((0.5, 0.89), (-0.1, 0.9811), (0.0, 0.871289)):
        weight.grad = torch.tensor([gradient], dtype=torch.float64)
        optimizer.step()
        assert weight.item() == pytest.approx(wanted, abs=1e-12)
    assert optimizer.state[weight]["exp_avg"].item() == pytest.approx(0.99 * 0.00395, abs=1e-12)


def test_adafactor_is_a_plain_loop() -> None:
    """Algorithms 4 and 5 of arXiv 1804.04235 at the recipe's rate, with decoupled decay."""

    def factored(p: Tensor, steps: int, rates: list[float]) -> Iterator[Tensor]:
        rows, columns = torch.zeros(p.shape[0]), torch.zeros(p.shape[1])
        for t in range(1, steps + 1):
            gradient = yield p
            square, keep = gradient**2 + 1e-30, 1 - t**-0.8
            rows = keep * rows + (1 - keep) * square.mean(1)
            columns = keep * columns + (1 - keep) * square.mean(0)
            update = gradient / (rows[:, None] * columns[None, :] / rows.mean()).sqrt()
            update = update / max(1.0, float(update.pow(2).mean().sqrt()))
            p = p - rates[t - 1] * 0.1 * p - rates[t - 1] * update
        yield p

    for name in ("matrix", "tall"):
        wanted = by_loop(factored, name, 4)
        torch.testing.assert_close(taken("adafactor", 4)[name], wanted, rtol=1e-6, atol=1e-9)


def test_muon_orthogonalises_matrices_and_moves_the_rest_by_adamw(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = taken("muon", 5)
    torch.testing.assert_close(found["vector"], by_loop(adamw, "vector", 5), rtol=1e-12, atol=1e-15)
    theirs = made()
    matrices = [theirs["matrix"], theirs["tall"], theirs["wide"]]
    peer = torch.optim.Muon(matrices, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    # Theirs iterates in bfloat16; here in the precision of the weights.
    monkeypatch.setattr(Tensor, "bfloat16", lambda self: self)
    take(peer, theirs, range(5))
    for name in ("matrix", "tall", "wide"):
        torch.testing.assert_close(found[name], theirs[name].detach(), rtol=1e-9, atol=1e-12)


def test_an_orthogonalised_matrix_keeps_its_singular_vectors() -> None:
    for shape in ((8, 30), (30, 8)):
        matrix = torch.randn(shape, dtype=torch.float64, generator=torch.manual_seed(2))
        left, _, right = torch.linalg.svd(matrix, full_matrices=False)
        values = left.T @ orthogonalised(matrix) @ right.T
        assert (values - values.diag().diag()).abs().max() < 1e-9
        assert 0.6 < values.diag().min() <= values.diag().max() < 1.3


def test_schedule_free_is_its_algorithm_with_all_three_points() -> None:
    """Algorithm 1 of arXiv 2405.15682, on a bowl whose gradient depends on where it is taken."""
    beta, centre = 0.9, torch.linspace(-1, 1, 9, dtype=torch.float64)
    parameters = {"w": nn.Parameter(torch.ones(9, dtype=torch.float64))}
    optimizer: Any = optimizer_of(parameters, "schedule_free_adamw", adam_beta2=0.95)
    x = z = torch.ones(9, dtype=torch.float64)
    squares, weights = torch.zeros(9, dtype=torch.float64), 0.0
    assert torch.equal(optimizer.averaged(parameters["w"]), x)
    # A warm-up from 0, whose first step counts for nothing, and a smaller rate at the end.
    for t, rate in enumerate([0.0, 0.05, 0.1, 0.1, 0.02], 1):
        y = (1 - beta) * z + beta * x
        torch.testing.assert_close(parameters["w"].detach(), y, rtol=1e-12, atol=1e-13)
        gradient = 2 * (y - centre)
        squares = 0.95 * squares + 0.05 * gradient**2
        update = gradient / ((squares / (1 - 0.95**t)).sqrt() + 1e-8) + 0.1 * y
        z = z - rate * update
        weight = max([0.0, 0.05, 0.1, 0.1, 0.02][:t]) ** 2
        weights += weight
        x = x if not weight else x + (weight / weights) * (z - x)
        parameters["w"].grad = 2 * (parameters["w"].detach() - centre)
        set_rate(optimizer, rate)
        optimizer.step()
        averaged = optimizer.averaged(parameters["w"])
        torch.testing.assert_close(averaged, x, rtol=1e-12, atol=1e-13)
    assert (x - parameters["w"].detach()).abs().max() > 1e-3


def test_eight_bits_follow_thirty_two() -> None:
    """Tensors below 4,096 numbers keep 32 bits, so that they follow more closely."""
    parameters = made(torch.float32)
    optimizer = optimizer_of(parameters, "adamw_8bit")
    take(optimizer, parameters, range(5))
    kinds = {n: optimizer.state[p]["state1"].dtype for n, p in parameters.items()}
    whole, eighth = torch.float32, torch.uint8
    assert kinds == {"matrix": whole, "tall": eighth, "wide": eighth, "vector": whole}
    for name, limit in (("matrix", 1e-5), ("tall", 1e-3), ("wide", 1e-3), ("vector", 1e-5)):
        wanted = by_loop(adamw, name, 5)
        error = float((parameters[name].detach() - wanted).norm() / wanted.norm())
        assert error < limit, name


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_its_state_goes_on_from_a_file_with_the_same_bits(name: str, tmp_path: Path) -> None:
    """By names, whatever order its groups have; numbers of Python and bytes included."""
    whole, stopped = made(torch.float32), made(torch.float32)
    take(optimizer_of(whole, name), whole, range(6))
    first = optimizer_of(stopped, name)
    take(first, stopped, range(3))
    save_file(state_of(first, stopped), tmp_path / "state.safetensors")
    again = {n: nn.Parameter(p.detach().clone()) for n, p in stopped.items()}
    # In another order of parameters than the state was saved in.
    second = optimizer_of(dict(reversed(again.items())), name)
    load_state(second, again, load_file(tmp_path / "state.safetensors"))
    take(second, again, range(3, 6))
    assert all(torch.equal(again[n], whole[n]) for n in whole)
    # The state matters: without it the end is another one.
    fresh = {n: nn.Parameter(p.detach().clone()) for n, p in stopped.items()}
    take(optimizer_of(fresh, name), fresh, range(3, 6))
    assert not all(torch.equal(fresh[n], whole[n]) for n in whole)


def test_embeddings_and_head_are_no_matrices_between_layers() -> None:
    class Tiny(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
            self.layer, self.frozen = nn.Linear(4, 4), nn.Linear(4, 4).requires_grad_(False)

        def get_input_embeddings(self) -> nn.Module:
            return self.embed

        def get_output_embeddings(self) -> nn.Module:
            return self.head

    assert hidden_matrices(Tiny()) == {"layer.weight"}


@pytest.mark.parametrize(
    ("optimizer", "option"),
    [
        ("lion", {"adam_beta2": 0.999}),
        ("adafactor", {"adam_epsilon": 1e-8}),
        ("adamw", {"lion_beta1": 0.9}),
        ("schedule_free_adamw", {"muon_momentum": 0.95}),
    ],
)
def test_an_option_that_an_optimizer_does_not_use_is_an_error(optimizer: str, option: Any) -> None:
    """Even with its default value."""
    (key,) = option
    with pytest.raises(ValidationError, match=f"{key} has no effect with optimizer: {optimizer}"):
        settings_of(optimizer, **option)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_settings_with_an_optimizer_can_be_written_and_read(name: str) -> None:
    settings = settings_of(name)
    assert SftSettings.model_validate(settings.model_dump(mode="json")) == settings


def test_schedule_free_takes_no_schedule_and_needs_an_average() -> None:
    with pytest.raises(ValidationError, match="set lr_scheduler to constant or constant_with"):
        settings_of("schedule_free_adamw", lr_scheduler="cosine")
    with pytest.raises(ValidationError, match="adam_beta1 is 0, where optimizer: schedule_free"):
        settings_of("schedule_free_adamw", adam_beta1=0.0)


def test_each_engine_says_what_its_optimizer_holds() -> None:
    kinds: dict[str, Any] = {
        "single": ReplicatedEngine, "ddp": ReplicatedEngine, "fsdp2": Fsdp2Engine,
        "deepspeed-zero2": Zero2Engine, "deepspeed-zero3": Zero3Engine,
    }  # fmt: skip
    assert {name: pieces_of(name) for name in SHARDS} == {n: k.pieces for n, k in kinds.items()}
    assert (pieces_of("auto"), pieces_of("my.json")) == ("whole", "flat")


@pytest.mark.parametrize(
    ("name", "engine", "said"),
    [
        ("muon", "fsdp2", "cannot work on shards of each weight, which is what engine: fsdp2"),
        ("adafactor", "fsdp2", "Use engine: single or ddp, or another optimizer, such as adamw"),
        ("adamw_8bit", "deepspeed-zero2", "cannot work on pieces of all weights in a row"),
        ("schedule_free_adamw", "deepspeed-zero3", "Use engine: single, ddp or fsdp2, or another"),
        ("lion", "deepspeed-zero3", ""),
        ("schedule_free_adamw", "fsdp2", ""),
        ("adamw", "deepspeed-zero3", ""),
    ],
)
def test_an_engine_that_an_optimizer_cannot_work_in_is_refused(
    name: str, engine: str, said: str
) -> None:
    if not said:
        check_optimizer(name, pieces_of(engine), engine, CPU)
        return
    with pytest.raises(UserError, match=f"optimizer: {name} cannot work on") as caught:
        check_optimizer(name, pieces_of(engine), engine, CPU)
    assert said in str(caught.value)


def test_a_package_that_is_not_there_or_cannot_do_it_is_a_mistake_of_the_request(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    check_optimizer("adamw_8bit", "whole", "single", CPU)

    def old(*_: Any, **__: Any) -> Any:
        raise NotImplementedError("no kernel for CPU")

    library = SimpleNamespace(optim=SimpleNamespace(AdamW8bit=old))
    monkeypatch.setattr(optimizers, "load_bitsandbytes", lambda: library)
    with pytest.raises(UserError, match=r"does not run on cpu .*no kernel for CPU.*Install a new"):
        check_optimizer("adamw_8bit", "whole", "single", CPU)
    spec = replace(OPTIMIZERS["adamw_8bit"], extra=("no-such-package", "quant"))
    monkeypatch.setitem(OPTIMIZERS, "adamw_8bit", spec)
    with pytest.raises(UserError, match="optimizer: adamw_8bit needs the package no-such-package"):
        check_optimizer("adamw_8bit", "whole", "single", CPU)


def test_a_rate_of_the_root_mean_square_of_adamw() -> None:
    """Why Muon and AdamW can share one learning rate."""
    update = orthogonalised(torch.randn(64, 200, generator=torch.manual_seed(3)))
    size = float(update.pow(2).mean().sqrt()) * 0.2 * math.sqrt(200)
    assert 0.1 < size < 0.3
