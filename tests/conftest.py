"""Fixtures that several test folders share: real data, and tokenizers of every family."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .warm.templates import compile_once

compile_once()
gc.disable()  # until all is collected: the imports leave much that lives, and hardly any garbage
# Devices that tests only pretend are there must not reach DeepSpeed in the processes they start.
os.environ["DS_ACCELERATOR"] = "cpu"
# torch asks for the name of each address that it connects to. Where a name server does not answer,
# a process would wait five seconds for it, twice.
os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:1")

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"
LONGEST = (
    "invariants/test_engines.py",
    "invariants/test_schedules.py",
    "invariants/test_methods.py",
    "recipe/test_shipped_recipes.py",
    "peers/test_dpo.py",
    "pipeline/test_sweep.py",
    "pipeline/test_rounds.py",
    "faults/test_hub.py",
    "stages/test_padded_models.py",
    "pipeline/test_interruptions.py",
    "packaging/test_wheel.py",
    "notebooks/test_tutorial.py",
    "evaluate/test_leaderboard.py",
    "hpu/test_stub.py",
    "pipeline/test_real_data.py",
    "pairs/test_kills.py",
    "cli/test_launchers.py",
    "stages/test_watched_processes.py",
    "benchmarks/test_gpu.py",
    "benchmarks/test_training.py",
    "data/test_bound.py",
    "data/test_pool.py",
)


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Names bytes by their argument, so that no test's name holds a time or a version of a packer.

    Every worker collects the tests for itself, and a run stops where their names differ.
    """
    return argname if isinstance(val, bytes) else None


def real_data() -> Path:
    """The folder of real third-party data beside the repository.

    Without it a test is skipped; where `CI` is set it fails: what checks every change must not lose
    tests in silence.
    """
    if SHARED.is_dir():
        return SHARED
    if os.environ.get("CI"):
        pytest.fail("CI is set, and the real data of ../shared/data is not here", pytrace=False)
    pytest.skip("the real data of ../shared/data is not here")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the longest files first: a worker that began one of them last would end alone."""
    place = {ROOT / "tests" / name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path, len(place)))


def pytest_collection_finish() -> None:
    """Leaves imported modules out of garbage collections, which otherwise take half a second each.

    Tests of running out of memory collect several times. By itself Python collects after so many
    new objects that each layer of a model would have several collections.
    """
    gc.freeze()
    gc.set_threshold(20_000, 50, 50)
    gc.enable()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real third-party data beside the repository."""
    return real_data()


@pytest.fixture(scope="session")
def some_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real data, or a small sample that is made here, for tests that need any of its kind.

    It has `models/stories260K`, `conversations/slimorca_format.jsonl`,
    `pairs/orca_dpo_pairs.jsonl` and `pairs/mixed_pairs.jsonl`.
    """
    if SHARED.is_dir() or os.environ.get("CI"):
        return real_data()
    from .made_sample import write_sample

    return write_sample(tmp_path_factory.mktemp("sample"))


@pytest.fixture(scope="session")
def some_model(some_data: Path) -> Path:
    """A pretrained model with its tokenizer: stories260K, or else the demo's base model."""
    return some_data / "models" / "stories260K"


@pytest.fixture(scope="session")
def stories_path(shared_data: Path) -> Path:
    """A real pretrained Llama of 260k parameters with its SentencePiece tokenizer."""
    return shared_data / "models" / "stories260K"


def _load(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)


@pytest.fixture(scope="session")
def _mistral(shared_data: Path) -> Any:
    return _load(shared_data / "tokenizers" / "mistral_v1_32000")


@pytest.fixture(scope="session")
def _stories(stories_path: Path) -> Any:
    return _load(stories_path)


@pytest.fixture
def mistral_tokenizer(_mistral: Any) -> Iterator[Any]:
    """The real Mistral-7B-v0.1 tokenizer (SentencePiece, prefix space), without a template."""
    _mistral.chat_template = None
    yield _mistral
    _mistral.chat_template = None


@pytest.fixture
def stories_tokenizer(_stories: Any) -> Iterator[Any]:
    """The tokenizer of stories260K (SentencePiece, 512 tokens), without a template."""
    _stories.chat_template = None
    yield _stories
    _stories.chat_template = None


@pytest.fixture
def byte_tokenizer() -> Any:
    """A byte-level BPE as GPT-2's and Qwen's, trained here, that merges runs of line breaks.

    It has <|im_start|> and <|im_end|> as added tokens, <|endoftext|> as EOS and no BOS.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Tokenizer(models.BPE())
    # Qwen's treatment of line breaks: a run of them is one piece, which BPE may merge.
    pieces = Regex(r"\s*[\r\n]+| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pieces, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    corpus = ["Hello there\n\nassistant\nuser\n\n\nWhat is two and two? It is four.\n\n"] * 50
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")
