"""Streams that cannot take what is printed: it is replaced or lost, and the work stands."""

from __future__ import annotations

import codecs
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from tandem.cli.streams import ERRORS, forget_empty_sizes, plain
from tests.report.made_runs import run_folder


def in_shell(command: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    tandem = f'"{sys.executable}" -m tandem'
    return subprocess.run(
        command.replace("TANDEM", tandem), shell=True, capture_output=True, check=False,
        env={**os.environ, **environment},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("text", "encoding", "shown"),
    [
        ("loss ▼ −0.2 ± 0.1 → 5 × 2", "ascii", b"loss v -0.2 +- 0.1 -> 5 x 2"),
        ("caf\u00e9 ▲ \u4e2d", "latin-1", b"caf\xe9 ^ ?"),
        ("a file \udce9 and a half \ud800", "utf-8", b"a file \\xe9 and a half \\ud800"),
    ],
)
def test_characters_that_an_encoding_lacks_are_replaced(
    text: str, encoding: str, shown: bytes
) -> None:
    codecs.register_error(ERRORS, plain)
    assert text.encode(encoding, ERRORS) == shown


@pytest.mark.parametrize("encoding", ["latin-1", "ascii"])
def test_the_end_of_a_run_is_printed_whatever_the_encoding(tmp_path: Path, encoding: str) -> None:
    folder = run_folder(tmp_path / "run")
    program = (
        "import json, sys\n"
        "from pathlib import Path\n"
        "from tandem.cli.streams import Streams\n"
        "from tandem.cli.run import _finish\n"
        "streams = Streams()\n"
        f"folder = Path({str(folder)!r})\n"
        "_finish(folder, json.loads((folder / '6-evaluation/evaluation.json').read_text()))\n"
        "sys.exit(streams.settle(0, ['run']))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, check=False,
        env={**os.environ, "PYTHONIOENCODING": encoding},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"^ " in done.stdout
    assert (folder / "report.html").exists()


def test_a_record_is_shown_whatever_the_encoding(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text(
        '{"messages": [{"role": "user", "content": "▼?"}, {"role": "assistant", "content": "ß"}]}\n'
    )
    done = in_shell(f"TANDEM show {tmp_path}/d.jsonl --row 1 --text", PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"v?" in done.stdout


@pytest.mark.parametrize(
    ("command", "code", "said"),
    [
        ("TANDEM --help >/dev/full", 2, b"standard output: No space left on device; the output is"),
        ("TANDEM zzz 2>/dev/full", 2, b""),
        ("TANDEM --help >&-", 0, b""),
        ("TANDEM zzz >&- 2>&- <&-", 2, b""),
        ("TANDEM --help | true", 0, b""),
    ],
)
def test_streams_that_are_full_or_closed(command: str, code: int, said: bytes) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full")
    done = in_shell(command)
    assert done.returncode == code
    assert done.stderr.startswith(said)
    assert b"Traceback" not in done.stderr
    assert b"Exception ignored" not in done.stderr


@pytest.mark.parametrize(
    ("argv", "code"),
    [(["run", "r.yaml"], 0), (["run", "r.yaml", "--dry-run"], 2), (["check", "d.jsonl"], 2)],
)
def test_output_that_is_lost_is_an_error_where_it_is_all_of_the_work(
    argv: list[str], code: int
) -> None:
    program = (
        "import sys\n"
        "from tandem.cli.streams import Streams\n"
        "streams = Streams()\n"
        "print('a line')\n"
        f"sys.exit(streams.settle(0, {argv!r}))\n"
    )
    done = in_shell(f'"{sys.executable}" -c "{program}" >/dev/full')
    assert done.returncode == code
    assert done.stderr.count(b"\n") == 1


def test_progress_into_a_stream_that_is_gone_does_not_stop_what_is_at_work() -> None:
    program = (
        "import sys\n"
        "from tandem.cli.streams import Streams\n"
        "streams = Streams()\n"
        "from tandem.runtime.console import notice_console\n"
        "from tandem.runtime.console import StageProgress\n"
        "with StageProgress(notice_console(), 'sft', total_steps=300) as display:\n"
        "    for step in range(300):\n"
        "        display.advance(step + 1, {'loss': 1.0})\n"
        "print('trained')\n"
        "sys.exit(streams.settle(0, ['sft']))\n"
    )
    done = in_shell(f'"{sys.executable}" -c "{program}" 2>/dev/full')
    assert (done.returncode, done.stdout) == (0, b"trained\n")


def test_a_file_never_takes_the_number_of_a_closed_stream() -> None:
    program = (
        "import os\n"
        "from tandem.cli.streams import Streams\n"
        "Streams()\n"
        "os._exit(os.open('/dev/null', os.O_WRONLY))\n"
    )
    done = in_shell(f'"{sys.executable}" -c "{program}" >&- 2>&- <&-')
    assert done.returncode > 2


@pytest.mark.parametrize("columns", ["0", "1"])
def test_tables_are_printed_however_narrow_the_terminal(
    monkeypatch: pytest.MonkeyPatch, columns: str
) -> None:
    from tandem.report.terminal_tables import result_table
    from tests.report.made_runs import evaluation

    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setenv("LINES", "25")
    monkeypatch.setenv("TERM", "dumb")
    forget_empty_sizes()
    out = io.StringIO()
    Console(file=out, force_terminal=True).print(result_table(evaluation()))
    assert out.getvalue()
