"""What serves a merged folder: `transformers serve` is started; what vLLM reads is looked at."""

from __future__ import annotations

import json
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from tandem.data.records import Turn
from tandem.data.tokenize.chat_template import prompt_ids, resolve_template, stop_ids
from tandem.model.generate import Sampling, generate_answers
from tandem.model.load_model import load_model
from tandem.model.model_folder import load_tokenizer

from ..warm.python import python

# The program `transformers` without its look for a newer version on the network.
_SERVE = "from transformers.cli.transformers import app; app()"
_QUESTION, _TOKENS = "What is the opposite of hot?", 24


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=10):
            return True
    except (urllib.error.URLError, OSError):
        return False


@pytest.fixture
def served(merged: Path) -> Iterator[str]:
    """The address of `transformers serve` on a merged model."""
    port = _free_port()
    address = f"http://127.0.0.1:{port}"
    process = subprocess.Popen(
        [python(), "-c", _SERVE, "serve", str(merged), "--host", "127.0.0.1",
         "--port", str(port), "--device", "cpu", "--dtype", "float32"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        until = time.monotonic() + 150
        while not _answers(f"{address}/health"):
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < until
            time.sleep(0.1)
        yield address
    finally:
        process.terminate()
        process.communicate(timeout=20)


def _asked(address: str, body: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(
        f"{address}/v1/chat/completions",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        found: dict[str, Any] = json.load(response)
        return found


def test_transformers_serve_answers_as_tandem_does(served: str, merged: Path) -> None:
    messages = [{"role": "user", "content": _QUESTION}]
    body = {"model": str(merged), "messages": messages, "max_tokens": _TOKENS, "temperature": 0.0}
    answer = _asked(served, body)
    tokenizer = load_tokenizer(merged)
    template = resolve_template(tokenizer, None)
    prompt = prompt_ids(tokenizer, template, [Turn("user", _QUESTION)])
    ours = generate_answers(
        load_model(merged, dtype=torch.float32),
        [prompt],
        stop_ids=stop_ids(tokenizer, template),
        sampling=Sampling(_TOKENS),
    )[0]
    text = tokenizer.decode(list(ours.ids))
    assert text.strip()
    assert answer["choices"][0]["message"]["content"] == text
    assert answer["usage"]["prompt_tokens"] == len(prompt)


def test_a_merged_folder_has_what_vllm_reads(merged: Path) -> None:
    """Its architecture, safetensors, a fast tokenizer, the template, where answers end."""
    config = AutoConfig.from_pretrained(merged)
    assert config.architectures == ["MistralForCausalLM"]
    assert str(config.dtype) == "torch.bfloat16"
    assert getattr(config, "quantization_config", None) is None
    assert not (merged / "adapter_config.json").exists()
    names = set()
    for file in merged.glob("*.safetensors"):
        with safe_open(file, "pt") as shard:
            assert shard.metadata() == {"format": "pt"}
            names |= set(shard.keys())
    expected = AutoModelForCausalLM.from_pretrained(merged).state_dict().keys()
    assert names in (set(expected), set(expected) - {"lm_head.weight"})
    tokenizer = AutoTokenizer.from_pretrained(merged)
    assert tokenizer.is_fast
    assert len(tokenizer) <= config.vocab_size
    assert (merged / "chat_template.jinja").read_text() == tokenizer.chat_template
    ends = GenerationConfig.from_pretrained(merged).eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    assert set(stop_ids(tokenizer, resolve_template(tokenizer, None))) <= set(ends)
