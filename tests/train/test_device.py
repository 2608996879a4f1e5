"""Which device a run gets, what it can, and why another one is refused."""

from __future__ import annotations

import os
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tandem.errors import UserError
from tandem.integrations import choose
from tandem.integrations.choose import DeviceNames, choose_device, device_names
from tandem.integrations.gaudi import bridge
from tandem.integrations.gaudi.gaudi_device import GaudiDevice
from tandem.recipe.run_settings import HpuSettings, RunSettings
from tandem.runtime.device import Device
from tandem.runtime.host_memory import most_resident
from tandem.runtime.launch import Launch
from tandem.runtime.process_group import ProcessGroup
from tandem.train.engines.replicated import ReplicatedEngine
from tandem.train.token_budget import token_budget

GAUDI = GaudiDevice(torch.device("hpu"), torch.float32, HpuSettings(), lazy=False)


def _device(kind: str) -> Device:
    return Device(torch.device(kind), torch.float32)


class Machine:
    """What torch and Habana's bridge see; nothing but the CPU unless told otherwise."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.patch = patch
        patch.delenv("WORLD_SIZE", raising=False)
        for name in ("PT_HPU_LAZY_MODE", "PT_ENABLE_INT64_SUPPORT"):
            patch.setenv(name, "")
            patch.delenv(name)
        self.has()

    def has(self, *kinds: str, float64: bool = True) -> None:
        """Let these kinds of device be there."""
        see = self.patch.setattr
        see(torch.cuda, "is_available", lambda: "cuda" in kinds)
        see(torch.xpu, "is_available", lambda: "xpu" in kinds)
        see(torch.xpu, "get_device_properties", lambda *_: types.SimpleNamespace(has_fp64=float64))
        see(torch.backends.mps, "is_available", lambda: "mps" in kinds)
        for kind in ("cuda", "xpu"):
            see(getattr(torch, kind), "device_count", lambda: 2)
        see(bridge, "bridge_installed", lambda: "hpu" in kinds or "bridge" in kinds)
        see(bridge, "load_bridge", lambda **_: None)
        hpu = types.SimpleNamespace(is_available=lambda: "hpu" in kinds, device_count=lambda: 2)
        see(torch, "hpu", hpu, raising=False)

    def started(self, rank: int, count: int) -> None:
        """Let this process be one of several on the machine."""
        for name, value in (("RANK", rank), ("LOCAL_RANK", rank)):
            self.patch.setenv(name, str(value))
        for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
            self.patch.setenv(name, str(count))


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


def test_auto_takes_the_first_that_is_there(machine: Machine) -> None:
    order = ("hpu", "cuda", "xpu", "mps")
    for number, kind in enumerate(order):
        machine.has(*order[number:])
        assert choose_device("auto", "auto").kind == kind
    machine.has("bridge")
    assert choose_device("auto", "auto").kind == "cpu", "a bridge without a card"


@pytest.mark.parametrize(
    ("asked", "build", "driver", "bridge_there", "told"),
    [
        ("cpu", "2.12.0+cu130", True, False, True),
        ("auto", "2.12.0+cpu", True, False, True),
        ("auto", "2.12.0+cu130", False, False, True),
        ("auto", "2.12.0+cu130", True, False, False),
        ("cuda", "2.12.0+cpu", False, False, False),
        ("auto", "2.12.0+cpu", False, True, False),
    ],
)
def test_torch_is_asked_where_there_may_be_more_than_a_cpu(
    machine: Machine, tmp_path: Path, asked: str, build: str, driver: bool, bridge_there: bool,
    told: bool,
) -> None:  # fmt: skip
    machine.has(*(["bridge"] if bridge_there else []))
    chosen: list[RunSettings] = []

    def device_of(run: RunSettings) -> Device:
        chosen.append(run)
        return Device(torch.device("cuda"), torch.bfloat16)

    if driver:
        (tmp_path / "card").touch()
    # joined to /dev, an absolute path stays as it is
    machine.patch.setattr(choose, "_DRIVERS", (str(tmp_path / "card"),))
    machine.patch.setattr(choose.metadata, "version", lambda _: build)
    machine.patch.setattr(choose, "device_of", device_of)
    machine.patch.setattr(sys, "platform", "linux")
    machine.patch.delitem(sys.modules, "torch")
    run = RunSettings(model="m", output_dir="o", device=asked)
    names = device_names(run)
    assert names == (DeviceNames("cpu", "float32") if told else DeviceNames("cuda", "bfloat16"))
    assert bool(chosen) is not told


def test_an_explicit_choice_wins(machine: Machine) -> None:
    machine.has("hpu", "cuda", "xpu", "mps")
    for kind in ("hpu", "cuda", "xpu", "mps", "cpu"):
        assert choose_device(kind, "auto").kind == kind


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("hpu", "habana_frameworks) is not installed"),
        ("cuda", "torch sees no CUDA device here"),
        ("xpu", "torch sees no Intel GPU here"),
        ("mps", "torch sees no Metal device here"),
    ],
)
def test_one_that_is_not_there_is_refused_with_the_reason(
    machine: Machine, kind: str, reason: str
) -> None:
    with pytest.raises(UserError) as caught:
        choose_device(kind, "auto")
    assert f"device: {kind} was asked for, but " in str(caught.value)
    assert reason in str(caught.value)
    if kind == "hpu":
        machine.has("bridge")
        with pytest.raises(UserError, match="the bridge sees no Gaudi card"):
            choose_device(kind, "auto")


@pytest.mark.parametrize(
    ("kind", "backend", "weights", "sums"),
    [
        ("hpu", "hccl", torch.bfloat16, torch.float32),
        ("cuda", "nccl", torch.bfloat16, torch.float64),
        ("xpu", "xccl", torch.bfloat16, torch.float64),
        ("mps", "gloo", torch.float32, torch.float32),
        ("cpu", "gloo", torch.float32, torch.float64),
    ],
)
def test_what_each_can(
    machine: Machine,
    kind: str,
    backend: str,
    weights: torch.dtype,
    sums: torch.dtype,
) -> None:
    machine.has(kind)
    device = choose_device(kind, "auto")
    assert (device.backend, device.weights, device.sums) == (backend, weights, sums)
    assert device.autocast == (None if weights == torch.float32 else weights)
    assert device.free_shapes is (kind != "hpu")
    assert device.is_host is (kind == "cpu")
    assert device.optimizer("adamw") is None


def test_a_device_that_accelerate_does_not_take_is_refused(machine: Machine) -> None:
    taken = types.SimpleNamespace(device=torch.device("cuda"))
    machine.patch.setattr("tandem.train.engines.engine.Accelerator", lambda **_: taken)
    with pytest.raises(UserError, match="device: xpu was asked for, but accelerate prefers cuda"):
        ReplicatedEngine(_device("xpu"), ProcessGroup(Launch()))


def test_float64_is_refused_where_there_is_none(machine: Machine) -> None:
    machine.has("xpu", "mps", float64=False)
    assert choose_device("xpu", "auto").sums == torch.float32, "an Arc A770"
    for kind in ("xpu", "mps"):
        with pytest.raises(UserError, match=f"float64 does not exist on {kind}"):
            choose_device(kind, "float64")


def test_each_process_has_a_device_of_its_own(machine: Machine) -> None:
    machine.has("hpu", "cuda", "xpu", "mps")
    machine.started(1, 2)
    assert choose_device("cuda", "auto").torch_device == torch.device("cuda:1")
    assert choose_device("xpu", "auto").torch_device == torch.device("xpu:1")
    assert choose_device("hpu", "auto").torch_device == torch.device("hpu")
    with pytest.raises(UserError, match="nothing that carries gradients between processes on MPS"):
        choose_device("mps", "auto")
    machine.started(2, 3)
    for kind in ("cuda", "xpu"):
        with pytest.raises(UserError, match=f"3 processes .* with 2 {kind.upper()} devices"):
            choose_device(kind, "auto")


def test_a_device_is_asked_through_its_own_module(machine: Machine) -> None:
    asked: list[str] = []

    def module(**extra: Any) -> Any:
        names = {
            "synchronize": None, "mem_get_info": (5, 9), "max_memory_allocated": 7,
            "empty_cache": None,
        }  # fmt: skip
        return types.SimpleNamespace(
            **{n: lambda *_, n=n, v=v: (asked.append(n), v)[1] for n, v in names.items()}, **extra
        )

    device = Device(torch.device("hpu"), torch.float32)
    machine.patch.setattr(torch, "hpu", module(), raising=False)
    device.synchronize()
    assert (device.free_memory(), device.peak_memory()) == (5, 7)
    device.release_memory()
    assert asked == ["synchronize", "mem_get_info", "max_memory_allocated", "empty_cache"]


def test_mps_memory(machine: Machine) -> None:
    machine.patch.setattr(torch.mps, "driver_allocated_memory", lambda: 30)
    machine.patch.setattr(torch.mps, "recommended_max_memory", lambda: 100)
    device = Device(torch.device("mps"), torch.float32)
    assert (device.free_memory(), device.peak_memory()) == (70, 30)


def test_the_budget_of_masked_attention_is_bounded(machine: Machine) -> None:
    config = types.SimpleNamespace(hidden_size=8, num_hidden_layers=1, intermediate_size=8)
    config.get_text_config = lambda: config
    machine.patch.setattr(Device, "free_memory", lambda _: 2**40)
    budgets = {
        device.kind: token_budget("auto", device, config)
        for device in (_device("cpu"), _device("cuda"), GAUDI)
    }
    assert budgets == {"cpu": 2048, "cuda": 32768, "hpu": 4096}


def test_boundaries_are_marked_in_lazy_mode_alone(machine: Machine) -> None:
    marks: list[str] = []
    machine.patch.setattr(bridge, "mark_step", lambda: marks.append("mark"))
    GAUDI.step_boundary()
    _device("cpu").step_boundary()
    assert marks == []
    replace(GAUDI, lazy=True).step_boundary()
    assert marks == ["mark"]


def test_kernels_that_are_asked_for_must_be_there(machine: Machine) -> None:
    machine.has("hpu")
    for key, name in (("fused_attention", "FusedSDPA"), ("fused_optimizer", "FusedAdamW")):
        with pytest.raises(UserError, match=rf"hpu\.{key} needs {name} of habana_frameworks"):
            choose_device("hpu", "auto", HpuSettings(**{key: True}))  # type: ignore[arg-type]
        assert choose_device("cpu", "auto", HpuSettings(**{key: True})).kind == "cpu"  # type: ignore[arg-type]


def test_the_mode_is_always_set(machine: Machine) -> None:
    assert bridge.set_modes(lazy=False) is None
    assert (os.environ["PT_HPU_LAZY_MODE"], os.environ["PT_ENABLE_INT64_SUPPORT"]) == ("0", "1")
    notice = bridge.set_modes(lazy=True)
    assert notice is not None
    assert "PT_HPU_LAZY_MODE=0" in notice
    assert bridge.lazy_mode()
    assert bridge.set_modes(lazy=True) is None


def test_a_bridge_that_runs_in_another_mode_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "habana_frameworks.torch", types.ModuleType("bridge"))
    for mode, lazy in (("0", True), ("1", False)):
        monkeypatch.setenv("PT_HPU_LAZY_MODE", mode)
        with pytest.raises(UserError, match=f"PT_HPU_LAZY_MODE={int(lazy)}.*before Python starts"):
            bridge.load_bridge(lazy=lazy)


def test_the_most_that_was_held_is_not_that_of_the_parent() -> None:
    ballast = bytearray(600 * 2**20)
    ballast[:: 2**12] = b"x" * len(ballast[:: 2**12])
    program = "from tandem.runtime.host_memory import most_resident; print(most_resident())"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    alone = int(done.stdout)
    assert most_resident() > len(ballast)
    del ballast
    again = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert alone == pytest.approx(int(again.stdout), rel=0.2)
    assert alone < 600 * 2**20
