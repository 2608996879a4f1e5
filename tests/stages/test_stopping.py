"""What a training and a merge leave behind stops where the chat template ends an answer."""

from __future__ import annotations

import shutil
from importlib.resources import files
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from tandem.stages.merge import run_merge
from tandem.storage.atomic_files import read_json
from tests.jobs import merge_job

from .made_inputs import make_model_folder
from .test_training_stages import run


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base that knows ChatML's tokens and has its template; it ends at </s>, id 1."""
    folder = make_model_folder(tmp_path_factory.mktemp("base") / "models" / "tiny")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    tokenizer.save_pretrained(str(folder))
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(1)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.save_pretrained(str(folder))
    template = files("tandem.data") / "tokenize" / "chat_templates" / "chatml.jinja"
    (folder / "chat_template.jinja").write_text(template.read_text())
    return folder


@pytest.fixture(scope="module")
def made(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run's four folders, and what the console said; trained from a relative path."""
    home, heard = base.parent.parent, StringIO()
    console = Console(file=heard, width=1000)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        patch.setenv("XDG_CACHE_HOME", str(home / "cache"))
        sft, dpo = home / "1-sft", home / "4-dpo"
        steps = {"max_steps": 1, "batch_size": 4, "max_length": 200}
        run("sft", Path("models/tiny"), sft, console=console, **steps)
        middle = run_merge(merge_job(base, sft, home / "2-merged"), console)
        run("dpo", middle, dpo, console=console, **steps)
        run_merge(merge_job(middle, dpo, home / "5-final"), console)
    return home, heard.getvalue()


@pytest.mark.parametrize("name", ["1-sft", "2-merged", "4-dpo", "5-final"])
def test_every_folder_of_a_run_says_where_an_answer_ends(made: tuple[Path, str], name: str) -> None:
    folder = made[0] / name
    tokenizer = AutoTokenizer.from_pretrained(folder)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", end)
    if name in ("4-dpo",):  # its base says all
        assert not (folder / "generation_config.json").exists()
        return
    assert GenerationConfig.from_pretrained(folder).eos_token_id == [1, end]
    if (folder / "config.json").exists():
        assert read_json(folder / "config.json")["eos_token_id"] == end


@pytest.mark.parametrize("name", ["2-merged", "5-final"])
@pytest.mark.parametrize("token", ["<|im_end|>", "</s>"])
def test_plain_transformers_stops_at_the_end_token_and_at_the_old_one(
    made: tuple[Path, str], name: str, token: str
) -> None:
    from transformers import LogitsProcessorList

    folder = made[0] / name
    tokenizer = AutoTokenizer.from_pretrained(folder)
    end = tokenizer.convert_tokens_to_ids(token)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "say red"}], add_generation_prompt=True, return_tensors="pt",
        return_dict=True,
    )  # fmt: skip
    length = ids["input_ids"].shape[1]

    def third(so_far: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """The token comes third; before it comes another one."""
        chosen = torch.full_like(logits, -1e9)
        chosen[:, end if so_far.shape[1] == length + 2 else 5] = 0.0
        return chosen

    output = AutoModelForCausalLM.from_pretrained(folder).generate(
        **ids, max_new_tokens=20, do_sample=False, logits_processor=LogitsProcessorList([third]),
        pad_token_id=0,
    )  # fmt: skip
    assert output[0, length:].tolist() == [5, 5, end]


def test_a_line_says_what_was_set_and_only_where_something_was(made: tuple[Path, str]) -> None:
    lines = [line for line in made[1].splitlines() if "answers end with" in line]
    assert [line.split(":")[0].split()[-1] for line in lines] == ["sft", "merge"]
    assert "generation stops at 1, " in lines[0]
    assert "it is eos_token of the tokenizer as well" in lines[0]
    assert "it is eos_token of config.json as well" in lines[1]


def test_an_adapter_of_a_relative_base_is_found_from_another_folder(
    made: tuple[Path, str], base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tandem.evaluate.eval_model import find_eval_model
    from tandem.model.load_model import load_for_inference

    monkeypatch.chdir(tmp_path)
    shutil.copytree(made[0] / "2-merged", tmp_path / "models" / "tiny")  # of the same name
    sft = made[0] / "1-sft"
    assert read_json(sft / "adapter_config.json")["base_model_name_or_path"] == str(base)
    assert find_eval_model("it", str(sft)).folder == base
    model, _ = load_for_inference(str(sft), "cpu")
    own = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    name = "layers.0.mlp.up_proj.base_layer.weight"
    found = model.get_base_model().model.get_parameter(name)
    assert torch.equal(found, own.model.layers[0].mlp.up_proj.weight)
