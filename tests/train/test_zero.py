"""What DeepSpeed is started with."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from tandem.integrations.deepspeed.ds_config import own_config
from tandem.integrations.deepspeed.zero import start_engine


@pytest.fixture
def _alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process group of this process."""
    monkeypatch.setenv("LOCAL_RANK", "0")
    limit = timedelta(minutes=7)
    store = torch.distributed.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1, timeout=limit)
    # Stage 3 puts a product of its own in the place of torch's, whose operations nobody can count.
    linear = torch.nn.functional.linear
    yield
    torch.nn.functional.linear = linear
    dist.destroy_process_group()


# DeepSpeed's import uses what torch has given up.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.usefixtures("_alone")
@pytest.mark.parametrize("stage", [2, 3])
def test_it_waits_in_the_runs_own_group(stage: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a group with another timeout")

    monkeypatch.setattr(torch.distributed, "new_group", refuse)
    model = torch.nn.Linear(8, 8)
    optimizer = torch.optim.AdamW(model.parameters())
    engine = start_engine(model, optimizer, own_config(stage), "cpu")
    engine.backward(engine(torch.ones(3, 8)).sum())
    engine.step()
    assert engine.get_global_grad_norm() > 0
