"""The real model, data and tokenizer that the peers are compared on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from tandem.data.tokenize.chat_template import resolve_template

from . import plain


@pytest.fixture(scope="session")
def chat_tokenizer(stories_path: Path) -> Any:
    """The model's tokenizer with our neural-chat template."""
    tokenizer = AutoTokenizer.from_pretrained(stories_path)
    resolve_template(tokenizer, "neural-chat")
    return tokenizer


@pytest.fixture(scope="session")
def real_pairs(shared_data: Path, chat_tokenizer: Any) -> tuple[list[plain.Pair], list[Any]]:
    """Preference pairs that fit the context whole, and their rows."""
    return plain.read_pairs(shared_data / "pairs" / "mixed_pairs.jsonl", chat_tokenizer, 8)


@pytest.fixture(scope="session")
def pairs(real_pairs: tuple[list[plain.Pair], list[Any]]) -> list[plain.Pair]:
    """Real preference pairs as plain token ids."""
    return real_pairs[0]


@pytest.fixture(scope="session")
def pairs_file(real_pairs: tuple[Any, list[Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with exactly the rows of `pairs`."""
    return plain.write_rows(tmp_path_factory.mktemp("data") / "pairs.jsonl", real_pairs[1])


@pytest.fixture(scope="session")
def real_conversations(
    shared_data: Path, chat_tokenizer: Any
) -> tuple[list[plain.Labelled], list[Any]]:
    """Conversations that fit the context whole, some of several exchanges, and their rows."""
    source = shared_data / "conversations" / "slimorca_format.jsonl"
    return plain.read_conversations(source, chat_tokenizer, single=6, multiple=2)


@pytest.fixture(scope="session")
def conversations(
    real_conversations: tuple[list[plain.Labelled], list[Any]],
) -> list[plain.Labelled]:
    """Real conversations as plain token ids."""
    return real_conversations[0]


@pytest.fixture(scope="session")
def conversations_file(
    real_conversations: tuple[Any, list[Any]], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A file with exactly the rows of `conversations`."""
    rows = real_conversations[1]
    return plain.write_rows(tmp_path_factory.mktemp("data") / "conversations.jsonl", rows)


@pytest.fixture(scope="package", autouse=True)
def _one_thread() -> Iterator[None]:
    # The model is so small that threads only wait for each other, above all beside another worker.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _cache_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
