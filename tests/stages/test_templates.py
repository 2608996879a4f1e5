"""Chat templates through the training stages: named ones go along, dates stay the start's."""

from __future__ import annotations

import json
import os
import shutil
import signal
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from tandem.data.tokenize import chat_template as template_module
from tandem.errors import Stopped
from tandem.storage.atomic_files import read_json
from tandem.train import trainer

from .test_training_stages import run

DEFAULT = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
TOOL_USE = (
    "{{ bos_token }}{% for t in tools or [] %}TOOL {{ t | tojson }}{% endfor %}"
    "{% for m in messages %}[{{ m.role }}]{% for c in m.tool_calls or [] %}"
    "{{ c.function | tojson }}{% endfor %}{{ m.content or '' }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
NAMED = {"default": DEFAULT, "rag": DEFAULT + "{# for documents #}", "tool_use": TOOL_USE}


def write_calls(path: Path) -> Path:
    """Records with a list of tools, the half of them with a call."""
    tool = {"type": "function", "function": {"name": "sun", "parameters": {"type": "object"}}}
    call = {"type": "function", "function": {"name": "sun", "arguments": {"sea": "blue"}}}
    said = {"role": "assistant", "content": None, "tool_calls": [call]}
    plain = {"role": "assistant", "content": "red"}
    with path.open("w") as file:
        for i in range(12):
            turns = [{"role": "user", "content": f"say {i}"}, said if i % 2 else plain]
            file.write(json.dumps({"tools": [tool], "messages": turns}) + "\n")
    return path


@pytest.mark.parametrize("layout", ["tokenizer_config.json", "additional_chat_templates"])
def test_named_templates_go_along_and_records_with_tools_take_theirs(
    tiny_model: Path, tmp_path: Path, layout: str
) -> None:
    base = shutil.copytree(tiny_model, tmp_path / "base")
    if layout == "tokenizer_config.json":
        config = read_json(base / layout)
        listed = [{"name": name, "template": text} for name, text in NAMED.items()]
        (base / layout).write_text(json.dumps(config | {"chat_template": listed}))
    else:
        (base / layout).mkdir()
        for name, text in NAMED.items():
            file = "chat_template.jinja" if name == "default" else f"{layout}/{name}.jinja"
            (base / file).write_text(text)
    write_calls(tmp_path / "sft.jsonl")
    changes: dict[str, Any] = {"max_steps": 1, "batch_size": 4, "max_length": 256}
    run("sft", base, tmp_path / "out", **changes)
    assert read_json(tmp_path / "out" / "summary.json")["ledger"]["dropped"] == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == NAMED
    outputs = read_json(tmp_path / "out" / "manifest.json")["outputs"]
    assert {f"additional_chat_templates/{name}.jinja" for name in ("rag", "tool_use")} < set(
        outputs
    )
    run("sft", base, tmp_path / "out", **changes)  # recognised as finished


def test_a_run_that_goes_on_the_next_day_has_the_date_that_it_began_with(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = shutil.copytree(tiny_model, tmp_path / "base")
    dated = DEFAULT.replace("{{ bos_token }}", "{{ bos_token + strftime_now('%d %b %Y') }}")
    (base / "chat_template.jinja").write_text(dated)
    run("sft", base, tmp_path / "whole", save_steps=1)
    taken, plain = 0, trainer.Trainer._take

    def take(self: Any, step: Any) -> Any:
        nonlocal taken
        report = plain(self, step)
        taken += 1
        if taken == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return report

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "_take", take)
        with pytest.raises(Stopped):
            run("sft", base, tmp_path / "out", save_steps=1)

    class Tomorrow(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return datetime.now(tz) + timedelta(days=1)

    monkeypatch.setattr(template_module, "datetime", Tomorrow)
    resumed = run("sft", base, tmp_path / "out", save_steps=1)
    whole = run("sft", base, tmp_path / "whole", save_steps=1)  # finished, and read again
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    summaries = [read_json(tmp_path / name / "summary.json") for name in ("out", "whole")]
    assert len({one["examples_hash"] for one in summaries}) == 1
    other = run("sft", base, tmp_path / "other", save_steps=1)
    assert any(not torch.equal(other[name], whole[name]) for name in whole)
