"""`import tandem` is instant, and its names are seen by people and tools."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import tandem

LIGHT = """
import sys
import tandem
print(sorted({name.partition('.')[0] for name in sys.modules} - sys.stdlib_module_names))
from tandem import LoRA, check, dpo, evaluate, plan, run, sft
LoRA(r=8)
try:
    sft("/no/model", "/no/data.jsonl", max_lenght=3)
except tandem.UserError as error:
    print(error)
print(sorted({'torch', 'transformers', 'peft', 'datasets'} & sys.modules.keys()))
import tandem.check.inputs
print(tandem.check is check, callable(tandem.check), tandem.check.inputs.__name__)
"""


def test_importing_it_and_a_first_mistake_need_no_torch(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LIGHT], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    packages, error, heavy, names = done.stdout.splitlines()
    assert "'pydantic'" not in packages
    assert "'rich'" not in packages
    assert error == "sft() has no setting max_lenght. Did you mean 'max_length'?"
    assert heavy == "[]"
    assert names == "True True tandem.check.inputs"
    assert list(tmp_path.iterdir()) == []


def test_all_names_are_there_and_documented() -> None:
    assert set(tandem.__all__) <= set(dir(tandem))
    for name in tandem.__all__:
        assert getattr(tandem, name) is not None
        if name != "__version__":
            assert inspect.getdoc(getattr(tandem, name)), name
    assert not hasattr(tandem, "chekc")


def test_functions_that_share_a_packages_name_have_their_signatures() -> None:
    for name, first in (("check", "data"), ("evaluate", "models"), ("plan", "recipe")):
        assert next(iter(inspect.signature(getattr(tandem, name)).parameters)) == first
