"""Merges an adapter into its base, weight by weight, in float32; each tensor is read back."""

from __future__ import annotations

import shutil
from collections import defaultdict, deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tandem.errors import UserError
from tandem.model.lora.adapter_folder import NewRows, Update
from tandem.model.merge_sums import Sums
from tandem.model.quantize import Quantized
from tandem.model.shard_writer import ShardWriter, TensorKind
from tandem.model.weight_files import Part, opened, parts_of, read_headers
from tandem.storage.atomic_files import atomic_write_json, read_json
from tandem.storage.hashing import weight_files, weight_index

# Tensors that may wait for the disk while the next are computed.
_AHEAD = 4


@dataclass(frozen=True)
class WeightPair:
    """A weight as the adapter saw it in the base, and merged."""

    before: Tensor
    merged: Tensor


class MergedShards:
    """The shards of a merged model, open until the end of a `with` block.

    A weight's tensors are written when the weight is asked for, or else by `finish`. Files, and
    names in them, are the base's own, also where the model has others in memory. Other threads
    write and read back what was computed, so that a few tensors are in memory at a time.
    """

    def __init__(
        self,
        base: Path,
        updates: Mapping[str, Update],
        output: Path,
        *,
        model: Any,
        dtype: torch.dtype | None,
        quantized: Quantized | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        """Announce all tensors, and reserve their room.

        Args:
            base: model folder with safetensors weights.
            updates: from `read_updates`, by the weights' names in memory or in the files.
            output: an existing folder; gets the shards, and their index.
            model: the base, its weights on the meta device.
            dtype: of the floating-point weights written; None keeps each weight's own.
            quantized: the weights that the adapter saw in 4 bits, all written as it saw them.
            device: where they are rounded.

        Raises UserError if an update finds no weight, or there is too little room on the disk.
        """
        self._base, self._output, self._model = base, output, model
        self._headers = read_headers(base)
        self._sums = Sums(base, updates, model, dtype, quantized, torch.device(device))
        self._parts: dict[str, list[Part]] = defaultdict(list)
        self._waiting: dict[tuple[str, ...], Part] = {}
        for part in parts_of(self._headers, model):
            self._waiting[part.names] = part
            for name in part.weights or part.names:
                self._parts[name].append(part)
        self._sums.check_all_found({*self._parts, *self._headers})
        kinds = self._kinds()
        self._bytes = sum(kind.nbytes for named in kinds.values() for kind in named.values())
        _check_room(self._bytes, output)
        self._writers = {
            file: ShardWriter(output / file.name, named) for file, named in kinds.items()
        }
        # One writes and reads back while the other waits for the disk.
        self._disk = ThreadPoolExecutor(max_workers=2)
        self._storing: deque[Future[None]] = deque()

    def __enter__(self) -> MergedShards:
        return self

    def __exit__(self, *_: object) -> None:
        self._disk.shutdown(wait=True, cancel_futures=True)
        for writer in self._writers.values():
            writer.close()

    def weight(self, name: str) -> WeightPair | None:
        """Write a weight, by its name in memory; None for one that the files do not have.

        Raises UserError where shapes disagree, a sum is not finite, or the disk gave back other
        bytes than it got for an earlier weight.
        """
        if name not in self._parts:
            return None
        pairs = [self._write(part)[name] for part in self._parts[name]]
        if len(pairs) == 1:
            return pairs[0]
        # The experts of a mixture, in their order.
        return WeightPair(
            torch.cat([pair.before for pair in pairs]), torch.cat([pair.merged for pair in pairs])
        )

    def finish(self) -> list[str]:
        """Write what nobody asked for, wait for the disk, and return the names of the files."""
        for part in list(self._waiting.values()):
            self._write(part)
        self._wait(0)
        for writer in self._writers.values():
            writer.check_whole()
        written = [file.name for file in self._writers]
        if (listed := weight_index(self._base)) is not None:
            atomic_write_json(
                self._output / listed.name,
                {
                    "metadata": {"total_size": self._bytes},
                    "weight_map": {name: one.file.name for name, one in self._headers.items()},
                },
            )
            written.append(listed.name)
        return written

    def _write(self, part: Part) -> dict[str, WeightPair]:
        """Write a part's tensors, unless that was done; returns the weights that they make."""
        tensors = self._read(part)
        summed = self._sums.of(part, tensors)
        if self._waiting.pop(part.names, None) is not None:
            for name, tensor in summed.items():
                writer = self._writers[self._headers[name].file]
                self._storing.append(self._disk.submit(_store, writer, name, tensor))
            self._wait(_AHEAD)
        if not part.weights:
            return {name: WeightPair(tensors[name], summed[name]) for name in part.names}
        before = self._sums.seen(part, tensors)
        merged = part.assembled(summed, self._model)
        return {name: WeightPair(before[name], merged[name]) for name in part.weights}

    def _read(self, part: Part) -> dict[str, Tensor]:
        """The base's tensors of a part."""
        return {name: _tensor(self._headers[name].file, name) for name in part.names}

    def _wait(self, most: int) -> None:
        """Wait until no more than so many tensors are still to be stored; raises what failed."""
        while len(self._storing) > most:
            self._storing.popleft().result()

    def _kinds(self) -> dict[Path, dict[str, TensorKind]]:
        """The tensors of each file as they will be written."""
        kinds: dict[Path, dict[str, TensorKind]] = {}
        parts = {name: part for part in self._waiting.values() for name in part.names}
        for shard in weight_files(self._base):
            with opened(shard) as file:
                kinds[shard] = {
                    name: self._sums.kind(parts[name], header, file.get_tensor(name).dtype)
                    for name, header in self._headers.items()
                    if header.file == shard
                }
        return kinds


def added(updates: Mapping[str, Update]) -> list[int]:
    """The added tokens whose embeddings an adapter brings."""
    rows = [update for update in updates.values() if isinstance(update, NewRows)]
    return sorted({index for one in rows for index in one.ids})


def vocabulary_grown(output: Path, updates: Mapping[str, Update]) -> None:
    """Let a merged folder's configuration count the rows of its added tokens."""
    ids = added(updates)
    if not ids:
        return
    config = read_json(output / "config.json")
    text = config if "vocab_size" in config else config["text_config"]
    text["vocab_size"] = max(text["vocab_size"], max(ids) + 1)
    atomic_write_json(output / "config.json", config)


def _tensor(shard: Path, name: str) -> Tensor:
    with opened(shard) as file:
        return file.get_tensor(name)


def _check_room(wanted: int, folder: Path) -> None:
    """Raise UserError where a disk has less room than a merged model takes."""
    free = shutil.disk_usage(folder).free
    if wanted > free:
        raise UserError(
            f"the merged model takes {wanted / 1e9:.1f} GB, and the disk of {folder} has "
            f"{free / 1e9:.1f} GB free. Make room there, name an output folder on another disk, or "
            "merge with a narrower --dtype."
        )


def _store(writer: ShardWriter, name: str, tensor: Tensor) -> None:
    """Write a tensor, and read it back."""
    writer.write(name, tensor)
    if not writer.holds(name, tensor):
        raise UserError(
            f"{writer.path} did not keep the bytes of {name} that were written to it: the disk, or "
            "the memory, is damaged. The merge was discarded."
        )
