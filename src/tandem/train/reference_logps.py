"""Reference log-probs: computed once, kept on disk by content, found again by content."""

from __future__ import annotations

import hashlib
import sqlite3
import struct
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from tandem.data.batching.collate import collate
from tandem.data.encoded.dataset import EncodedDataset, sequence_digest
from tandem.data.encoded.example import Example
from tandem.model.logprobs.sequence_logps import micro_batches, tokens_fed
from tandem.storage.cache_folder import cache_folder
from tandem.train.engines.engine import Engine
from tandem.train.token_budget import TokenBudget, no_room

T = TypeVar("T")

NAME = "reference.sqlite"
# SQLite's codes for a damaged or foreign file: ERROR (other columns), CORRUPT, NOTADB.
_DAMAGED = frozenset((1, 11, 26))
# Seconds to wait for another run that writes to the store.
_PATIENCE = 10
# Records of one unit: what an interruption redoes, and what one transaction stores.
_UNIT = 64
# Records whose log-probs are looked up at once.
_BLOCK = 64 * _UNIT
_BYTES_LIMIT = 2 * 2**30
_ROW_BYTES = 80


class ReferenceStore:
    """Log-probs of sequences by (reference weights, numerics, tokens, trained mask).

    Learning rates, seeds, adapters, beta and losses are not part of the key, so other runs over
    the same data and reference find what this one computed; a changed weight byte or token misses.
    Every row has a checksum, and a damaged one counts as missing. A store that cannot be used never
    stops a run: the log-probs are computed again, and `log` says so once.
    """

    def __init__(
        self, log: Callable[[str], None] = lambda _: None, folder: Path | None = None
    ) -> None:
        self._log, self._folder = log, folder
        self._usable, self._damage_is_told = True, False

    def get(self, keys: Sequence[bytes]) -> dict[bytes, float]:
        """The log-probs that are there and sound."""
        nothing: tuple[dict[bytes, float], int] = ({}, 0)
        logps, damaged = self._try(partial(_get, keys), nothing)
        if damaged and not self._damage_is_told:
            self._damage_is_told = True
            self._log(
                f"{damaged} of the stored reference log-probs are damaged: they are computed again"
            )
        return logps

    def put(self, keys: Sequence[bytes], logps: Sequence[float], tokens: Sequence[int]) -> None:
        """Store log-probs in one transaction; what is there already stays as it is."""
        used, query = time.time(), "INSERT OR IGNORE INTO checked VALUES (?, ?, ?, ?, ?)"
        rows = [
            (key, logp, count, used, _checksum(key, logp, count))
            for key, logp, count in zip(keys, logps, tokens, strict=True)
        ]
        self._try(lambda connection: connection.executemany(query, rows), None)

    def prune(self, limit_bytes: int = _BYTES_LIMIT) -> int:
        """Forget the longest unused log-probs beyond the limit; returns how many."""
        return self._try(partial(_prune, limit_bytes), 0)

    def _try(self, work: Callable[[sqlite3.Connection], T], otherwise: T) -> T:
        """Return what `work` returns, `otherwise` where the store cannot be used from now on."""
        for attempt in range(2):
            if not self._usable:
                break
            try:
                with self._connection() as connection:
                    return work(connection)
            except (sqlite3.Error, OSError) as error:
                code = getattr(error, "sqlite_errorcode", None)
                if attempt == 0 and code is not None and code & 0xFF in _DAMAGED:
                    self._begin_anew(error)
                else:
                    self._do_without(error)
        return otherwise

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        path = self._path()
        path.parent.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(path, timeout=_PATIENCE)) as connection, connection:
            connection.execute(
                "CREATE TABLE IF NOT EXISTS checked (key BLOB PRIMARY KEY, logp REAL, "
                "tokens INTEGER, used REAL, checksum INTEGER) WITHOUT ROWID"
            )
            # Earlier versions kept rows without checksums here.
            connection.execute("DROP TABLE IF EXISTS logps")
            yield connection

    def _path(self) -> Path:
        return (self._folder or cache_folder()) / NAME

    def _begin_anew(self, error: Exception) -> None:
        path = self._path()
        self._log(f"the store of reference log-probs {path} is damaged ({error}) and begins empty")
        try:
            for tail in ("", "-journal", "-wal", "-shm"):
                path.with_name(path.name + tail).unlink(missing_ok=True)
        except OSError as trouble:
            self._do_without(trouble)

    def _do_without(self, error: Exception) -> None:
        self._usable = False
        self._log(f"reference log-probs are not stored for other runs: {error}")


def _get(keys: Sequence[bytes], connection: sqlite3.Connection) -> tuple[dict[bytes, float], int]:
    """The sound log-probs of some keys, and how many damaged ones were removed."""
    logps: dict[bytes, float] = {}
    damaged = 0
    for start in range(0, len(keys), 500):
        part = keys[start : start + 500]
        marks = ",".join("?" * len(part))
        query = f"SELECT key, logp, tokens, checksum FROM checked WHERE key IN ({marks})"
        for key, logp, tokens, checksum in connection.execute(query, part).fetchall():
            if _sound(key, logp, tokens, checksum):
                logps[key] = logp
            else:  # or it would stay in the place of the one that is computed now
                connection.execute("DELETE FROM checked WHERE key = ?", [key])
                damaged += 1
        touch = f"UPDATE checked SET used = ? WHERE key IN ({marks})"
        connection.execute(touch, [time.time(), *part])
    return logps, damaged


def _prune(limit_bytes: int, connection: sqlite3.Connection) -> int:
    (count,) = connection.execute("SELECT COUNT(*) FROM checked").fetchone()
    excess = max(0, count - limit_bytes // _ROW_BYTES)
    oldest = "SELECT key FROM checked ORDER BY used LIMIT ?"
    if excess:
        connection.execute(f"DELETE FROM checked WHERE key IN ({oldest})", [excess])
    return int(excess)


def _checksum(key: bytes, logp: float, tokens: int) -> int:
    return zlib.crc32(key + struct.pack("<dq", logp, tokens))


def _sound(key: Any, logp: Any, tokens: Any, checksum: Any) -> bool:
    """Whether a row is as it was written; damage can also give its columns other types."""
    right = isinstance(key, bytes) and isinstance(logp, float) and isinstance(tokens, int)
    return right and checksum == _checksum(key, logp, tokens)


def reference_logps(
    engine: Engine,
    trees: Sequence[Example],
    *,
    store: ReferenceStore | None,
    identity: str,
    budget: TokenBudget,
    advance: Callable[[int], None],
) -> tuple[NDArray[np.float64], int]:
    """Log-probs of every tree's branches under the engine's model as it is now.

    Records are computed in units that depend on the data alone. A unit of which anything is
    missing is computed whole, so an interrupted pass repeats the arithmetic of a whole one. Several
    processes share the units that are to be computed; rank 0 alone reads and writes the store.

    Args:
        engine: holds the reference (the policy with its adapter off).
        trees: all records.
        store: where log-probs are found and kept; None computes all of them, and keeps none.
        identity: hash of the reference weights and of what the numerics depend on.
        budget: lowered when memory runs out.
        advance: called with the number of records that were done.

    Returns the log-probs of all sequences [S] float64, and how many records had to be computed.
    """
    processes = engine.processes

    def find(keys: Sequence[bytes]) -> dict[bytes, float]:
        return {} if store is None else store.get(keys)

    def compute(part: Sequence[range]) -> list[tuple[float, int]]:
        unit = part[processes.rank] if processes.rank < len(part) else range(0)
        # With sharded weights, a process without records of its own still takes part.
        return _compute_unit(engine, [trees[i] for i in unit], trees[part[0].start], budget)

    def keep(keys: list[bytes], fresh: list[tuple[float, int]]) -> dict[bytes, float]:
        logps = [logp for logp, _ in fresh]
        if store is None:
            return dict(zip(keys, logps, strict=True))
        store.put(keys, logps, [count for _, count in fresh])
        # Where another run has stored a log-prob meanwhile, both take that one.
        return dict(zip(keys, logps, strict=True)) | store.get(keys)

    logps: list[NDArray[np.float64]] = []
    computed = 0
    for first in range(0, len(trees), _BLOCK):
        block = range(first, min(first + _BLOCK, len(trees)))
        keys = _keys(identity, trees, block)
        known = processes.on_rank0(partial(find, [key for row in keys for key in row]))
        units = [range(i, min(i + _UNIT, block.stop)) for i in range(first, block.stop, _UNIT)]
        missing = [u for u in units if any(key not in known for i in u for key in keys[i - first])]
        advance(len(block) - sum(map(len, missing)))
        for start in range(0, len(missing), processes.count):
            part = missing[start : start + processes.count]
            results = engine.gather(partial(compute, part), lambda unit: unit)
            budget.settle(processes.gather(lambda: budget.tokens), processes)
            fresh = [result for unit in results for result in unit]
            part_keys = [key for unit in part for i in unit for key in keys[i - first]]
            known.update(processes.on_rank0(partial(keep, part_keys, fresh)))
            computed += sum(map(len, part))
            advance(sum(map(len, part)))
        logps.append(np.array([known[key] for row in keys for key in row], dtype=np.float64))
    return np.concatenate(logps), computed


def _compute_unit(
    engine: Engine, trees: list[Example], filler: Example, budget: TokenBudget
) -> list[tuple[float, int]]:
    """Log-probs and trained tokens of a unit's sequences, in order.

    Where every forward waits for the other processes, `filler` is scored until all are done.
    """
    batches = micro_batches(engine.model, trees, budget.tokens) if trees else []
    rounds = len(batches)
    if engine.sharded:
        rounds = max(engine.processes.gather(lambda: len(batches)))
    tokens = [tokens_fed(engine.model, tree) for tree in trees]
    done = budget.run(
        batches,
        tokens,
        lambda members, _: _scored(engine, [trees[i] for i in members]),
        lambda i: no_room(trees[i], tokens[i]),
    )
    for _ in range(rounds - len(batches)):
        _scored(engine, [filler])
    results: dict[int, list[tuple[float, int]]] = {}
    for members, scored in done:
        each = iter(scored)
        for i in members:
            results[i] = [next(each) for _ in trees[i].branches]
    return [pair for i in range(len(trees)) for pair in results[i]]


def _scored(engine: Engine, trees: list[Example]) -> list[tuple[float, int]]:
    batch = collate(trees)
    with torch.no_grad():
        # Zeros follow where the micro-batch was padded to a declared shape.
        values: list[float] = engine.score(batch).tolist()[: batch.sequences]
    return list(zip(values, batch.sequence_tokens, strict=True))


def _keys(identity: str, trees: Sequence[Example], block: range) -> list[list[bytes]]:
    """The keys of each tree's sequences in a block of `trees`."""
    if isinstance(trees, EncodedDataset):
        stored = iter(trees.digests(block.start, block.stop))
        counts = trees.branches[block.start : block.stop].tolist()
        digests = [[next(stored).tobytes() for _ in range(count)] for count in counts]
    else:
        block_trees = (trees[i] for i in block)
        digests = [[sequence_digest(t.prefix, b) for b in t.branches] for t in block_trees]
    return [[_key(identity, digest) for digest in row] for row in digests]


def _key(identity: str, sequence: bytes) -> bytes:
    """The key of a sequence, given as its digest."""
    return hashlib.sha256(identity.encode() + sequence).digest()
