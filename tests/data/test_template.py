"""Chat templates: choice, notices, BOS and end-of-turn tokens."""

from __future__ import annotations

import copy
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from tandem.data.records import Turn
from tandem.data.tokenize.chat_template import (
    ChatTemplate,
    find_ending,
    missing_tokens,
    prompt_ids,
    render,
    resolve_template,
    stop_ids,
    template_names,
)
from tandem.data.tokenize.encode import ChatTokenizer
from tandem.data.tokenize.vocabulary import AddedTokens, add_tokens
from tandem.errors import UserError

TURNS = (
    Turn("system", "S."),
    Turn("user", "Q1"),
    Turn("assistant", "A1"),
    Turn("user", "Q2"),
)
WITHOUT_BOS = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"


def test_neural_chat_is_the_seeds_format(mistral_tokenizer: Any) -> None:
    template = resolve_template(mistral_tokenizer, "neural-chat")
    assert template.notices == ()
    assert render(mistral_tokenizer, template, TURNS, prompt=True) == (
        "<s>### System:\nS.</s>\n### User:\nQ1</s>\n### Assistant:\nA1</s>\n### User:\nQ2</s>\n"
        "### Assistant:\n"
    )
    without_system = render(mistral_tokenizer, template, TURNS[1:2], prompt=False)
    empty_system = render(
        mistral_tokenizer, template, (Turn("system", " "), TURNS[1]), prompt=False
    )
    assert without_system == empty_system
    assert without_system.startswith("<s>### System:\nYou are a helpful assistant")
    assert without_system.endswith(".</s>\n### User:\nQ1</s>")


def test_a_model_without_template_gets_neural_chat_and_a_notice(mistral_tokenizer: Any) -> None:
    template = resolve_template(mistral_tokenizer, None)
    assert template.name == "neural-chat"
    assert template.notices == ("the model has no chat template: using 'neural-chat'",)
    assert mistral_tokenizer.chat_template == template.source


def test_a_models_own_template_wins_and_may_be_one_of_several(byte_tokenizer: Any) -> None:
    own = resolve_template(byte_tokenizer, "chatml").source
    assert resolve_template(byte_tokenizer, None) == ChatTemplate("the model's own", own)
    named = {"default": own, "tool_use": "x"}
    byte_tokenizer.chat_template = named
    for _ in range(2):  # the tokenizer keeps all of them
        template = resolve_template(byte_tokenizer, None)
        assert template == ChatTemplate("the model's own", own, named=tuple(named.items()))
        assert byte_tokenizer.chat_template == named
    byte_tokenizer.chat_template = {"default": own}
    assert resolve_template(byte_tokenizer, None) == ChatTemplate("the model's own", own)


def test_named_templates_without_a_default_are_told_and_can_be_chosen(byte_tokenizer: Any) -> None:
    own = resolve_template(byte_tokenizer, "chatml").source
    rag = {"rag": own, "tool_use": own + "x"}
    byte_tokenizer.chat_template = rag
    with pytest.raises(UserError, match=r"\(rag, tool_use\), and none is called default.*neural"):
        resolve_template(byte_tokenizer, None)
    with pytest.raises(UserError, match=r"one of .*zephyr, rag, tool_use\. Did you mean 'rag'"):
        resolve_template(byte_tokenizer, "rga")
    template = resolve_template(byte_tokenizer, "rag")
    assert (template.name, template.source, template.named) == ("rag", own, ())
    assert "used for every record" in template.notices[0]
    assert "(the model also has: tool_use)" in template.notices[0]
    assert byte_tokenizer.chat_template == own


def test_prompt_ids_are_what_plain_transformers_feeds(
    mistral_tokenizer: Any, byte_tokenizer: Any
) -> None:
    messages = [{"role": turn.role, "content": turn.content} for turn in TURNS]
    for tokenizer, name in ((mistral_tokenizer, "neural-chat"), (byte_tokenizer, "chatml")):
        template = resolve_template(tokenizer, name)
        fed = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=False
        )
        assert prompt_ids(tokenizer, template, TURNS) == fed
        if tokenizer.bos_token_id is not None:
            assert fed.count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("name", template_names())
def test_every_packaged_template_ends_answers(name: str, byte_tokenizer: Any) -> None:
    tokenizer = copy.deepcopy(byte_tokenizer)
    headers = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": headers})
    template = resolve_template(tokenizer, name)
    token = {"chatml": "<|im_end|>", "llama-3": "<|eot_id|>"}.get(name, "<|endoftext|>")
    trailer = {"chatml": "\n", "zephyr": "\n", "alpaca": "\n\n"}.get(name, "")
    ending = find_ending(tokenizer, template)
    assert ending is not None
    assert (ending.token, ending.trailer) == (token, trailer)
    eos = tokenizer.eos_token_id
    assert stop_ids(tokenizer, template) == list(dict.fromkeys([ending.token_id, eos]))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "llama-2",
            "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nWhy? [/INST] So. </s><s>[INST] And? [/INST]",
        ),
        ("mistral", "<s>[INST] Be brief.\n\nWhy? [/INST]So.</s>[INST] And? [/INST]"),
        (
            "llama-3",
            "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\nSo.<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nAnd?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        (
            "alpaca",
            "<s>Be brief.\n\n### Instruction:\nWhy?\n\n### Response:\nSo.</s>\n\n"
            "### Instruction:\nAnd?\n\n### Response:\n",
        ),
    ],
)
def test_what_named_templates_render(name: str, text: str, mistral_tokenizer: Any) -> None:
    source = (files("tandem.data.tokenize") / "chat_templates" / f"{name}.jinja").read_text()
    turns = [Turn("system", "Be brief."), Turn("user", "Why?")]
    turns += [Turn("assistant", "So."), Turn("user", "And?")]
    template = ChatTemplate(name, source)
    assert render(mistral_tokenizer, template, turns, prompt=True) == text
    without = render(mistral_tokenizer, template, turns[1:2], prompt=True)
    assert "Be brief." not in without
    assert "<<SYS>>" not in without
    if name in ("llama-2", "mistral", "alpaca"):
        with pytest.raises(UserError, match=f"{name} knows the roles"):
            render(mistral_tokenizer, template, [Turn("tool", "x")], prompt=True)


def test_headers_that_are_no_tokens_are_refused(mistral_tokenizer: Any) -> None:
    template = resolve_template(mistral_tokenizer, "llama-3")
    with pytest.raises(UserError, match="'llama-3' does not end an answer"):
        ChatTokenizer.of(mistral_tokenizer, template).ending_for("")


def test_a_template_file(mistral_tokenizer: Any, tmp_path: Path) -> None:
    file = tmp_path / "mine.jinja"
    file.write_text(WITHOUT_BOS)
    template = resolve_template(mistral_tokenizer, str(file))
    assert template.source == WITHOUT_BOS
    (notice,) = template.notices
    assert "renders no BOS token (<s>)" in notice


def test_a_mark_that_an_editor_puts_in_front_of_a_file_is_no_text(
    mistral_tokenizer: Any, tmp_path: Path
) -> None:
    (tmp_path / "mine.jinja").write_text(WITHOUT_BOS, encoding="utf-8-sig")
    template = resolve_template(mistral_tokenizer, str(tmp_path / "mine.jinja"))
    assert template.source == WITHOUT_BOS
    for own in ("\ufeff" + WITHOUT_BOS, {"default": "\ufeff" + WITHOUT_BOS, "rag": "\ufeffx"}):
        mistral_tokenizer.chat_template = own
        template = resolve_template(mistral_tokenizer, None)
        assert template.source == WITHOUT_BOS
        assert "\ufeff" not in str(mistral_tokenizer.chat_template)


def test_a_template_that_draws_is_refused_and_one_with_the_date_is_noticed(
    mistral_tokenizer: Any, tmp_path: Path
) -> None:
    file = tmp_path / "mine.jinja"
    for drawn in ("{{ ['Hi', 'Ho'] | random }}", "{{ lipsum(1) }}"):
        file.write_text("{{ bos_token }}" + drawn + WITHOUT_BOS)
        with pytest.raises(UserError, match=r"differently each time: it uses `(random|lipsum)`"):
            resolve_template(mistral_tokenizer, str(file))
    file.write_text("{{ bos_token + strftime_now('%d') }}{# random #}" + WITHOUT_BOS)
    template = resolve_template(mistral_tokenizer, str(file))
    (notice,) = template.notices
    assert "may write the date: all records of a stage get that of its start" in notice
    assert template.now is not None


def test_unknown_names_and_broken_files_are_errors(mistral_tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"neither a file nor one of.*Did you mean 'neural-chat'"):
        resolve_template(mistral_tokenizer, "neural_chat")
    with pytest.raises(UserError, match=r"one of.*zephyr\. Did you mean 'llama-3'\?"):
        resolve_template(mistral_tokenizer, "LLAMA-3")
    file = tmp_path / "broken.jinja"
    file.write_text("{% for m in messages %}")
    with pytest.raises(UserError, match=r"broken\.jinja', line 1"):
        resolve_template(mistral_tokenizer, str(file))
    file.write_text("{{ bos_token }}" + "{{ bos_token }}" + WITHOUT_BOS)
    with pytest.raises(UserError, match="two BOS tokens"):
        resolve_template(mistral_tokenizer, str(file))
    file.write_text("{{ bos_token }}{{ messages[0].content }}")
    with pytest.raises(UserError, match="leaves out the assistant's text"):
        resolve_template(mistral_tokenizer, str(file))
    file.write_bytes(WITHOUT_BOS.encode("utf-16"))
    with pytest.raises(UserError, match=r"broken\.jinja cannot be read: .*Save it as UTF-8"):
        resolve_template(mistral_tokenizer, str(file))


def test_answers_that_would_never_stop_are_noticed_and_refused_in_training(
    mistral_tokenizer: Any,
) -> None:
    # Mistral's tokenizer has no <|im_end|>: it would be spelt out in several tokens.
    template = resolve_template(mistral_tokenizer, "chatml")
    assert any("never stop" in notice for notice in template.notices)
    with pytest.raises(UserError, match=r"'chatml' does not end an answer.*never stop"):
        ChatTokenizer.of(mistral_tokenizer, template).ending_for("")
    assert stop_ids(mistral_tokenizer, template) == [mistral_tokenizer.eos_token_id]


def test_a_template_that_refuses_turns_is_quoted(mistral_tokenizer: Any, tmp_path: Path) -> None:
    file = tmp_path / "strict.jinja"
    file.write_text(
        "{{ bos_token }}{% if messages[0].role == 'system' %}"
        "{{ raise_exception('no system role here') }}{% endif %}" + WITHOUT_BOS
    )
    template = resolve_template(mistral_tokenizer, str(file))
    with pytest.raises(UserError, match=r"\(system user\): no system role here"):
        render(mistral_tokenizer, template, TURNS[:2], prompt=True)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("{{ ''.__class__.__mro__ }}", "__class__"),
        ("{{ cycler.__init__.__globals__.os }}", "__init__"),
        ("{{ messages.append(1) }}", "append"),
        ("{{ messages[0].update({'content': 'x'}) }}", "update"),
        ("{{ raise_exception('not these turns') }}", "not these turns"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{% for i in range(10 ** 9) %}x{% endfor %}", "Range too big"),
        ("{% include 'secret' %}", "no loader"),
        ("fine\n{% for m in messages %}{{ m.content }", "line 2"),
    ],
)
def test_a_file_that_reaches_out_of_the_sandbox_is_named(
    source: str, said: str, tmp_path: Path, stories_tokenizer: Any
) -> None:
    path = tmp_path / "mine.jinja"
    path.write_text(source)
    with pytest.raises(UserError) as raised:
        resolve_template(stories_tokenizer, str(path))
    assert said in str(raised.value)
    assert "mine.jinja" in str(raised.value)


def test_what_a_template_writes_and_the_tokenizer_lacks_can_be_added(
    stories_tokenizer: Any,
) -> None:
    tokenizer = copy.deepcopy(stories_tokenizer)
    template = resolve_template(tokenizer, "chatml")
    assert missing_tokens(tokenizer, template) == ["<|im_start|>", "<|im_end|>"]
    added = add_tokens(tokenizer, ["<|im_start|>", "<|im_end|>", "</s>"])
    assert added == AddedTokens({"<|im_start|>": 512, "<|im_end|>": 513}, {"</s>": 2})
    assert added.ids == (2, 512, 513)
    assert missing_tokens(tokenizer, template) == []
    assert ChatTokenizer.of(tokenizer, template).ending.token == "<|im_end|>"
    assert tokenizer.encode("a<|im_end|>", add_special_tokens=False)[-1] == 513
    assert add_tokens(tokenizer, ["<|im_end|>"]) == AddedTokens({}, {"<|im_end|>": 513})
    with pytest.raises(UserError, match="blank at its edge"):
        add_tokens(tokenizer, [" <x>"])
