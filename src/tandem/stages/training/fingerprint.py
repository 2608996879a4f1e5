"""What the result of a training stage depends on."""

from __future__ import annotations

from typing import Any

from tandem.data.resolve_sources import data_identity
from tandem.stages.training.context import TrainContext
from tandem.storage.hashing import hash_bytes, hash_file, hash_json, hash_weights

# Settings that do not change what is computed.
_NOT_MATHEMATICS: Any = {
    "data": True,
    "logging_steps": True,
    "save_steps": True,
    "save_total_limit": True,
    "gradient_checkpointing": True,
    "max_dropped": True,
    "validation": {"data"},
}


def fingerprint(context: TrainContext) -> dict[str, Any]:
    """Collect all that the stage's result depends on, for its manifest."""
    base, run, held_out = context.base, context.job.run, context.held_out
    template, added = base.template, base.added
    return {
        "model": {
            "weights": hash_weights(base.folder),
            "config": hash_file(base.folder / "config.json"),
            **({"quantization": run.quantization} if run.quantization else {}),
            # DPO's reference depends on them, too.
            **({"added_tokens": dict(added.new)} if added.new else {}),
            **({"trained_tokens": dict(added.known)} if added.known else {}),
        },
        "data": data_identity(context.sources),
        **({"held_out": data_identity(held_out)} if held_out else {}),
        "chat_template": {
            "name": template.name,
            "hash": hash_bytes(template.source.encode()),
            **({"named": hash_json(template.named)} if template.named else {}),
        },
        "settings": context.job.settings.model_dump(mode="json", exclude=_NOT_MATHEMATICS),
        "seed": run.seed,
        "dtype": context.engine.device.dtype_name,
    }
