"""The chat with a real tiny model and scripted input."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tandem.chat import session
from tandem.chat.session import ChatOptions, run_chat
from tandem.chat.stream_answer import stream_answer
from tandem.errors import UserError
from tandem.model.generate import Sampling


def script(*lines: str | type[BaseException]) -> Callable[[str], str]:
    """A `read` that gives these lines, then the end of input; an exception type is raised."""
    rest: Iterator[str | type[BaseException]] = iter(lines)

    def read(prompt: str) -> str:
        line = next(rest, EOFError)
        if isinstance(line, str):
            return line
        raise line

    return read


def talk(
    models: list[Path], *lines: str | type[BaseException], terminal: bool = False, **options: Any
) -> str:
    out = io.StringIO()
    console = Console(file=out, width=120, force_terminal=terminal, color_system=None)
    defaults = {"max_new_tokens": 12, "temperature": 0.0, "top_p": 1.0}
    sampling = Sampling(**{key: options.pop(key, value) for key, value in defaults.items()})
    options = {"chat_template": "neural-chat", "seed": 7, **options}
    run_chat([str(m) for m in models], ChatOptions(sampling, **options), console, script(*lines))
    return out.getvalue()


@pytest.fixture
def prompts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The text of every prompt that a model is fed."""
    seen: list[str] = []
    real = session.stream_answer

    def spy(model: Any, tokenizer: Any, prompt: list[int], **rest: Any) -> Any:
        seen.append(tokenizer.decode(prompt))
        return real(model, tokenizer, prompt, **rest)

    monkeypatch.setattr(session, "stream_answer", spy)
    return seen


def test_history_system_and_reset(stories_path: Path, prompts: list[str]) -> None:
    text = talk(
        [stories_path], "Once upon a time", "/system Be brief.", "And then?", "/reset", "Who?",
        "/system", "/help", "/nonsense", "//x", "/quit", "never read",
    )  # fmt: skip
    assert len(prompts) == 4
    assert "### User:\nOnce upon a time</s>" in prompts[0]
    assert "Be brief." not in prompts[0]
    assert prompts[1].startswith("<s> ### System:\nBe brief.</s>")
    assert "Once upon a time" in prompts[1]
    assert prompts[1].endswith("### User:\nAnd then?</s> \n### Assistant:\n")
    assert "Once" not in prompts[2]
    assert "### User:\n/x</s>" in prompts[3]
    assert "System prompt: Be brief." in text
    assert "forget the conversation" in text
    assert "There is no command /nonsense" in text
    assert "(cut after 12 tokens: --max_new_tokens)" in text


DEAF = (
    "{{ bos_token }}{% for m in messages if m.role != 'system' %}{{ m.content }}"
    "{{ eos_token if m.role == 'assistant' }}{% endfor %}"
)
STRICT = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + DEAF


def test_a_system_prompt_that_a_template_does_not_render_is_not_set(
    stories_path: Path, prompts: list[str], tmp_path: Path
) -> None:
    for source, why in ((DEAF, "does not render the system turn"), (STRICT, "no system")):
        (tmp_path / "t.jinja").write_text(source)
        template = str(tmp_path / "t.jinja")
        text = talk([stories_path], "/system Be brief.", "/system", "Hi", chat_template=template)
        assert "The system prompt is not set. stories260K: " in text
        assert why in " ".join(text.split())
        assert "System prompt: (none)" in text
        assert prompts.pop() == "<s> Hi"
        with pytest.raises(UserError, match=rf"--system: stories260K: .*{why}"):
            talk([stories_path], system="Be brief.", chat_template=template)


def test_what_a_template_leaves_out_of_a_longer_conversation_is_said(
    stories_path: Path, tmp_path: Path
) -> None:
    (tmp_path / "t.jinja").write_text(DEAF.replace("in messages", "in messages[-2:]"))
    text = talk([stories_path], "One", "Two", chat_template=str(tmp_path / "t.jinja"))
    assert text.count("not asked all of this: the chat template does not render every user") == 1


def test_answers_are_what_transformers_generates(stories_path: Path, prompts: list[str]) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(stories_path)
    model = AutoModelForCausalLM.from_pretrained(stories_path, dtype=torch.float32)
    from tandem.data.records import Turn
    from tandem.data.tokenize.chat_template import prompt_ids, resolve_template

    template = resolve_template(tokenizer, "neural-chat")
    ids = prompt_ids(tokenizer, template, [Turn("user", "Once upon a time")])
    out = model.generate(
        torch.tensor([ids]),
        max_new_tokens=40,
        do_sample=False,
        attention_mask=torch.ones(1, len(ids)),
    )
    expected = tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True)
    text = talk([stories_path], "Once upon a time", max_new_tokens=40)
    assert expected.strip() in text.replace("\n\n", "\n")


def test_a_seed_repeats_the_sampled_answer(stories_path: Path) -> None:
    options = {"temperature": 1.0, "top_p": 0.9}
    first = talk([stories_path], "Hello", "Hello", **options)
    assert talk([stories_path], "Hello", "Hello", **options) == first
    assert talk([stories_path], "Hello", "Hello", seed=8, **options) != first


@pytest.mark.parametrize("terminal", [True, False])
def test_side_by_side(
    stories_path: Path, tmp_path: Path, prompts: list[str], terminal: bool
) -> None:
    copy = tmp_path / "other" / "copied"
    shutil.copytree(stories_path, copy)
    text = talk([stories_path, copy], "Hi", "Go on", terminal=terminal)
    assert "stories260K" in text
    assert "copied" in text
    assert len(prompts) == 4
    assert prompts[2] == prompts[3]  # the same model has had the same conversation
    assert ("╭" in text) == terminal


def test_overflow_drops_the_oldest_turns_and_says_so(
    stories_path: Path, prompts: list[str]
) -> None:
    long = "a little dog " * 30
    text = talk([stories_path], "FIRST " + long, "SECOND " + long, "THIRD " + long)
    assert "oldest 2 turns no longer fit the context of 512 tokens" in text
    assert "FIRST" not in prompts[-1]
    assert "THIRD" in prompts[-1]
    text = talk([stories_path], "dog " * 600, "Hi")
    assert "Shorten it" in text
    assert "dog dog" not in prompts[-1]


def test_a_large_answer_limit_ends_at_the_context(stories_path: Path) -> None:
    text = talk([stories_path], "dog " * 150, max_new_tokens=10_000)
    assert "Traceback" not in text
    assert "the context is full" in text or "cut" not in text


def test_ctrl_c_interrupts_the_answer_only(
    stories_path: Path, monkeypatch: pytest.MonkeyPatch, prompts: list[str]
) -> None:
    from tandem.chat import stream_answer as generate

    real = generate._TextStream.put
    calls = []

    def put(self: Any, value: Any) -> None:
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        real(self, value)

    monkeypatch.setattr(generate._TextStream, "put", put)
    text = talk([stories_path], "Once upon", KeyboardInterrupt, "Go on")
    assert "(interrupted)" in text
    assert "/quit or Ctrl-D leaves" in text
    assert "### User:\nOnce upon" in prompts[1]  # the part that was seen stays in the history


def test_control_characters_do_not_reach_the_terminal() -> None:
    assert session._visible("a\x1b[31mred\x9b\r\n\tb é") == "a[31mred\n\tb é"


def test_pieces_join_to_the_whole_text(byte_tokenizer: Any) -> None:
    class Echo:
        """A model that says given ids."""

        device = "cpu"
        generation_config = None

        def __init__(self, ids: list[int]) -> None:
            self.ids = ids

        def generate(self, *, input_ids: Any, streamer: Any, **rest: Any) -> None:
            import torch

            streamer.put(input_ids)
            for token in self.ids:
                streamer.put(torch.tensor([token]))
            streamer.end()

    said = "Grüße, 世界 🚲!\n\nHello there"
    ids = byte_tokenizer.encode(said, add_special_tokens=False)
    pieces: list[str] = []
    eos = byte_tokenizer.eos_token_id
    answer = stream_answer(
        Echo([*ids, eos]), byte_tokenizer, [1], stop=[eos],
        sampling=Sampling(99, 0.0, 1.0), seed=None, on_text=pieces.append,
    )  # fmt: skip
    assert "".join(pieces) == said == answer.text
    assert "\ufffd" not in answer.text
    assert (answer.ended, answer.tokens) == ("stop", len(ids))
    assert len(pieces) > 5


def test_no_template_is_an_error_that_helps(stories_path: Path) -> None:
    with pytest.raises(UserError, match=r"--chat_template .*neural-chat"):
        talk([stories_path], "Hi", chat_template=None)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
    ],
)
def test_senseless_options(tmp_path: Path, options: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        talk([tmp_path], **options)
    with pytest.raises(UserError, match="needs a model"):
        talk([])


def test_a_run_folder_means_its_newest_model(stories_path: Path, tmp_path: Path) -> None:
    shutil.copytree(stories_path, tmp_path / "demo" / "2-sft-merged")
    text = talk([tmp_path / "demo"], "Hi")
    assert "is a run; talking to its" in text
    shutil.copytree(stories_path, tmp_path / "demo" / "5-final")
    assert session.model_in_run(str(tmp_path / "demo")).endswith("5-final")
    assert session.model_in_run("some/hub-id") == "some/hub-id"


def test_labels_tell_models_apart() -> None:
    assert session.labels_of(["runs/a/5-final", "runs/b/5-final/"]) == ["a/5-final", "b/5-final"]
    assert session.labels_of(["x", "x"]) == ["x (1)", "x (2)"]


# peft 0.21 still asks transformers 5 under the old name.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_adapter_folder(stories_path: Path, tmp_path: Path) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(stories_path, dtype=torch.float32)
    adapted = get_peft_model(
        model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    )
    adapted.peft_config["default"].base_model_name_or_path = str(stories_path)
    adapted.save_pretrained(tmp_path / "adapter")
    AutoTokenizer.from_pretrained(stories_path).save_pretrained(tmp_path / "adapter")
    plain = talk([stories_path], "Once upon a time", max_new_tokens=30)
    tuned = talk([tmp_path / "adapter"], "Once upon a time", max_new_tokens=30)
    assert plain.splitlines()[1:] != tuned.splitlines()[1:]


def test_a_line_that_is_no_text_is_named_and_the_next_one_is_answered(
    stories_path: Path, prompts: list[str]
) -> None:
    text = talk(
        [stories_path], "caf\udce9", "half \ud800", "/system \udcff", "caf\udcc3\udca9", "nul \0"
    )
    assert "That line was not sent: its byte 4 (0xe9) is not UTF-8" in text
    assert "it has half a character" in text
    assert "its byte 9 (0xff)" in text
    # Bytes of UTF-8 that an input in ASCII did not know are text.
    assert len(prompts) == 2
    assert "caf\u00e9" in prompts[0]


def test_a_system_prompt_that_is_no_text_is_a_mistake(stories_path: Path) -> None:
    with pytest.raises(UserError, match=r"--system: its byte 2 \(0xff\) is not UTF-8"):
        talk([stories_path], "Hi", system="a\udcff")


def test_a_terminal_that_is_gone_ends_the_chat(stories_path: Path) -> None:
    def read(prompt: str) -> str:
        raise OSError(5, "Input/output error")

    console = Console(file=io.StringIO())
    options = ChatOptions(Sampling(4), chat_template="neural-chat")
    with pytest.raises(UserError, match="the input cannot be read: Input/output error"):
        run_chat([str(stories_path)], options, console, read)
