"""A template in a file, with a token of its own, from the first stage to the answers."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tandem.cli.main import main
from tandem.data.records import Turn
from tandem.data.tokenize.chat_template import ChatTemplate, prompt_ids, resolve_template, stop_ids
from tandem.storage.atomic_files import read_json

_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}<|over|>"
    "{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
)


def test_a_run_keeps_the_template_of_a_file(
    some_data: Path, some_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    template = tmp_path / "mine.jinja"
    template.write_text(_TEMPLATE)
    lines = (some_data / "pairs" / "orca_dpo_pairs.jsonl").read_text().splitlines()
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("\n".join(sorted(lines, key=len)[:8]) + "\n")
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(f"""
name: mine
model: {some_model}
output_dir: {tmp_path / "run"}
chat_template: {template}
added_tokens: ["<|over|>"]
sft:
  data:
    path: {pairs}
    format: prompt and completion
    fields: {{prompt: question, completion: chosen}}
  batch_size: 4
  max_steps: 2
  max_length: 256
dpo: {{data: {pairs}, batch_size: 4, max_steps: 2, max_length: 256}}
evaluate: {{pairs: {pairs}}}
""")
    assert main(["check", "--recipe", str(recipe)]) == 0
    assert main(["plan", str(recipe)]) == 0
    assert main(["run", str(recipe)]) == 0
    turns = (Turn("user", "Who are you?"),)
    expected: list[int] = []
    for name in ("1-sft", "2-sft-merged", "4-dpo", "5-final"):
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / name)
        assert tokenizer.chat_template == _TEMPLATE
        used = resolve_template(tokenizer, None)
        assert tokenizer.decode([stop_ids(tokenizer, used)[0]]) == "<|over|>"
        ids = prompt_ids(tokenizer, ChatTemplate(used.name, used.source), turns)
        expected = expected or ids
        assert ids == expected
    models = read_json(tmp_path / "run" / "6-evaluation" / "evaluation.json")["models"]
    # The base is asked in the same words; it is the SFT's start, and so are its scores.
    assert set(models) == {"base", "sft", "dpo"}
    assert all(0 <= one["preference_accuracy"] <= 1 for one in models.values())
