"""TF32 is off, whatever was on before, through either of torch's interfaces."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from tandem.errors import TandemError
from tandem.runtime.device import exact_float32, float32_products


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    yield
    torch.set_float32_matmul_precision("highest")


def found() -> tuple[str, str, str]:
    backends = torch.backends
    return (
        backends.cuda.matmul.fp32_precision,
        backends.cudnn.conv.fp32_precision,
        backends.mkldnn.matmul.fp32_precision,
    )


def test_tf32_is_turned_off() -> None:
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    assert found() == ("tf32", "tf32", "tf32")
    assert float32_products() == "cuda.matmul tf32, cudnn.conv tf32, mkldnn.matmul tf32"
    exact_float32()
    assert float32_products() == "ieee"
    assert set(found()) <= {"ieee", "none"}
    # Libraries read the older interface, which raises when the two disagree.
    assert torch.backends.cuda.matmul.allow_tf32 is False
    assert torch.backends.cudnn.allow_tf32 is False
    assert torch.get_float32_matmul_precision() == "highest"


_NEW = """
import torch
torch.backends.fp32_precision = "tf32"
torch.backends.cuda.matmul.fp32_precision = "tf32"
torch.backends.mkldnn.matmul.fp32_precision = "tf32"
from tandem.runtime.device import exact_float32, float32_products
exact_float32()
print(float32_products(), torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32)
"""


@pytest.mark.parametrize("override", ["", "1"])
def test_what_the_newer_interface_or_the_environment_turned_on(override: str) -> None:
    environment = {"TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": override, "PATH": "/usr/bin:/bin"}
    if not override:
        del environment["TORCH_ALLOW_TF32_CUBLAS_OVERRIDE"]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", _NEW],
        capture_output=True,
        text=True,
        env=environment | {"PYTHONPATH": ":".join(sys.path)},
        check=False,
    )
    assert done.stdout == "ieee False False\n", done.stderr


def test_what_stays_on_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_float32_matmul_precision("high")
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda _: None)
    with pytest.raises(TandemError, match=r"cuda\.matmul tf32"):
        exact_float32()
