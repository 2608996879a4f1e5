"""File systems and accounts that lack something, and caches that cannot be used."""

from __future__ import annotations

import errno
import fcntl
import os
import pwd
import shutil
import sqlite3
import stat
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest
from safetensors import SafetensorError

from tandem.cli.main import main
from tandem.data.encoded.dataset_store import EncodedStore
from tandem.model.lora.adapter import LoraWeights
from tandem.stages.training.execution import token_budget_of
from tandem.storage.atomic_files import atomic_write_text
from tandem.storage.cache_folder import cache_folder, clear_cache

from .desk import Desk

_ADAPTER = "adapter_model.safetensors"


class Numbers:
    """Raises one error after the other, again and again, and notes which it has raised."""

    def __init__(self, *numbers: int) -> None:
        self.raised: set[int] = set()
        self._next = cycle(numbers)

    def fail(self) -> NoReturn:
        number = next(self._next)
        self.raised.add(number)
        raise OSError(number, os.strerror(number))


def test_folders_that_cannot_be_synced(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = os.fsync
    numbers = errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF, errno.EACCES
    errors = Numbers(*numbers)

    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            errors.fail()
        plain(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    desk.accepted(desk.train(save_steps=1))
    assert errors.raised == {*numbers}
    assert (desk.home / "out" / _ADAPTER).exists()
    desk.accepted(desk.merge(desk.model, desk.home / "out"))


def test_a_disk_that_fails_while_it_syncs_is_no_success(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fsync(_: int) -> NoReturn:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        desk.stopped(desk.train(), "Input/output error", "run again")
    desk.accepted(desk.train())


def test_file_systems_without_locks(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL
    errors = Numbers(*numbers)

    def flock(*_: object) -> NoReturn:
        errors.fail()

    monkeypatch.setattr(fcntl, "flock", flock)
    assert "a file system without locks" in desk.accepted(desk.train())
    assert "a file system without locks" in desk.accepted(desk.merge(desk.model, desk.home / "out"))
    for output in map(str, range(len(numbers) - len(errors.raised))):
        said = desk.accepted(desk.merge(desk.model, desk.home / "out", output))
        assert "a file system without locks" in said
    assert errors.raised == {*numbers}
    assert not list(desk.home.rglob(".lock"))


def test_an_account_without_a_home(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(*_: object) -> NoReturn:
        raise KeyError("getpwuid(): uid not found: 4242")

    for name in ("HOME", "XDG_CACHE_HOME", "USER", "LOGNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    said = desk.accepted(desk.train())
    assert "the encoded data cannot be kept" in said
    assert "set XDG_CACHE_HOME" in said
    desk.accepted(desk.merge(desk.model, desk.home / "out"))
    said = desk.accepted(desk.train("dpo", output_dir=desk.home / "dpo"))
    assert "reference log-probs are not stored for other runs" in said
    assert "9 and 0" not in said
    desk.refused(["cache"], "no home folder", "XDG_CACHE_HOME")


def test_a_cache_folder_may_begin_with_a_tilde_and_must_be_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "~/x")
    assert cache_folder() == tmp_path / "x" / "tandem"
    monkeypatch.setenv("XDG_CACHE_HOME", "$HOME/y")
    assert cache_folder() == tmp_path / "y" / "tandem"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_folder() == tmp_path / ".cache" / "tandem"


def _full(number: int) -> Callable[..., NoReturn]:
    def save(*_: object, **__: object) -> NoReturn:
        raise SafetensorError(
            f"Error while serializing: I/O error: {os.strerror(number)} (os error {number})"
        )

    return save


def test_a_disk_that_is_full_when_weights_are_written(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
        with monkeypatch.context() as patch:
            patch.setattr("tandem.train.checkpoint.save_file", _full(number))
            why = os.strerror(number)
            desk.stopped(desk.train(save_steps=1), why, "make room there and run again")
        assert not list(desk.home.rglob("*.tmp"))
    desk.accepted(desk.train(save_steps=1))
    with monkeypatch.context() as patch:
        patch.setattr("tandem.model.merge_weights.ShardWriter.write", _full(number))
        desk.stopped(desk.merge(desk.model, desk.home / "out"), "make room there and run again")
    assert not list(desk.home.rglob("*.tmp"))
    desk.accepted(desk.merge(desk.model, desk.home / "out"))


def test_after_a_disk_was_full_at_the_very_end_the_run_goes_on_from_its_last_checkpoint(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    command, plain = desk.train(save_steps=1), LoraWeights.save

    def save(self: LoraWeights, model: Any, folder: Path, tensors: Any) -> None:
        if "saving" in folder.name:
            _full(errno.ENOSPC)()
        plain(self, model, folder, tensors)

    with monkeypatch.context() as patch:
        patch.setattr(LoraWeights, "save", save)
        desk.stopped(command, "make room there and run again")
    assert "resuming from" in desk.accepted(command)
    assert (desk.home / "out" / _ADAPTER).exists()


def test_weights_get_the_rights_that_new_files_get(desk: Desk) -> None:
    for mask, rights in ((0o022, 0o644), (0o077, 0o600)):
        before = os.umask(mask)
        try:
            desk.accepted(desk.train(save_steps=1, output_dir=desk.home / f"out{mask}"))
            desk.accepted(desk.merge(desk.model, desk.home / f"out{mask}", f"merged{mask}"))
        finally:
            os.umask(before)
        files = [*desk.home.glob(f"out{mask}/**/*"), *desk.home.glob(f"merged{mask}/**/*")]
        assert {path.stat().st_mode & 0o777 for path in files if path.is_file()} == {rights}


def test_what_a_file_system_puts_into_a_folder_does_not_fill_it(desk: Desk) -> None:
    for name in ("lost+found", ".snapshot", ".nfs000123", ".DS_Store", ".Trash-0"):
        (desk.home / "out" / name).mkdir(parents=True)
    (desk.home / "out" / "System Volume Information").mkdir()
    desk.accepted(desk.train())
    desk.accepted(desk.train())


def _dpo(desk: Desk, name: str) -> tuple[str, bytes]:
    """What a DPO run says, and its adapter's bytes."""
    said = desk.accepted(desk.train("dpo", output_dir=desk.home / name))
    return said, (desk.home / name / _ADAPTER).read_bytes()


@dataclass(frozen=True)
class Sound:
    """The adapter of a DPO run, and the cache that it left."""

    adapter: bytes
    cache: Path


@pytest.fixture(scope="module")
def _kept() -> list[Sound]:
    return []


@pytest.fixture
def sound(desk: Desk, tmp_path_factory: pytest.TempPathFactory, _kept: list[Sound]) -> Sound:
    """One DPO run for all tests of this module, on the inputs of every desk."""
    if not _kept:
        _, adapter = _dpo(desk, "first")
        kept = tmp_path_factory.mktemp("kept") / "tandem"
        cache_folder().rename(kept)
        _kept.append(Sound(adapter, kept))
    return _kept[0]


def _changed(statement: str) -> Callable[[Path], None]:
    def change(store: Path) -> None:
        with sqlite3.connect(store) as connection:
            connection.executescript(statement)
        connection.close()

    return change


def _written(content: bytes) -> Callable[[Path], None]:
    def write(store: Path) -> None:
        store.write_bytes(content)

    return write


def _folder(store: Path) -> None:
    store.unlink()
    store.mkdir()


def _link(store: Path) -> None:
    store.unlink()
    store.symlink_to("/nowhere/at/all")


def _cut(store: Path) -> None:
    store.write_bytes(store.read_bytes()[: store.stat().st_size // 2])


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_written(os.urandom(8192)), "is damaged"),
        (_written(b"SQLite format 3\0" + bytes(4096)), "is damaged"),
        (_written(b""), ""),
        (_cut, "is damaged"),
        (_folder, "are not stored for other runs"),
        (_changed("UPDATE checked SET logp = logp + 1e-9"), "are damaged: they are computed again"),
        (_changed("UPDATE checked SET logp = -1.5, used = 0"), "are computed again"),
        (_changed("UPDATE checked SET logp = NULL"), "are computed again"),
        (_changed("UPDATE checked SET logp = 'much', tokens = 'many'"), "are computed again"),
        (_changed("DROP TABLE checked; CREATE TABLE checked (a, b)"), "is damaged"),
        (
            _changed(
                "CREATE TABLE logps (key BLOB PRIMARY KEY, logp REAL, tokens INTEGER, used REAL) "
                "WITHOUT ROWID; INSERT INTO logps SELECT key, -1.0, tokens, used FROM checked; "
                "DROP TABLE checked"
            ),
            "",
        ),
        (_link, "not stored"),
    ],
    ids=[
        "noise", "a header alone", "nothing", "half", "a folder", "a small change", "one value",
        "null", "texts", "another table", "as it was kept before", "a link to nowhere",
    ],
)  # fmt: skip
def test_a_damaged_store_of_reference_log_probs_trains_the_same_model(
    desk: Desk, sound: Sound, damage: Callable[[Path], None], said: str
) -> None:
    shutil.copytree(sound.cache, cache_folder(), dirs_exist_ok=True)
    expected = sound.adapter
    damage(cache_folder() / "reference.sqlite")
    told, adapter = _dpo(desk, "second")
    assert said in told
    assert adapter == expected
    assert " 0 found in the store" in told.replace("and 0 found", " 0 found")


def test_a_cache_in_the_place_of_which_a_file_lies(
    desk: Desk, sound: Sound, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk.text("a file", "in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(desk.home / "in the way"))
    said, adapter = _dpo(desk, "second")
    assert "the encoded data cannot be kept" in said
    assert "are not stored for other runs" in said
    assert adapter == sound.adapter
    assert main(["cache"]) == 0


def test_a_store_that_another_program_holds_is_done_without(
    desk: Desk, sound: Sound, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(sound.cache, cache_folder(), dirs_exist_ok=True)
    monkeypatch.setattr("tandem.train.reference_logps._PATIENCE", 0)
    holder = sqlite3.connect(cache_folder() / "reference.sqlite")
    holder.execute("BEGIN EXCLUSIVE")
    said, adapter = _dpo(desk, "second")
    holder.close()
    assert "are not stored for other runs: database is locked" in said
    assert adapter == sound.adapter


def test_encoded_data_whose_description_was_changed_is_encoded_again(desk: Desk) -> None:
    desk.accepted(desk.train())
    (entry,) = (cache_folder() / "encoded").glob("*/entry.json")
    whole, folder = entry.read_text(), desk.home.parent / "encoded"
    for key in ("sources", "records", "formats", "checksum"):
        for other in ("[]", "7", '"x"'):
            shutil.copytree(entry.parent, folder / "key")
            start = whole.index(f'"{key}":') + len(key) + 3
            changed = f'{whole[:start]} {other}, "rest": {whole[start:]}'
            (folder / "key" / "entry.json").write_text(changed)
            said: list[str] = []
            assert EncodedStore(said.append, folder).find("key", ["a.jsonl"]) is None
            assert "is damaged" in said[0]
            assert not (folder / "key").exists()
    shutil.copytree(entry.parent, folder / "key")
    assert EncodedStore(said.append, folder).find("key", ["a.jsonl"]) is not None
    entry.write_text(changed)
    assert "is damaged" in desk.accepted(desk.train(output_dir=desk.home / "other"))
    assert entry.read_text() == whole


def _cannot_write(*_: object, **__: object) -> NoReturn:
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))


def test_a_cache_that_may_only_be_read_is_used_and_is_not_called_damaged(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk.accepted(desk.train())
    monkeypatch.setattr(os, "utime", _cannot_write)
    monkeypatch.setattr("tandem.data.build_dataset._Builder._fill", _cannot_write)
    assert "damaged" not in desk.accepted(desk.train(output_dir=desk.home / "again"))


def test_an_entry_of_encoded_data_nested_too_deep_is_damaged(tmp_path: Path) -> None:
    (tmp_path / "key").mkdir()
    (tmp_path / "key" / "entry.json").write_text("[" * 100_000)
    said: list[str] = []
    assert EncodedStore(said.append, tmp_path).find("key", ["a.jsonl"]) is None
    assert "is damaged" in said[0]
    assert not (tmp_path / "key").exists()


@pytest.mark.parametrize("content", [b"\xff\xfe\n", b"[" * 100_000 + b"\n"])
def test_a_damaged_record_of_estimates_costs_no_training(desk: Desk, content: bytes) -> None:
    history = cache_folder() / "estimates.jsonl"
    history.parent.mkdir(parents=True, exist_ok=True)
    history.write_bytes(content)
    desk.accepted(desk.train())
    assert (desk.home / "out" / _ADAPTER).exists()
    assert history.read_bytes().startswith(content)


def _budget(folder: Path, said: list[str], *, sharded: bool = False) -> Any:
    """The token budget of a stage in a folder, whose schedule says 64."""
    engine: Any = SimpleNamespace(
        processes=SimpleNamespace(on_rank0=lambda work: work(), count=1),
        device=SimpleNamespace(release_memory=lambda: None),
        sharded=sharded,
    )
    return token_budget_of(engine, folder, {"tokens_per_microbatch": 64}, said.append)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "7",
        "{",
        "null",
        *(f'{{"tokens_per_microbatch": {v}}}' for v in ("0", '"x"', "-3")),
    ],
)
def test_a_damaged_memory_of_what_fits_is_named_and_found_out_again(
    tmp_path: Path, content: str
) -> None:
    (tmp_path / "memory.json").write_text(content)
    said: list[str] = []
    assert _budget(tmp_path, said).tokens == 64
    assert "hat fits in memory is tried again" in said[0]
    (tmp_path / "memory.json").write_text('{"tokens_per_microbatch": 16}')
    assert _budget(tmp_path, said).tokens == 16
    assert len(said) == 1


def test_a_smaller_budget_that_cannot_be_kept_ends_only_runs_that_must_begin_anew(
    tmp_path: Path,
) -> None:
    (tmp_path / "memory.json").mkdir()
    said: list[str] = []
    budget = _budget(tmp_path, said)
    budget.settle([8], SimpleNamespace(on_rank0=lambda work: work()))
    assert budget.tokens == 8
    assert "cannot be recorded for the next start" in said[1]
    with pytest.raises(OSError, match="directory"):
        _budget(tmp_path, said, sharded=True).settle(
            [8], SimpleNamespace(on_rank0=lambda work: work())
        )
    assert [path.name for path in tmp_path.iterdir()] == ["memory.json"]


def test_where_nothing_temporary_can_be_written_the_way_out_is_named(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nowhere() -> NoReturn:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']")

    monkeypatch.setattr(tempfile, "_gettempdir", nowhere)
    desk.refused(["check", str(desk.conversations)], "No usable temporary directory", "TMPDIR")


def test_a_file_that_could_not_be_written_leaves_no_half_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", _cannot_write)
    with pytest.raises(OSError, match="Read-only"):
        atomic_write_text(tmp_path / "summary.json", "{}")
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_removed_from_the_cache_is_not_counted_as_freed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (cache_folder() / "encoded" / "entry").mkdir(parents=True)
    (cache_folder() / "encoded" / "entry" / "ids").write_bytes(bytes(2000))
    (cache_folder() / "estimates.jsonl").write_bytes(bytes(100))
    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", lambda *_, **__: None)
        assert clear_cache() == 100
    assert clear_cache() == 2000
