"""Who writes the answers of the pairs stage: a model in this process, vLLM, or a server."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from rich.console import Console

from tandem.data.ledger import Ledger
from tandem.data.sources.rows import is_local
from tandem.data.tokenize.chat_template import prompt_ids, resolve_template
from tandem.data.tokenize.template_omissions import omissions_of, way_out
from tandem.data.tokenize.vocabulary import NoRow, require_rows
from tandem.errors import UserError, require
from tandem.integrations.chat_server import ChatRequest, ChatServer, Failure, Reply, first_answer
from tandem.integrations.choose import device_of
from tandem.model.model_folder import (
    context_length,
    described_rows,
    known_config,
    load_config,
    load_tokenizer,
    model_folder,
)
from tandem.pairs.prompts import Prompt
from tandem.recipe.pairs_settings import PairsSettings, ServerSettings
from tandem.recipe.run_settings import RunSettings
from tandem.runtime.console import log
from tandem.storage.hashing import hash_json, hash_weights
from tandem.storage.manifest import check_made

if TYPE_CHECKING:
    from tandem.model.generate import GeneratedAnswer, Sampling

# vLLM gets so many prompts at once, and batches them itself; a kill loses at most these.
_VLLM_PROMPTS = 256
# Tokens of a server's first answer, of which only its coming counts.
_GREETING_TOKENS = 16

Unit = list[tuple[int, list[Any]]]
"""Answers that are finished together: each one's number, and its text and whether it stopped."""


@dataclass(frozen=True)
class GenerationJob:
    """What is to be generated, and how."""

    prompts: list[Prompt]  # those that can be asked, in order
    key: str  # what the answers depend on, as a hash
    # takes the numbers of answers that are done, and yields the others, unit by unit
    write: Callable[[Collection[int]], Iterator[Unit]]


class PairsModel(Protocol):
    """A model that is asked, in this process or by a server: it writes answers or scores them.

    An answer's number is its prompt's place x samples + its draw.
    """

    facts: dict[str, Any]
    """What the data card says of it; there once it is open."""
    failed: dict[int, Failure]
    """Answers, or scores of answers, that will not come, by number."""

    @property
    def identity(self) -> Any:
        """What its results depend on: a hash of weights, or a server's address and model."""

    def check(self) -> None:
        """Raise UserError for what cannot work; nothing is sent, and no model is loaded."""

    def reach(self) -> None:
        """Send a server one question; UserError unless it answers. Other models need nothing."""

    def open(self, console: Console) -> None:
        """Get ready: load the model, if it is one of this process."""


class Generator(PairsModel, Protocol):
    """Writes answers."""

    def plan(self, prompts: Sequence[Prompt], seed: int, ledger: Ledger) -> GenerationJob:
        """What is to be generated; the ledger gets the prompts that cannot be asked."""


def choose_generator(settings: PairsSettings, model: str | None, runtime: RunSettings) -> Generator:
    """The generator that a recipe asks for; `model` None is one that an earlier stage will make."""
    if settings.server is not None:
        return ServerGenerator(settings, settings.server)
    return LocalGenerator(settings, model, runtime)


def check_local_model(name: str | None) -> None:
    """Raise UserError for a folder that is no model; one on the Hub is looked for when it opens."""
    if name is not None and is_local(name):
        known_config(model_folder(name))


class LocalGenerator:
    """A model in this process, through transformers or vLLM."""

    def __init__(self, settings: PairsSettings, model: str | None, runtime: RunSettings) -> None:
        self._settings, self._name, self._runtime = settings, model, runtime
        self.facts: dict[str, Any] = {}
        self.failed: dict[int, Failure] = {}

    @property
    def identity(self) -> str:
        """The hash of the weights."""
        assert self._name is not None, "an earlier stage has made it"
        return hash_weights(model_folder(self._name))

    def check(self) -> None:
        """Raise UserError for vLLM that is not installed, and for a folder that is no model."""
        if self._settings.vllm is not None:
            require("vllm", "vllm", "pairs.vllm")
        check_local_model(self._name)

    def reach(self) -> None:
        """Nothing is to be reached."""

    def open(self, console: Console) -> None:
        """Load the model; raises UserError for one that cannot be loaded."""
        from tandem.model.companion_files import all_stop_ids
        from tandem.model.load_model import load_model

        assert self._name is not None, "an earlier stage has made it"
        folder, runtime = model_folder(self._name), self._runtime
        check_made(folder, lambda text: log(console, f"pairs: {text}", style="yellow"))
        self._console = console
        device = device_of(runtime)
        self._tokenizer = load_tokenizer(folder)
        self._template = resolve_template(self._tokenizer, None)
        self._stops = all_stop_ids(folder, self._tokenizer, self._template)
        self._omissions = omissions_of(self._tokenizer, self._template)
        config = load_config(folder)
        self._context, self._rows = context_length(config), described_rows(config)
        self._model: Any = None
        self._vllm: Any = None
        if self._settings.vllm is not None:
            from tandem.pairs.vllm_generator import Vllm

            self._vllm = Vllm(folder, runtime.dtype, self._settings.vllm)
        else:
            self._model = load_model(
                folder,
                dtype=device.weights,
                device=device.torch_device,
                log=lambda text: log(console, f"pairs: {text}"),
            )
        self.facts = {
            "model": self._name,
            "weights": hash_weights(folder),
            "by": "transformers" if self._vllm is None else "vLLM",
            "dtype": device.dtype_name if self._vllm is None else runtime.dtype,
            "device": device.kind,
            "chat_template": self._template.name,
        }

    def plan(self, prompts: Sequence[Prompt], seed: int, ledger: Ledger) -> GenerationJob:
        """Plan batches; an unfinished one is generated anew. UserError when no prompt fits."""
        from tandem.model.generate import Sampling

        settings = self._settings
        kept, ids = self._fitting(prompts, ledger)
        asked = [one for one in ids for _ in range(settings.samples)]
        sampling = Sampling(
            settings.max_new_tokens, settings.temperature, settings.top_p, settings.top_k, seed
        )
        batches = self._batches(asked)
        by = [self.facts[name] for name in ("weights", "by", "dtype", "device")]
        key = hash_json([*by, asked, batches, self._stops, asdict(sampling)])
        return GenerationJob(kept, key, partial(self._write, asked, batches, sampling))

    def _write(
        self,
        asked: Sequence[Sequence[int]],
        batches: Sequence[Sequence[int]],
        sampling: Sampling,
        done: Collection[int],
    ) -> Iterator[Unit]:
        from tandem.model.generate import generate_batch

        ask: Callable[..., list[GeneratedAnswer]] = (
            partial(generate_batch, self._model) if self._vllm is None else self._vllm.answers
        )
        for members in batches:
            if all(number in done for number in members):
                continue
            prompts = [asked[i] for i in members]
            answers = ask(prompts, members, stop_ids=self._stops, sampling=sampling)
            ids = [list(answer.ids) for answer in answers]
            texts = self._tokenizer.batch_decode(ids, skip_special_tokens=True)
            done_now = zip(members, texts, answers, strict=True)
            yield [(number, [text, answer.stopped]) for number, text, answer in done_now]

    def _batches(self, asked: Sequence[Sequence[int]]) -> list[list[int]]:
        if self._vllm is None:
            from tandem.model.generate import plan_batches

            lengths = [len(ids) for ids in asked]
            return plan_batches(self._model, lengths, self._settings.max_new_tokens)
        numbers = range(len(asked))
        return [list(numbers[i : i + _VLLM_PROMPTS]) for i in numbers[::_VLLM_PROMPTS]]

    def _fitting(
        self, prompts: Sequence[Prompt], ledger: Ledger
    ) -> tuple[list[Prompt], list[list[int]]]:
        """The prompts that leave room for an answer in the model's context, and their tokens."""
        kept, asked, long = [], [], 0
        most = self._settings.max_new_tokens
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
            if self._context is None or len(ids) + most <= self._context:
                kept.append(prompt)
                asked.append(ids)
            else:
                long += 1
                detail = f"{len(ids)} tokens, of a context of {self._context}"
                ledger.dropped(prompt.origin, "no room for an answer of the model's", detail)
        self._report(len(prompts), left_out, long, ledger)
        if not kept:
            raise UserError(_none_left(len(prompts), left_out, long))
        return kept, asked

    def _report(self, total: int, left_out: Counter[str], long: int, ledger: Ledger) -> None:
        lines = [f"are not asked: {reason}" for reason in left_out]
        counts = list(left_out.values())
        if long:
            lines.append(
                f"leave no room for {self._settings.max_new_tokens} tokens in the model's context "
                f"of {self._context}"
            )
            counts.append(long)
        for count, line in zip(counts, lines, strict=True):
            log(self._console, f"pairs: {count} of {total} prompts {line} (each in {ledger.path})")


def _none_left(total: int, left_out: Counter[str], long: int) -> str:
    reasons = "".join(f"; {reason}: {count}" for reason, count in left_out.items())
    ways = [way_out(reason) for reason in left_out]
    if long:
        reasons = f"; without room for an answer: {long}{reasons}"
        ways.insert(0, "Lower pairs.max_new_tokens or give shorter prompts.")
    return f"pairs: none of {total} prompts can be asked{reasons}. {' '.join(ways)}"


class ServerGenerator:
    """An OpenAI-compatible server. Its answers are not repeatable; those recorded are kept."""

    def __init__(self, settings: PairsSettings, server: ServerSettings) -> None:
        self._settings, self._server = settings, server
        self.failed: dict[int, Failure] = {}
        self.facts: dict[str, Any] = {
            "model": server.model, "by": f"the server at {server.base_url}"
        }  # fmt: skip

    @property
    def identity(self) -> dict[str, str]:
        """Its address and what it calls the model."""
        return {"base_url": self._server.base_url, "model": self._server.model}

    def check(self) -> None:
        """Raise UserError for a key that is not there."""
        ChatServer(self._server)

    def reach(self) -> None:
        """Raise UserError for a server that does not answer a greeting."""
        greeting = {"role": "user", "content": "Hello."}
        few = {self._server.limit_key: min(_GREETING_TOKENS, self._settings.max_new_tokens)}
        request = ChatRequest((greeting,), self._options() | few)
        first_answer(self._server, request, "pairs.server")

    def open(self, console: Console) -> None:
        """Read the key; nothing is sent yet."""
        self._client = ChatServer(self._server, log=lambda text: log(console, text))

    def plan(self, prompts: Sequence[Prompt], seed: int, ledger: Ledger) -> GenerationJob:  # noqa: ARG002
        """Plan all prompts; those that are too long, the server refuses one by one."""
        texts = [[prompt.system, prompt.question] for prompt in prompts]
        options, samples = self._options(), self._settings.samples
        key = hash_json([self._server.base_url, self._server.model, texts, options, samples])
        return GenerationJob(list(prompts), key, partial(self._write, prompts))

    def _write(self, prompts: Sequence[Prompt], done: Collection[int]) -> Iterator[Unit]:
        count = self._settings.samples
        missing = [number for number in range(len(prompts) * count) if number not in done]
        self.failed.clear()
        requests = (self._request(prompts[number // count]) for number in missing)
        for place, answer in self._client.answers(requests):
            if isinstance(answer, Reply):
                yield [(missing[place], [answer.text, answer.stopped])]
            else:
                self.failed[missing[place]] = answer
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
