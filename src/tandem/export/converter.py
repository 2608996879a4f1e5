"""Runs llama.cpp's own converter, where a user has it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from tandem.errors import UserError
from tandem.export.choices import FileFormat

NAME = "convert_hf_to_gguf.py"
_LAST_LINES = 8


def find_converter(given: str) -> Path:
    """The converter at a path, or `auto` for the one on PATH; raises UserError without one."""
    if given != "auto":
        path = Path(given).expanduser()
        path = path / NAME if path.is_dir() else path
        if not path.is_file():
            raise UserError(f"--converter: {path} is no file. Name llama.cpp's {NAME}.")
        return path
    found = shutil.which(NAME)
    if found is None:
        raise UserError(
            f"--converter auto: {NAME} is not on PATH. Name it, or leave the flag out: tandem "
            "writes the file itself then."
        )
    return Path(found)


def convert(converter: Path, source: Path, output: Path, wanted: FileFormat) -> None:
    """Let llama.cpp's converter write a file; raises UserError with its last words if it fails."""
    command = [
        sys.executable, str(converter), str(source), "--outfile", str(output), "--outtype", wanted,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode or not output.exists() or not output.stat().st_size:
        said = "\n".join((done.stdout + done.stderr).strip().splitlines()[-_LAST_LINES:])
        raise UserError(f"{converter} wrote no file (exit code {done.returncode}):\n{said}")
