"""Between the stages: merge an adapter into its base, verified, as a plain transformers model."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from tandem.data.tokenize.chat_template import find_ending, resolve_template
from tandem.errors import UserError
from tandem.integrations.choose import choose_device
from tandem.model.added_tokens import embedding_names
from tandem.model.base_model import check_weights
from tandem.model.companion_files import copy_surroundings, write_ends, write_templates
from tandem.model.layer_walk import CannotWalkError, walk
from tandem.model.lora.adapter_config import read_config
from tandem.model.lora.adapter_folder import NewRows, Update, copied_weights, read_updates
from tandem.model.merge_weights import MergedShards, added, vocabulary_grown
from tandem.model.model_folder import (
    QUANTIZATION,
    check_unquantized,
    described_rows,
    load_config,
    load_tokenizer,
    model_folder,
    model_without_weights,
)
from tandem.model.quantize import Quantized, read_record
from tandem.model.verify_merge import Verified, verified, whole_models
from tandem.model.weight_files import HEADS, check_sums, stored_dtype
from tandem.recipe.jobs import MergeJob
from tandem.runtime.console import log, say_finished
from tandem.runtime.device import Device, torch_dtype
from tandem.runtime.host_memory import freed_memory_kept
from tandem.stages.finished import merge_inputs
from tandem.stages.training.outputs import move_up
from tandem.storage.atomic_files import atomic_folder, atomic_write_json
from tandem.storage.folder_lock import folder_lock
from tandem.storage.manifest import NAME as MANIFEST
from tandem.storage.manifest import check_made, finish_stage, open_stage, read_manifest, start_stage

Log = Callable[..., None]
"""Puts a line on the console, in a style."""

_PROBES = (
    "The quick brown fox jumps over the lazy dog, and then it sleeps for seven hours.",
    "Once upon a time there was a small village by the sea. Everyone who lived there knew "
    "how to mend a net, how to read the clouds and when to stay at home.",
    "### User:\nWhat is the capital of France?\n### Assistant:\nThe capital of France is Paris.",
)
_MAX_TOKENS = 256
# Of models with more parameters a few tokens show the same, and take as long as the disk.
_LARGE, _FEW_TOKENS = 500_000_000, 5


def run_merge(job: MergeJob, console: Console) -> Path:
    """Merge a LoRA adapter into its base; the folder loads in plain transformers.

    Sums are computed in float32 weight by weight, cast once, and read back. The log-probs of some
    texts are compared with those of base and adapter together, layer by layer while it is written,
    before anything appears in the job's folder.

    Raises UserError for a wrong base, an adapter that is no plain LoRA, or a failed check.
    """

    def report(text: str, style: str = "") -> None:
        log(console, f"merge: {text}", style=style)

    work, inputs = _look_up(job, report)
    folder, quantized = job.folder, work.quantized
    with folder_lock(folder, report):
        opened = open_stage(folder, "merge", inputs)
        if opened.state == "finished":
            say_finished(console, "merge", folder)
            return folder
        start_stage(folder, "merge", inputs, {"base": job.run.model, "adapter": str(job.adapter)})
        if quantized is not None:
            report(
                f"the adapter was trained on {len(quantized.weights)} weights in 4 bits "
                f"({quantized.format}); it is added to what these rounded to"
            )
        began = time.perf_counter()
        device = choose_device(job.run.device, "auto")
        try:
            with atomic_folder(folder / "saving") as aside, freed_memory_kept():
                checked = work.into(aside, job.run.chat_template, device, report)
        except UserError:
            if opened.state == "fresh":  # nothing was made, so nothing is left behind
                (folder / MANIFEST).unlink()
            raise
        outputs = move_up(folder / "saving")
        seconds = time.perf_counter() - began
        _write_summary(folder, len(work.updates), checked, seconds, quantized)
        finish_stage(folder, [*outputs, "summary.json"])
        _report_result(report, work, checked)
        report(f"{len(work.updates)} weights, {_in_words(checked)}, {seconds:.1f} s -> {folder}")
    return folder


def _in_words(checked: _Checked) -> str:
    if checked.verified is None:
        return "each the sum of base and adapter"
    return (
        f"log-probs within {checked.verified.difference:.2g} nats of base + adapter (which moved "
        f"them by {checked.verified.effect:.2g})"
    )


def _look_up(job: MergeJob, log: Log) -> tuple[_Merge, dict[str, Any]]:
    """Read base and adapter, and check that they belong together; returns the inputs as well."""
    adapter, base = job.adapter, model_folder(job.run.model)
    config = load_config(base)
    check_unquantized(base, config)
    read_config(adapter)
    model = model_without_weights(config)
    dtype = torch_dtype(job.settings.dtype)
    check_sums(base, model, dict(model.named_parameters()))
    work = _Merge(
        base, adapter, config, model, read_updates(adapter, model), read_record(adapter), dtype
    )
    for folder in (base, adapter):
        check_made(folder, lambda text: log(text, "yellow"))
    _check_head(adapter, base, work)
    inputs = merge_inputs(job, base)
    _check_base(adapter, job.run.model, inputs["base"]["weights"], force=job.force)
    return work, inputs


@dataclass(frozen=True)
class _Checked:
    """How a merged model was compared with base and adapter, and what came out.

    Every tensor is compared as it is written; without `verified` that is all.
    """

    how: str  # layer by layer, whole or tensor by tensor
    verified: Verified | None
    why: str = ""  # it was not layer by layer


@dataclass(frozen=True)
class _Merge:
    """A base, an adapter, and the weights that change."""

    # folders
    base: Path
    adapter: Path
    config: Any  # transformers' configuration of the base
    model: Any  # the base without weights
    updates: dict[str, Update]  # what the adapter adds, by the weights' names
    quantized: Quantized | None  # what the base was rounded to in training, if it was
    dtype: torch.dtype | None  # of the merged weights; None keeps the base's own

    def into(self, folder: Path, chat_template: str | None, device: Device, log: Log) -> _Checked:
        """Write the merged model into a folder, and compare it with base and adapter together."""
        copy_surroundings(self.base, self.adapter, folder, self.dtype)
        vocabulary_grown(folder, self.updates)
        _settle_template(self.base, folder, chat_template, log)
        probes = self._probes(folder)
        stored = self.dtype or stored_dtype(self.base)
        compute = torch.float64 if stored == torch.float64 else torch.float32
        place = device.torch_device
        logps, why, short = None, "", ""
        with MergedShards(
            self.base, self.updates, folder,
            model=self.model, dtype=self.dtype, quantized=self.quantized, device=place,
        ) as shards:  # fmt: skip
            try:
                logps = walk(
                    self.config, self.adapter, probes, shards.weight, dtype=compute, device=place
                )
            except CannotWalkError as error:
                why = str(error)
                short = self._short_of_memory(compute, device)
            shards.finish()
        if short:
            return _Checked("tensor by tensor", None, f"{why}; {short}")
        how = "layer by layer" if logps else "whole"
        if logps is None:
            logps = whole_models(
                self.base, self.adapter, folder, probes, dtype=compute, device=place
            )
        # The adapter saw a base rounded from bfloat16 in bfloat16 again.
        formats = {stored, self.quantized.torch_dtype} if self.quantized else {stored}
        return _Checked(how, verified(logps, formats), why)

    def _short_of_memory(self, dtype: torch.dtype, device: Device) -> str:
        """Why the whole model cannot be checked, empty where it can."""
        needed = sum(weight.numel() for weight in self.model.parameters()) * dtype.itemsize
        free = device.free_memory()
        if needed <= free:
            return ""
        return f"whole it takes {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free"

    def _probes(self, merged: Path) -> list[list[int]]:
        """Token ids of texts with which models are compared; added tokens are fed and predicted."""
        tokenizer = load_tokenizer(merged)
        rows = described_rows(self.config)  # a tokenizer may have more tokens
        encoded = [[i for i in tokenizer(text)["input_ids"] if i < rows] for text in _PROBES]
        probes = [ids for ids in encoded if len(ids) > 1]
        if added_ids := added(self.updates):
            probes = [
                [token for pair in zip(ids, added_ids * len(ids), strict=False) for token in pair]
                for ids in probes
            ] + probes
        large = sum(weight.numel() for weight in self.model.parameters()) > _LARGE
        return [probe[: _FEW_TOKENS if large else _MAX_TOKENS] for probe in probes]


def _report_result(log: Log, work: _Merge, checked: _Checked) -> None:
    """Log which weights were not merged, how the others were checked, and what was lost."""
    for name in copied_weights(work.adapter):
        log(f"{name} in {work.adapter} is skipped: it equals the base's own")
    if checked.how != "layer by layer":
        log(f"checked {checked.how}, not layer by layer ({checked.why})")
    verified = checked.verified
    if verified is not None and verified.lossy:
        dtype = "the stored dtype" if work.dtype is None else str(work.dtype).split(".")[-1]
        log(
            f"rounding to {dtype} took a part of the adapter's effect "
            f"({verified.difference:.2g} of {verified.effect:.2g} nats a token); merge in float32 "
            "to keep it",
            "yellow",
        )


def _settle_template(base: Path, folder: Path, choice: str | None, log: Log) -> None:
    """Choose the merged folder's chat template, and make its files end answers as it does."""
    tokenizer = load_tokenizer(folder)
    own = tokenizer.chat_template
    template = resolve_template(tokenizer, choice)
    for notice in template.notices:
        log(notice)
    if own != template.saved:
        write_templates(folder, template.saved)
    ending = find_ending(tokenizer, template)
    if ending and (change := write_ends(folder, base, tokenizer, template, ending)):
        log(change)


def _check_head(adapter: Path, base: Path, work: _Merge) -> None:
    """Raise UserError for an adapter on one of head and input embedding, which share weights."""
    if not work.config.get_text_config().tie_word_embeddings:
        return
    shared = tuple(f"{name}.weight" for name in embedding_names(work.model))
    for name, update in work.updates.items():
        if name.endswith((*HEADS, *shared)) and not isinstance(update, NewRows):
            raise UserError(
                f"{adapter} changes {name}, whose weights output head and input embedding of "
                f"{base} share, so that no merged model has both. Serve it without a merge, or "
                "train one that leaves it out."
            )


def _check_base(adapter: Path, base: str, weights: str, *, force: bool) -> None:
    manifest = None if force else read_manifest(adapter)
    if manifest is None:
        return
    model = manifest["inputs"].get("model", {})
    if model.get("quantization") and not (adapter / QUANTIZATION).exists():
        raise UserError(
            f"{adapter} was trained on a quantised base, but has no {QUANTIZATION}, which says "
            "what was rounded: copy the whole folder again"
        )
    check_weights(adapter, base, weights, "Name the right base, or merge anyway with --force.")


def _write_summary(
    folder: Path, weights: int, checked: _Checked, seconds: float, quantized: Quantized | None
) -> None:
    verified = checked.verified
    summary = {
        "merged_weights": weights,
        "quantization": quantized.format if quantized else None,
        "checked": checked.how,
        "logp_difference": verified.difference if verified else None,
        "adapter_effect": verified.effect if verified else None,
        "probe_tokens": verified.tokens if verified else None,
        "seconds": seconds,
    }
    atomic_write_json(folder / "summary.json", summary)
