"""Who writes the answers of the pairs stage: a model in this process, vLLM, or a server."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console

from tandem.data.ledger import Ledger
from tandem.data.tokenize.added_tokens import NoRow, require_rows
from tandem.data.tokenize.chat_template import ChatTemplate, prompt_ids, resolve_template
from tandem.data.tokenize.template_omissions import omissions_of, way_out
from tandem.errors import UserError
from tandem.integrations.chat_server import ChatRequest, ChatServer, Failure, Reply
from tandem.model.added_tokens import described_rows
from tandem.model.companion_files import all_stop_ids
from tandem.model.generate import Answer, Sampling, generate_batch, plan_batches
from tandem.model.load_model import (
    context_length,
    load_config,
    load_model,
    load_tokenizer,
    model_folder,
)
from tandem.pairs.prompts import Prompt
from tandem.recipe.pairs_settings import PairsSettings, ServerSettings
from tandem.recipe.run_settings import Runtime
from tandem.runtime.console import log
from tandem.runtime.device import choose_device
from tandem.runtime.extras import require
from tandem.storage.hashing import hash_json, hash_weights
from tandem.storage.manifest import check_made

# vLLM makes its own batches of what it is given at once; a kill loses at most so many.
_VLLM_PROMPTS = 256

Unit = list[tuple[int, list[Any]]]
"""Answers that are finished together: each one's number, and its text and whether it stopped."""


@dataclass(frozen=True)
class Work:
    """Prompts that can be asked, what their answers depend on, and how to get them.

    Attributes:
        prompts: those that can be asked, in order.
        key: what the answers depend on, as a hash.
        write: from the numbers of answers that are done to the others, unit by unit.
    """

    prompts: list[Prompt]
    key: str
    write: Callable[[Collection[int]], Iterator[Unit]]


class Writer(Protocol):
    """Writes answers. An answer's number is its prompt's place x samples + its draw."""

    facts: dict[str, Any]
    """What the data card says of the writer."""
    failed: dict[int, Failure]
    """Answers that will not come, by number."""

    def plan(self, prompts: Sequence[Prompt], seed: int, ledger: Ledger) -> Work:
        """The work that some prompts are; the ledger has those that cannot be asked."""


def writer_identity(settings: PairsSettings, model: str) -> Any:
    """What the answers depend on: the hash of the weights, or a server's address and model."""
    if settings.server is not None:
        return {"base_url": settings.server.base_url, "model": settings.server.model}
    return hash_weights(model_folder(model))


def open_writer(settings: PairsSettings, model: str, runtime: Runtime, console: Console) -> Writer:
    """The writer that a recipe asks for, its model loaded.

    Raises UserError for a model that cannot be loaded, and where vLLM is not installed.
    """
    if settings.server is not None:
        return ServerWriter(settings, settings.server, console)
    check_made(model_folder(model), lambda text: log(console, f"pairs: {text}", style="yellow"))
    return LocalWriter(settings, model_folder(model), model, runtime, console)


class LocalWriter:
    """A model in this process, through transformers or vLLM."""

    def __init__(
        self, settings: PairsSettings, folder: Path, name: str, runtime: Runtime, console: Console
    ) -> None:
        self._settings, self._console = settings, console
        device = choose_device(runtime.device, runtime.dtype, runtime.hpu)
        self._tokenizer = load_tokenizer(folder)
        self._template: ChatTemplate = resolve_template(self._tokenizer, None)
        self._stops = all_stop_ids(folder, self._tokenizer, self._template)
        self._omissions = omissions_of(self._tokenizer, self._template)
        config = load_config(folder)
        self._context, self._rows = context_length(config), described_rows(config)
        self._model: Any = None
        self._vllm: Any = None
        if settings.vllm is not None:
            from tandem.pairs.vllm_generator import Vllm

            self._vllm = Vllm(
                folder,
                dtype=runtime.dtype,
                tensor_parallel=settings.vllm.tensor_parallel,
                memory=settings.vllm.memory,
            )
        else:
            self._model = load_model(folder, dtype=device.weights, device=device.torch_device)
        self.failed: dict[int, Failure] = {}
        self.facts: dict[str, Any] = {
            "model": name,
            "weights": hash_weights(folder),
            "by": "transformers" if self._vllm is None else "vLLM",
            "dtype": device.dtype_name if self._vllm is None else runtime.dtype,
            "device": device.kind,
            "chat_template": self._template.name,
        }

    def plan(self, prompts: Sequence[Prompt], seed: int, ledger: Ledger) -> Work:
        """Batches, planned for all answers; one that is not all done is done anew.

        Raises UserError when no prompt leaves room for an answer.
        """
        settings = self._settings
        kept, ids = self._fitting(prompts, ledger)
        asked = [one for one in ids for _ in range(settings.samples)]
        sampling = Sampling(
            settings.max_new_tokens, settings.temperature, settings.top_p, settings.top_k, seed
        )
        batches = self._batches(asked)
        by = [self.facts[name] for name in ("weights", "by", "dtype", "device")]
        key = hash_json([*by, asked, batches, self._stops, asdict(sampling)])
        return Work(kept, key, partial(self._write, asked, batches, sampling))

    def _write(
        self,
        asked: Sequence[Sequence[int]],
        batches: Sequence[Sequence[int]],
        sampling: Sampling,
        done: Collection[int],
    ) -> Iterator[Unit]:
        ask: Callable[..., list[Answer]] = (
            partial(generate_batch, self._model) if self._vllm is None else self._vllm.answers
        )
        for members in batches:
            if all(number in done for number in members):
                continue
            answers = ask(
                [asked[i] for i in members], members, stop_ids=self._stops, sampling=sampling
            )
            texts = self._tokenizer.batch_decode(
                [list(answer.ids) for answer in answers], skip_special_tokens=True
            )
            yield [
                (number, [text, answer.stopped])
                for number, text, answer in zip(members, texts, answers, strict=True)
            ]

    def _batches(self, asked: Sequence[Sequence[int]]) -> list[list[int]]:
        if self._vllm is None:
            lengths = [len(ids) for ids in asked]
            return plan_batches(self._model, lengths, self._settings.max_new_tokens)
        numbers = range(len(asked))
        return [list(numbers[i : i + _VLLM_PROMPTS]) for i in numbers[::_VLLM_PROMPTS]]

    def _fitting(
        self, prompts: Sequence[Prompt], ledger: Ledger
    ) -> tuple[list[Prompt], list[list[int]]]:
        """The prompts that leave room for an answer in the model's context, and their tokens."""
        kept, asked, long = [], [], 0
        left_out: Counter[str] = Counter()
        for prompt in prompts:
            if reason := self._omissions.of_prompt(prompt.turns):
                ledger.dropped(prompt.origin, reason, f"chat_template: {self._template.name}")
                left_out[reason] += 1
                continue
            ids = prompt_ids(self._tokenizer, self._template, prompt.turns)
            try:
                require_rows(ids, self._rows, self._tokenizer.decode)
            except NoRow as error:
                raise UserError(f"{prompt.origin}: {error}") from None
            room = self._context is None or (
                len(ids) + self._settings.max_new_tokens <= self._context
            )
            if room:
                kept.append(prompt)
                asked.append(ids)
            else:
                long += 1
                detail = f"{len(ids)} tokens, of a context of {self._context}"
                ledger.dropped(prompt.origin, "no room for an answer of the model's", detail)
        for reason, count in left_out.items():
            log(
                self._console,
                f"pairs: {count} of {len(prompts)} prompts are not asked: {reason} (each in "
                f"{ledger.path})",
            )
        if long:
            log(
                self._console,
                f"pairs: {long} of {len(prompts)} prompts leave no room for "
                f"{self._settings.max_new_tokens} tokens in the model's context of {self._context} "
                f"(each in {ledger.path})",
            )
        if not kept:
            reasons = "".join(f"; {reason}: {count}" for reason, count in left_out.items())
            ways = [way_out(reason) for reason in left_out]
            if long:
                ways.insert(0, "Lower pairs.max_new_tokens or give shorter prompts.")
            raise UserError(
                f"pairs: none of {len(prompts)} prompts can be asked"
                + (f"; without room for an answer: {long}" if long else "")
                + f"{reasons}. {' '.join(ways)}"
            )
        return kept, asked


class ServerWriter:
    """An OpenAI-compatible server. Its answers are not repeatable; those recorded are kept."""

    def __init__(self, settings: PairsSettings, server: ServerSettings, console: Console) -> None:
        self._settings, self._server = settings, server
        self.client = open_server(server, console)
        self.failed: dict[int, Failure] = {}
        self.facts: dict[str, Any] = {
            "model": server.model,
            "by": f"the server at {server.base_url}",
        }

    def plan(self, prompts: Sequence[Prompt], seed: int, ledger: Ledger) -> Work:  # noqa: ARG002
        """Answer by answer, as they arrive. What does not fit, the server refuses one by one."""
        texts = [[prompt.system, prompt.question] for prompt in prompts]
        options, samples = self._options(), self._settings.samples
        key = hash_json([self._server.base_url, self._server.model, texts, options, samples])
        return Work(list(prompts), key, partial(self._write, prompts))

    def _write(self, prompts: Sequence[Prompt], done: Collection[int]) -> Iterator[Unit]:
        count = self._settings.samples
        missing = [number for number in range(len(prompts) * count) if number not in done]
        self.failed.clear()
        requests = (self._request(prompts[number // count]) for number in missing)
        for place, found in self.client.answers(requests):
            if isinstance(found, Reply):
                yield [(missing[place], [found.text, found.stopped])]
            else:
                self.failed[missing[place]] = found
                yield []

    def _request(self, prompt: Prompt) -> ChatRequest:
        messages = [{"role": turn.role, "content": turn.content} for turn in prompt.turns]
        return ChatRequest(tuple(messages), self._options())

    def _options(self) -> dict[str, Any]:
        settings = self._settings
        return {
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            self._server.limit_key: settings.max_new_tokens,
        }


def check_writers(settings: PairsSettings) -> None:
    """Raise UserError for servers whose addresses or keys cannot be used, and for vLLM's absence.

    Nothing is sent, and no model is loaded.
    """
    if settings.vllm is not None:
        require("vllm", "vllm", "pairs.vllm")
    for server in (settings.server, settings.rank.judge if settings.rank else None):
        if server is not None:
            open_server(server, Console(quiet=True))


def open_server(server: ServerSettings, console: Console) -> ChatServer:
    """The client of a recipe's server section; raises UserError when its key is not there."""
    return ChatServer(
        server.base_url,
        server.model,
        key_variable=server.key_variable,
        concurrency=server.concurrency,
        timeout=server.timeout,
        retries=server.retries,
        requests_per_minute=server.requests_per_minute,
        log=lambda text: log(console, text),
    )
