"""The Modelfile's template writes what the model's own does, or there is none."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from tandem.cli.main import main
from tandem.data.records import Turn
from tandem.data.tokenize.chat_template import (
    ChatTemplate,
    resolve_template,
    template_names,
)
from tandem.errors import UserError
from tandem.export.choices import ExportJob
from tandem.export.compare_tokens import ChatModel
from tandem.export.go_template import KNOWN, render_go
from tandem.export.ollama import choose_template, export_ollama, parameters_of
from tandem.export.vocabulary import vocabulary_of
from tandem.model.model_folder import load_tokenizer, model_folder

from .test_gguf import said

# The forms of Gemma 3 and Phi-4-mini for plain conversations.
_OTHERS = {
    "gemma": "{{ bos_token }}{% set ns = namespace(system='') %}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{% set ns.system = message['content'] + '\n\n' %}"
    "{% else %}{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else 'user') + "
    "'\n' + (ns.system if loop.index0 < 2 and message['role'] == 'user' else '') + "
    "message['content'] | trim + '<end_of_turn>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
    "phi": "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + "
    "'<|end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}",
}


@pytest.mark.parametrize("name", [*template_names(), *_OTHERS])
def test_shipped_templates_are_written_in_go(name: str) -> None:
    tokenizer = load_tokenizer(model_folder("demo:base"))
    source = _OTHERS.get(name)
    template = ChatTemplate(name, source) if source else resolve_template(tokenizer, name)
    chat = ChatModel(tokenizer, template, (2,), len(tokenizer))
    own, _ = vocabulary_of(tokenizer, chat.template, chat.rows, "model")
    assert choose_template(own, chat)[0] == name


def test_a_template_that_is_not_known_is_refused(
    merged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before anything is written, with where the nearest one parts."""
    template = tmp_path / "own.jinja"
    template.write_text(
        "{{ bos_token }}{% for message in messages %}<{{ message['role'] }}>"
        "{{ message['content'] }}{{ eos_token }}{% endfor %}<assistant>"
    )
    code = main(
        ["export", "ollama", str(merged), "--output", str(tmp_path / "out"),
         "--chat_template", str(template)]
    )  # fmt: skip
    assert code == 2
    told = capsys.readouterr().err
    assert "is none of those that tandem can write in Go's template language (chatml, " in told
    assert "nearest is" in told
    assert not (tmp_path / "out").exists()


def test_the_folder_is_what_ollama_create_reads(
    merged: Path, tmp_path: Path, console: Console
) -> None:
    job = ExportJob(str(merged), tmp_path / "out", "q8_0", system="Be brief.")
    folder = export_ollama(job, console)
    assert sorted(one.name for one in folder.iterdir()) == ["Modelfile", "model.gguf"]
    assert (folder / "Modelfile").read_text() == (
        'FROM ./model.gguf\nTEMPLATE """{{ range .Messages }}<|{{ .Role }}|>\n{{ .Content }}</s>\n'
        '{{ end }}<|assistant|>\n"""\nSYSTEM """Be brief."""\nPARAMETER stop "</s>"\n'
    )
    assert "the Modelfile's template (zephyr) writes the tokens of the model's own" in said(console)


def test_parameters_are_those_of_the_generation_config(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(
        '{"temperature": 0.6, "top_k": 20, "top_p": 0.95, "repetition_penalty": 1.1}'
    )
    assert parameters_of(tmp_path) == {
        "temperature": 0.6, "top_k": 20, "top_p": 0.95, "repeat_penalty": 1.1,
    }  # fmt: skip
    (tmp_path / "generation_config.json").write_text('{"do_sample": false}')
    assert parameters_of(tmp_path) == {"temperature": 0}


_TALK = (
    Turn("system", "S"), Turn("user", "A"), Turn("user", "B"), Turn("assistant", "C"),
    Turn("user", "D"),
)  # fmt: skip


def test_go_templates_are_evaluated_as_go_does() -> None:
    """Messages of one role are joined, as Ollama does before it renders."""
    assert render_go(KNOWN["chatml"], _TALK) == (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nA\n\nB<|im_end|>\n"
        "<|im_start|>assistant\nC<|im_end|>\n<|im_start|>user\nD<|im_end|>\n<|im_start|>assistant\n"
    )
    assert render_go(KNOWN["mistral"], _TALK) == "[INST] S\n\nA\n\nB [/INST]CEOS[INST] D [/INST]"
    assert render_go(KNOWN["neural-chat"], _TALK[1:2]) == (
        "### System:\nYou are a helpful assistant who answers truthfully and clearly.EOS"
        "\n### User:\nAEOS\n### Assistant:\n"
    )
    chosen = '{{ if .System }}x{{ else if eq "a" "b" }}y{{ else }}{{ $z := "w" }}{{ $z }}{{ end }}'
    assert render_go(chosen, _TALK[1:]) == "w"
    with pytest.raises(ValueError, match=r"len \.Messages is not evaluated"):
        render_go("{{ len .Messages }}", _TALK)
    with pytest.raises(ValueError, match="has no end"):
        render_go("{{ if .System }}", _TALK)


def test_blanks_that_the_template_takes_away_are_named() -> None:
    from tandem.export.ollama import _compare
    from tandem.export.probes import PADDED

    tokenizer = load_tokenizer(model_folder("demo:base"))
    source = (
        "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>\n"
        "{{ message['content'] | trim }}{{ eos_token + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    )
    chat = ChatModel(tokenizer, ChatTemplate("own", source), (2,), len(tokenizer))
    own, _ = vocabulary_of(tokenizer, chat.template, chat.rows, "model")
    name, text = choose_template(own, chat)
    assert name == "zephyr"
    assert _compare(text, own, chat, (PADDED,))[1] is not None


def test_texts_that_a_modelfile_cannot_hold_are_refused(merged: Path, tmp_path: Path) -> None:
    from tandem.export.ollama import modelfile_text

    with pytest.raises(UserError, match='cannot hold a text with """'):
        modelfile_text("{{ .Prompt }}", [], {}, 'He said """so"""')
