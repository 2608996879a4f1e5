"""`tandem plan` as a user runs it: shipped recipes, what is missing, what is wrong."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tandem.cli.main import main
from tandem.plan import rate
from tandem.storage.atomic_files import read_json

from ..stages.made_inputs import make_conversations, make_model_folder, make_pairs
from ..warm.python import python

TIMED_PRODUCT = rate.timed_product


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing is timed, which takes a third of a second: one test asks for the real one."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(rate, "timed_product", lambda *_: 1e10)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def mistral_folder(shared_data: Path, tmp_path: Path) -> Path:
    """Mistral-7B's configuration with its real tokenizer, and no weights."""
    from transformers import MistralConfig

    folder = tmp_path / "mistral"
    shutil.copytree(shared_data / "tokenizers" / "mistral_v1_32000", folder)
    MistralConfig(dtype="bfloat16").save_pretrained(folder)
    return folder


def _plan(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    assert main(["plan", *words, "--json"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def test_the_demo_is_planned_without_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = _plan(capsys, "demo", "device=cpu")
    sft, dpo = made["training"]
    assert made["stages"] == ["sft", "sft-merge", "pairs", "dpo", "dpo-merge", "evaluate"]
    assert sft["records"] == {
        "read": 660, "trained": 660, "truncated": 0, "dropped": 0, "reasons": {},
        "formats": sft["records"]["formats"], "unread_keys": {},
    }  # fmt: skip
    assert sft["work"]["steps"] == 3 * -(-660 // 32)
    assert (sft["work"]["shared_tokens"], sft["operations"]["reference_share"]) == (0, 0)
    assert dpo["notes"][0] == "the pairs are not made yet"
    assert "tandem run --until pairs" in dpo["notes"][1]
    assert "work" not in dpo
    assert sft["notes"] == []
    assert sft["rate"]["last_run"] is None
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]
    guessed = ["--records=500", "--tokens-per-record=77"]
    _, dpo = _plan(capsys, "demo", "device=cpu", *guessed)["training"]
    assert dpo["work"]["records"] == 500
    assert "guessed: 500 records of 77 tokens" in dpo["notes"][1]
    assert 0 < dpo["operations"]["reference_share"] < 1


def test_the_seed_recipe_without_its_data(
    mistral_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["neural-chat-7b-v3-1", f"model={mistral_folder}", "device=cpu"]
    made = _plan(capsys, *words)
    for stage, data in zip(
        made["training"], ("Open-Orca/SlimOrca", "Intel/orca_dpo_pairs"), strict=True
    ):
        assert stage["notes"][0] == f"{data}: on the Hub, and not read"
        assert "--records N --tokens-per-record M" in stage["notes"][1]
        assert stage["model"]["parameters"] == 7_241_732_096
        assert "work" not in stage
    given = ["--records", "517982,12859", "--tokens-per-record=400,600", "--nproc=8"]
    sft, dpo = _plan(capsys, *words, *given)["training"]
    assert sft["work"]["steps"] == 2 * -(-517982 // 64)
    assert (dpo["work"]["steps"], dpo["work"]["tokens"]) == (1000, 1000 * 64 * 600 - 4 * 5 * 600)
    assert "12,859 records of 600 tokens" in dpo["notes"][1]
    assert "a timed matrix product" in sft["rate"]["from"]
    weights = {engine: memory["weights"] for engine, memory in sft["memory"].items()}
    assert weights["ddp"] == weights["deepspeed-zero2"] == 2 * 7_241_732_096
    assert weights["deepspeed-zero3"] == weights["fsdp2"] < weights["ddp"] / 4


@pytest.mark.parametrize("tokens", [2, 3, 200])
def test_records_of_any_length_that_training_takes_can_be_guessed(
    tokens: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And no other stage's limit is asked, whose data is here."""
    model, pairs = make_model_folder(tmp_path / "model"), make_pairs(tmp_path / "p.jsonl")
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"name: r\nmodel: {model}\noutput_dir: out\ndevice: cpu\n"
        "sft: {data: someone/else, max_length: 200}\n"
        f"dpo: {{data: {pairs}, max_length: 128}}\n"
    )
    words = [str(recipe), "--records=9", f"--tokens-per-record={tokens}"]
    sft, dpo = _plan(capsys, *words)["training"]
    assert (sft["work"]["records"], sft["work"]["longest"]) == (9, tokens)
    assert "a timed matrix product" in sft["rate"]["from"]
    assert dpo["records"]["read"] > 9


def test_a_plan_and_the_run_after_it_say_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And the plan after that knows how far off this one was."""
    model, data = make_model_folder(tmp_path / "model"), make_pairs(tmp_path / "pairs.jsonl")
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"name: r\nmodel: {model}\noutput_dir: out\ndevice: cpu\n"
        f"dpo:\n  data: {data}\n  batch_size: 5\n  max_steps: 7\n  max_length: 128\n"
    )
    (before,) = _plan(capsys, str(recipe))["training"]
    assert main(["run", str(recipe), "--until", "dpo"]) == 0
    summary = read_json(Path("out/4-dpo/summary.json"))
    for name in ("steps", "tokens", "examples", "padded_tokens", "shared_tokens", "micro_batches"):
        assert before["work"][name] == summary[name]
    assert before["records"] == summary["ledger"]
    assert before["disk"]["adapter"] == before["model"]["trained"] * 4
    file = Path("out/4-dpo/adapter_model.safetensors").stat().st_size
    assert before["disk"]["adapter"] == pytest.approx(file, rel=0.15)  # a header comes with it
    kept = len(list(Path("out/4-dpo/checkpoints").iterdir()))
    assert before["disk"]["kept"] == kept
    capsys.readouterr()

    (after,) = _plan(capsys, str(recipe))["training"]
    last = after["rate"]["last_run"]
    assert last["actual_by_estimate"].keys() == {"tokens", "steps", "memory"}
    assert (last["setting"]["stage"], last["setting"]["device"]) == ("dpo", "cpu")
    compared = summary["estimate"]
    # A run times nothing by itself, so the first one does not know its seconds.
    assert compared["rate_from"] is compared["seconds"]["estimated"] is None
    assert "seconds" not in last["actual_by_estimate"]
    for name, ratio in last["actual_by_estimate"].items():
        assert ratio == pytest.approx(compared[name]["actual"] / compared[name]["estimated"])
    # What took that long is expected to take as long again.
    assert after["seconds"] == pytest.approx(summary["train_seconds"])
    assert after["reference_seconds"] == pytest.approx(summary["reference_seconds"])
    assert main(["plan", str(recipe)]) == 0
    shown = capsys.readouterr().out
    assert f"actual by estimate: memory {last['actual_by_estimate']['memory']:.2f}x" in shown
    assert "\x1b" not in shown


def test_added_tokens_are_planned_as_they_are_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By SFT, with the adapter; DPO after it has them in its base."""
    from safetensors import safe_open

    model = make_model_folder(tmp_path / "model")
    data, pairs = make_conversations(tmp_path / "c.jsonl"), make_pairs(tmp_path / "p.jsonl")
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"name: r\nmodel: {model}\noutput_dir: out\ndevice: cpu\nchat_template: chatml\n"
        "added_tokens: ['<|im_start|>', '<|im_end|>', '</s>']\n"
        f"sft:\n  data: {data}\n  max_length: 128\n  max_steps: 1\n"
        f"dpo:\n  data: {pairs}\n  max_length: 128\n  max_steps: 1\n"
    )
    planned = _plan(capsys, str(recipe))["training"]
    assert main(["run", str(recipe), "--until", "dpo"]) == 0
    lines = (tmp_path / "cache" / "tandem" / "estimates.jsonl").read_text().splitlines()
    for stage, folder, line in zip(planned, ("1-sft", "4-dpo"), lines, strict=True):
        assert stage["model"]["parameters"] == json.loads(line)["setting"]["size"]
        with safe_open(Path("out", folder, "adapter_model.safetensors"), "np") as file:
            trained = sum(file.get_tensor(key).size for key in file.keys())  # noqa: SIM118
        assert stage["model"]["trained"] == trained
    sft, dpo = planned
    assert sft["model"]["trained"] == dpo["model"]["trained"] + 3 * 2 * 32
    capsys.readouterr()

    for engine in ("fsdp2", "deepspeed-zero3"):
        assert main(["plan", str(recipe), f"engine={engine}", "--nproc=2"]) == 2
        assert f"added_tokens: the engine {engine} spreads" in capsys.readouterr().err
    (spread,) = _plan(capsys, str(recipe), "engine=fsdp2", "--nproc=2", "sft=null",
                      "chat_template=neural-chat", "added_tokens=[]")["training"]  # fmt: skip
    assert spread["engine"] == "fsdp2"


def test_tables_say_what_json_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With this processor's own rate."""
    monkeypatch.setattr(rate, "timed_product", TIMED_PRODUCT)
    model = make_model_folder(tmp_path / "model")
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"name: r\nmodel: {model}\noutput_dir: out\ndevice: cpu\ntokens_per_microbatch: 100\n"
        f"sft:\n  data: {make_conversations(tmp_path / 'c.jsonl')}\n  max_length: 128\n"
    )
    words = [str(recipe), "--nproc=2", "sft.batch_size=6"]
    (found,) = _plan(capsys, *words)["training"]
    assert main(["plan", *words]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    work = found["work"]
    assert "planned for cpu, float32, 2 processes; nothing was trained" in shown
    assert "24 read, 24 trained, 1 of them truncated, 0 dropped" in shown
    assert f"steps {work['steps']}, {work['examples']} examples" in shown
    assert f"{work['tokens']:,} fed, {work['tokens_per_epoch']:,} an epoch" in shown
    assert f"{work['micro_batches']} of 100 tokens at most" in shown
    assert "the busiest of 2 processes" in shown
    for engine in ("ddp", "deepspeed-zero2", "deepspeed-zero3", "fsdp2"):
        assert engine in shown
    assert "from a timed matrix product" in shown


def test_a_folder_without_weights_is_enough_and_no_more_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_model_folder(tmp_path / "model")
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"name: r\nmodel: {model}\noutput_dir: out\ndevice: cpu\n"
        f"sft:\n  data: {make_conversations(tmp_path / 'c.jsonl')}\n  max_length: 128\n"
    )
    whole = _plan(capsys, str(recipe))["training"][0]
    for file in model.glob("*.safetensors"):
        file.unlink()
    bare = _plan(capsys, str(recipe))["training"][0]
    assert (bare["model"], bare["work"]) == (whole["model"], whole["work"])
    (model / "config.json").unlink()
    assert main(["plan", str(recipe)]) == 2
    assert "it has no config.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["dema"], "no recipe of that name"),
        (["demo", "--nproc=0"], "argument --nproc: 0 is not above 0"),
        (["demo", "--nproc=x"], "argument --nproc: 'x' is not a whole number"),
        (["demo", "--records=3"], "--records and --tokens-per-record go together"),
        (["demo", "--records=3,4", "--tokens-per-record=9"], "with as many numbers"),
        (["demo", "--records=3,0", "--tokens-per-record=9,9"], "--records: 0 is not above 0"),
        (
            ["demo", "--records=many", "--tokens-per-record=9"],
            "argument --records: 'many' is not a whole number",
        ),
        (
            ["demo", "--records=9", "--tokens-per-record=9,"],
            "argument --tokens-per-record: '' is not a whole number",
        ),
        (["demo", "--recods=3"], "did you mean --records?"),
        (
            [
                "demo",
                "pairs=null",
                "dpo=null",
                "evaluate=null",
                "--records=500",
                "--tokens-per-record=77",
            ],
            "that of sft is; leave them out",
        ),
        (
            ["neural-chat-7b-v3-1", "--records=5,6,7", "--tokens-per-record=7,8,9"],
            "--records has 3 numbers, one for each of sft, dpo or one for all, and after dpo",
        ),
        (
            ["demo", "--records=5,6,7", "--tokens-per-record=7,8,9"],
            "after dpo no data is missing; leave the last 1 out",
        ),
        (
            [
                "demo",
                "sft.data=someone/else",
                "sft.max_length=256",
                "--records=9",
                "--tokens-per-record=257",
            ],
            "--tokens-per-record 257 is above sft.max_length 256",
        ),
        (
            [
                "neural-chat-7b-v3-1",
                "dpo.max_length=300",
                "dpo.max_prompt_length=100",
                "--records=5",
                "--tokens-per-record=301",
            ],
            "--tokens-per-record 301 is above dpo.max_length 300",
        ),
        (
            ["demo", "sft.data=someone/else", "--records=9", "--tokens-per-record=1"],
            "--tokens-per-record 1 leaves none to train",
        ),
        (["demo", "output_dir=~nobody-here/x"], "output_dir"),
        (["demo", "sft.data=nowhere.jsonl"], "there is no file or folder nowhere.jsonl"),
        (["demo", "model=./nowhere"], "model folder ./nowhere does not exist"),
        (["demo", "sft.max_length=100000"], "max_length 100000 exceeds the context"),
        (["demo", "sft.lora.target_modules=[q]"], "'q' fits no module"),
        (["demo", "dpo.optimizer=muon", "engine=fsdp2"], "optimizer: muon cannot work on shards"),
    ],
)
def test_mistakes_are_said_and_exit_with_two(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *words]) == 2
    assert said in capsys.readouterr().err


def test_an_optimizer_of_a_later_stage_is_refused_before_the_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = ["dpo.optimizer=adafactor", "engine=deepspeed-zero2", f"output_dir={out}"]
    assert main(["run", "demo", *words]) == 2
    assert "optimizer: adafactor cannot work on pieces" in capsys.readouterr().err
    assert not list(out.glob("*-sft"))


def test_engines_that_an_optimizer_cannot_work_in_are_not_planned(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """And what it keeps is counted: half of AdamW's under Lion."""
    plain, lion, muon = (
        _plan(capsys, "demo", "device=cpu", "--nproc=2", *more)["training"][0]["memory"]
        for more in ([], ["sft.optimizer=lion"], ["sft.optimizer=muon"])
    )
    assert plain.keys() == lion.keys() == {"ddp", "deepspeed-zero2", "deepspeed-zero3", "fsdp2"}
    assert muon.keys() == {"ddp"}
    for engine in plain:
        assert lion[engine]["optimizer"] * 2 == plain[engine]["optimizer"]


def test_no_data_of_the_hub_is_read_unasked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither to train on nor held out."""
    import datasets

    asked: list[str] = []

    def load(path: str, *_: Any, **__: Any) -> Any:
        asked.append(path)
        if path == "someone/held-out":
            turns = [{"from": "human", "value": "say sun"}, {"from": "gpt", "value": "sun moon"}]
            return datasets.Dataset.from_list([{"conversations": turns}] * 3)
        return datasets.Dataset.from_list([{"question": "say one 1"}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    model = make_model_folder(tmp_path / "model")
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"name: r\nmodel: {model}\noutput_dir: out\ndevice: cpu\n"
        f"sft:\n  data: {make_conversations(tmp_path / 'c.jsonl')}\n  max_length: 128\n"
        "  batch_size: 8\n  logging_steps: 1\n"
        "  validation: {data: someone/held-out}\n  keep: best\n"
        f"pairs:\n  prompts: {make_conversations(tmp_path / 'p.jsonl')}\n"
        "  select: {decontaminate: someone/questions}\n"
        "dpo:\n  max_length: 128\n"
    )
    sft, dpo = _plan(capsys, str(recipe))["training"]
    assert asked == []
    assert sft["notes"] == [
        "someone/held-out: on the Hub, and not read, so nothing is said of the held-out records"
    ]
    assert dpo["notes"][0] == "the pairs are not made yet"
    assert sft["work"]["records"] == 24
    sft, _ = _plan(capsys, str(recipe), "--download")["training"]
    assert set(asked) == {"someone/held-out"}
    assert sft["notes"] == []


def test_data_that_a_step_repeats_is_planned(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, data = make_model_folder(tmp_path / "model"), make_conversations(tmp_path / "c.jsonl")
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"name: r\nmodel: {model}\noutput_dir: out\ndevice: cpu\n"
        f"sft:\n  data: [{{path: {data}, weight: 3}}]\n  max_length: 128\n  epochs: 1\n"
    )
    (sft,) = _plan(capsys, str(recipe))["training"]
    assert sft["work"]["examples"] == 3 * sft["work"]["records"]
    assert "a timed matrix product" in sft["rate"]["from"]


def test_the_rate_of_a_model_of_another_size_is_not_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_model_folder(tmp_path / "model")
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"name: r\nmodel: {model}\noutput_dir: out\ndevice: cpu\n"
        f"sft:\n  data: {make_conversations(tmp_path / 'c.jsonl')}\n  max_length: 128\n"
    )
    far_off = rate.RateKey("sft", "cpu", "float32", 7_241_732_096, 1, "single")
    actual = dict.fromkeys(rate.FIGURES, 50_000.0)
    rate.remember(rate.Measured(far_off, 1e18, actual, actual))
    (sft,) = _plan(capsys, str(recipe))["training"]
    assert "a timed matrix product" in sft["rate"]["from"]
    assert sft["rate"]["last_run"] is None


def test_data_that_training_would_refuse_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = make_conversations(tmp_path / "c.jsonl")
    with data.open("a") as file:
        file.write('{"conversations": []}\n' * 4)
    assert main(["plan", "demo", f"sft.data={data}"]) == 2
    assert "4 of 28 records would be dropped" in capsys.readouterr().err
    assert main(["plan", "demo", f"sft.data={data}", "sft.max_dropped=0.5"]) == 0
    assert "28 read, 24 trained" in capsys.readouterr().out


def test_memory_is_within_a_factor_of_two_of_what_a_run_held(
    stories_path: Path, shared_data: Path, tmp_path: Path
) -> None:
    """In a process of its own, with a model whose activations outweigh its weights."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    model = tmp_path / "model"
    shutil.copytree(stories_path, model)
    config = LlamaConfig(
        vocab_size=read_json(model / "config.json")["vocab_size"], hidden_size=256,
        intermediate_size=768, num_hidden_layers=6,
        num_attention_heads=4, max_position_embeddings=2048,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(model)
    data = tmp_path / "data.jsonl"
    with (shared_data / "conversations" / "slimorca_format.jsonl").open() as lines:
        data.write_text("".join(line for line, _ in zip(lines, range(2), strict=False)))
    words = [
        "sft", "--model_name_or_path", str(model), "--dataset_name", str(data), "--output_dir",
        str(tmp_path / "out"), "--batch_size", "2", "--max_steps", "1", "--warmup_steps", "0",
        "--max_length", "1200", "--max_prompt_length", "600",
    ]  # fmt: skip
    done = subprocess.run(
        [python(), "-m", "tandem", *words],
        env=os.environ, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    memory = read_json(tmp_path / "out" / "summary.json")["estimate"]["memory"]
    assert memory["estimated"] / 2 < memory["actual"] < memory["estimated"] * 2
    assert memory["estimated"] > 700 * 2**20  # of which the process itself is about half


def test_a_plan_says_what_settings_will_not_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_model_folder(tmp_path / "model")
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"name: r\nmodel: {model}\noutput_dir: out\ndevice: cpu\n"
        f"sft:\n  data: {make_conversations(tmp_path / 'c.jsonl')}\n  max_length: 128\n"
        "  batch_size: 64\n  warmup_steps: 10\n"
    )
    (found,) = _plan(capsys, str(recipe))["training"]
    notes = " ".join(found["notes"])
    assert "batch_size 64 is more than the 24 records" in notes
    assert "warmup_steps 10: the warm-up of 10 is as long as the run's 1 step" in notes
    assert "logging_steps 10 is more than the run's 1 step" in notes
    # `tandem check` counts the records, too.
    assert main(["check", "--recipe", str(recipe), "--json"]) == 0
    notices = " ".join(json.loads(capsys.readouterr().out)["notices"])
    assert "sft: batch_size 64 is more than the 24 records" in notices
    assert "warmup_steps 10" in notices
