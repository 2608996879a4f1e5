"""The command itself: what it imports, its exit codes, what it says."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tandem import __version__
from tandem.cli import main as entry
from tandem.cli.main import COMMANDS, main
from tandem.errors import Stopped, TandemError, UserError

from .fresh import fresh_one_by_one

HEAVY = ("torch", "transformers", "peft", "datasets", "numpy", "yaml", "rich")
# Commands whose flags are made from settings, which are pydantic's.
OF_SETTINGS = ("sft", "dpo", "merge", "pairs", "check", "show", "eval", "chat", "export")


@pytest.mark.parametrize("of_settings", [True, False])
def test_help_imports_nothing_heavy(of_settings: bool, tmp_path: Path) -> None:
    heavy = {*HEAVY} if of_settings else {*HEAVY, "pydantic"}
    every = [["--help"], ["--version"], *([name, "-h"] for name in COMMANDS)]
    asked = [argv for argv in every if (argv[0] in OF_SETTINGS) is of_settings]
    for found in fresh_one_by_one(asked, home=tmp_path):
        assert (found.code, found.err) == (0, "")
        assert found.out
        assert not found.packages & heavy


def test_a_dry_run_needs_no_training_library() -> None:
    program = (
        "import sys\n"
        "from tandem.cli.main import main\n"
        "code = main(['run', 'neural-chat-7b-v3-1', '--dry-run'])\n"
        "heavy = ('torch', 'transformers', 'peft', 'datasets', 'huggingface_hub')\n"
        "print([name for name in heavy if name in sys.modules], file=sys.stderr)\n"
        "sys.exit(code)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "[]\n")


def test_the_module_is_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tandem", "--version"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, f"tandem {__version__}\n")


def test_every_command_has_its_function_and_its_line_in_the_help(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([]) == 0
    shown = capsys.readouterr().out
    for name, (module, function, about) in COMMANDS.items():
        assert callable(getattr(importlib.import_module(module), function))
        assert name in shown
        assert about in shown


def _command_that_raises(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def handler(argv: list[str]) -> int:
        raise error

    module = SimpleNamespace(chat=handler)
    monkeypatch.setattr(entry, "import_module", lambda name: module)


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (UserError("data.jsonl:3: no such key"), 2, "error: data.jsonl:3: no such key\n"),
        (Stopped("checkpoint at step 5"), 3, "stopped: checkpoint at step 5\n"),
        (KeyboardInterrupt(), 3, "stopped by the keyboard; the same command resumes the run\n"),
        (
            PermissionError(13, "Permission denied", "/x"),
            2,
            "error: /x: Permission denied; check its rights, or choose another path\n",
        ),
        (
            OSError(28, "No space left on device"),
            2,
            "error: a file: No space left on device; make room there and run again\n",
        ),
        (TandemError("the loss is not finite"), 1, "error: the loss is not finite\n"),
    ],
)
def test_a_mistake_or_a_stop_is_one_line_and_its_code(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    code: int,
    said: str,
) -> None:
    _command_that_raises(monkeypatch, error)
    assert main(["chat"]) == code
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", said)


def test_a_bug_is_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _command_that_raises(monkeypatch, ZeroDivisionError("a bug"))
    assert main(["chat"]) == 1
    shown = capsys.readouterr().err
    assert "Traceback" in shown
    assert "ZeroDivisionError: a bug" in shown


def test_a_reader_that_leaves_early_is_no_error() -> None:
    done = subprocess.run(
        f"{sys.executable} -m tandem run demo --dry-run | head -n 1",
        shell=True,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.startswith("# dry run")
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["rnu"], "unknown command rnu. Did you mean tandem run?"),
        (["zzz"], "unknown command zzz. Commands: run, sft"),
        (["--versoin"], "unknown flag --versoin; did you mean --version?"),
        (["sft", "--lerning-rate", "1"], "unknown flag --lerning-rate; did you mean --learn"),
        (["dpo", "--max_seq_length", "9"], "unknown flag --max_seq_length; did you mean --max_"),
        (["sft", "--max_steps", "many"], "argument --max_steps: 'many' is not a whole number"),
        (["sft", "--bf16", "perhaps"], "argument --bf16: invalid boolean value: 'perhaps'"),
        (["sft", "--device", "tpu"], "argument --device: invalid choice: 'tpu'"),
        (["sft", "--seed", "1", "--seed", "2"], "--seed is given twice; keep one"),
        (["sft", "--max-length=1", "--max_length=1"], "--max_length is given twice; keep one"),
        (["sft"], "tandem sft needs --model_name_or_path, --dataset_name, --output_dir"),
        (["run"], "required: RECIPE"),
        (["run", "demo", "--lr=3"], "recipe keys are written key=value, without dashes"),
        (["run", "demoo"], "Did you mean demo?"),
        (["merge", "--base-model-path", "x"], "required: --lora-model-path, --output-path"),
        (["cache", "show", "stray"], "unrecognized arguments: stray"),
        (["chat"], "required: MODEL"),
        (["chat", "m", "--temperature", "-1"], "-1 is not a number from 0"),
        (["chat", "m", "--temperature", "hot"], "argument --temperature: 'hot' is not a number"),
        (["chat", "m", "--seed", "x"], "argument --seed: 'x' is not a whole number"),
        (["chat", "m", "--seed", "-1"], "-1 is not from 0 to 4294967295"),
        (["pairs", "--seed", "1.5"], "argument --seed: '1.5' is not a whole number"),
        (
            ["eval", "m", "--samples", "-1"],
            "--samples is -1, but it must be greater than or equal to 0",
        ),
        (["chat", "m", "--top-p", "0"], "0 is not above 0 and at most 1"),
        (["chat", "m", "--max-new-tokens", "0"], "0 is not above 0"),
        (["cache", "burn"], "invalid choice: 'burn'"),
        (["report", "no-such-run"], "no-such-run: no such folder"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_exit_2(
    capsys: pytest.CaptureFixture[str], argv: list[str], said: str
) -> None:
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert said in captured.err
