"""What can be looked at before anything is trained: model, adapters, template, data, servers.

Each look is independent of the others, so that one rehearsal finds several mistakes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from tandem.data.encoded.dataset import EncodedDataset
from tandem.data.ledger import Ledger
from tandem.data.read_records import read_conversations, read_pairs, read_questions
from tandem.data.resolve_sources import held_out_of
from tandem.data.tokenize.encode import ChatTokenizer
from tandem.errors import UserError
from tandem.integrations.chat_server import ChatRequest, first_answer
from tandem.integrations.trackers import check_tracker
from tandem.model.base_model import BaseModelInfo, check_base, load_base_info
from tandem.model.model_folder import check_fetchable, has_tokenizer, model_folder, on_hub
from tandem.model.stand_in.make_stand_in import StandIn, make_stand_in
from tandem.pipeline.rehearsal.findings import Notebook
from tandem.pipeline.rehearsal.sample_data import Sample, Sampler
from tandem.pipeline.rehearsal.shortened import BATCH, OF_THE_GPU, PROMPTS, Inputs
from tandem.recipe.choices import SHARDS
from tandem.recipe.data_source import DataSource
from tandem.recipe.pairs_settings import PairsSettings, ServerSettings
from tandem.recipe.recipe import Recipe
from tandem.recipe.training_settings import LoraSettings, TrainingSettings
from tandem.runtime.user_code import load_function
from tandem.storage.hashing import weight_files

# Rows of instructions from which prompts are selected: filters leave some out.
_PROMPT_ROWS = 256
_QUESTION = "Answer with the word yes."
# A sample's share of dropped records differs from the whole's by at most so many standard errors.
_ERRORS = 3.0
_OF_PAIRS = ("prompts", "heldout", "select.decontaminate")
_OF_EVALUATION = ("questions", "pairs", "heldout")


@dataclass
class Looks:
    """The looks at one recipe, and what they found for the stages to use."""

    recipe: Recipe
    scratch: Path
    sampler: Sampler
    notebook: Notebook
    steps: int  # of a training stage
    with_servers: bool
    models: dict[str, Path] = field(default_factory=dict)  # stand-ins by the recipe's keys
    data: dict[str, list[dict[str, Any]]] = field(default_factory=dict)  # samples, the same
    adapters: list[LoraSettings] = field(default_factory=list)  # that fit the base

    def all(self) -> None:
        """Take every look; what fails is in the notebook."""
        base: Path | None = None
        with self.notebook.trying("model") as seen:
            base = self._base()
            seen += self._stand_in("model", base)
        info: BaseModelInfo | None = None
        if base is not None:
            with self.notebook.trying("template") as seen:
                info = load_base_info(self.recipe, base, 1, weights=False)
                seen.append(self._template(info))
        for name, section in trained(self.recipe).items():
            with self.notebook.trying(name, "settings"):
                self._check_settings(name, section, base, info)
        for key, check in watchers(self.recipe):
            with self.notebook.trying("settings", key):
                check()
        for name, section in trained(self.recipe).items():
            with self.notebook.trying(f"{name} data") as seen:
                self._training_data(name, section, info, seen)
        if self.recipe.pairs is not None:
            with self.notebook.trying("pairs data") as seen:
                self._pairs(self.recipe.pairs, seen)
        if self.recipe.evaluate is not None:
            with self.notebook.trying("evaluate data") as seen:
                self._evaluation(seen)
        for key, server in servers(self.recipe) if self.with_servers else ():
            with self.notebook.trying(key.split(".")[0], "server") as seen:
                seen.append(_asked(key, server))

    def inputs(self, run: Path) -> Inputs:
        """What stands in for the recipe's models and data; `run` is the rehearsal's run folder."""
        return Inputs(self.models, self.data, run, self.with_servers)

    def _base(self) -> Path:
        """The base model's folder, without weights where it is on the Hub."""
        recipe = self.recipe
        folder = model_folder(recipe.model, recipe.model_revision, weights=False)
        if on_hub(recipe.model):
            check_fetchable(recipe.model, folder, recipe.model_revision)
        return folder

    def _stand_in(self, key: str, source: Path, *, labels: int | None = None) -> list[str]:
        """Make a stand-in of a model that the recipe names under a key; in words."""
        folder = self.scratch / "models" / key.replace(".", "-")
        made = make_stand_in(source, folder, labels=labels)
        self.models[key] = folder
        return [_in_words(made)]

    def _check_settings(
        self, name: str, section: TrainingSettings, base: Path | None, info: BaseModelInfo | None
    ) -> None:
        """Raise UserError for an adapter, a length or an optimizer that the run could not use."""
        from tandem.integrations.choose import pieces_of
        from tandem.model.added_tokens import check_added
        from tandem.stages.training.adapter_checks import check_adapter, check_start
        from tandem.train.optimizers import check_optimizer

        engine = self.recipe.engine
        if section.optimizer not in OF_THE_GPU:
            check_optimizer(section.optimizer, pieces_of(engine), engine)
        if base is not None:
            check_base(base, {name: section}, weights=_has_weights(base))
        if info is None:
            return
        sharded = "weights" in SHARDS.get(engine, ())  # one that nobody chose shards nothing
        check_added({*info.added.new, *info.added.known}, engine=engine, sharded=sharded)
        check_start(self.recipe, section, info, weights=False)
        # To describe an adapter of a deep model takes a second; both stages often have the same.
        if not section.full and section.lora not in self.adapters:
            check_adapter(section, info)
            self.adapters.append(section.lora)

    def _template(self, info: BaseModelInfo) -> str:
        """Tokenizer and template in words: how it ends an answer."""
        from tandem.data.tokenize.chat_template import find_ending

        ending = find_ending(info.tokenizer, info.template)
        text = f"{info.template.name}, {len(info.tokenizer):,} tokens"
        if ending is not None:
            text += f"; an answer ends with {ending.token} ({ending.token_id})"
            eos = info.tokenizer.eos_token
            if eos != ending.token:
                self.notebook.note(
                    f"an answer ends with {ending.token}, and the tokenizer's own end token is "
                    f"{eos}: merged models say so in their files, and a server that ignores these "
                    "would not stop"
                )
        self.notebook.note(*info.notices())
        adapters = any(not section.full for section in trained(self.recipe).values())
        if _has_weights(info.folder) and adapters:
            self.notebook.note(*info.warnings())
        elif adapters:
            self.notebook.not_shown.append(
                "whether the template's tokens were ever trained (the run says so when it has the "
                "weights)"
            )
        return text

    def _training_data(
        self, name: str, section: TrainingSettings, info: BaseModelInfo | None, seen: list[str]
    ) -> None:
        """Read and encode a sample of a training stage's data, with its limits."""
        from tandem.stages.training.training_data import StageReader

        if not section.data:
            return
        take = partial(self.sampler.sample, on_bad_record=section.on_bad_record)
        samples = take(section.data, name)
        held_out = self._held_out(name, section)
        if info is None:
            return
        chat = info.chat
        loose = section.model_copy(update={"max_dropped": 1.0, "validation": None})
        reader = StageReader(name, section.trains_on, loose, chat, None, self.notebook.console)
        sources = [sample.source for sample in samples]
        read = reader.read(sources, [], self.recipe.seed)
        counts = read.ledger.summary()
        seen.append(f"{_listed(samples)}: {counts['trained']} trained, {counts['truncated']} cut, "
                    f"{counts['dropped']} dropped")  # fmt: skip
        _check_dropped(read.ledger, section.max_dropped)
        usable = [read.dataset[number].origin for number in range(len(read.dataset))]
        each = -(-BATCH * self.steps // len(samples))
        self._keep(f"{name}.data", self.sampler.fewer(samples, f"{name}-run", usable, each))
        if getattr(section, "loss_on", "answers") == "answers":
            seen += _ends(name, read.dataset, chat)
        if held_out:
            scored = reader.read([sample.source for sample in held_out], [], self.recipe.seed)
            seen.append(f"held out: {_listed(held_out)}, {scored.ledger.counts['trained']} usable")

    def _held_out(self, name: str, section: TrainingSettings) -> list[Sample]:
        """Samples of the data sets that are held out as a whole, which the recipe then names."""
        whole = held_out_of(section, section.data, list)
        if not whole:
            return []
        samples = self.sampler.sample(
            whole, f"{name}-validation", on_bad_record=section.on_bad_record
        )
        few = self.sampler.fewer(samples, f"{name}-validation-run", (), BATCH)
        self._keep(f"{name}.validation.data", few)
        return samples

    def _pairs(self, pairs: PairsSettings, seen: list[str]) -> None:
        """Sample the instructions, and make stand-ins of the models that write and rank."""
        from tandem.pairs.filters import UserCheck
        from tandem.pairs.prompts import read_prompts

        for key in _OF_PAIRS:
            sources = self._sources(pairs, key)
            if not sources:
                continue
            # Prompts are selected; held-out ones are all asked.
            count = PROMPTS if key == "heldout" else _PROMPT_ROWS
            samples = self.sampler.sample(
                sources, f"pairs-{key}", count=count, on_bad_record=pairs.on_bad_record
            )
            self._keep(f"pairs.{key}", samples)
            if key == "select.decontaminate":
                continue
            named = [sample.source for sample in samples]
            ledger = Ledger(None)
            usable = sum(1 for _ in read_prompts(named, pairs.keep, ledger, pairs.on_bad_record))
            seen.append(f"{key}: {_listed(samples)}, {usable} usable")
        if pairs.filters.check is not None:
            UserCheck(pairs.filters.check)
        if pairs.model is not None:
            seen += self._stand_in("pairs.model", model_folder(pairs.model, weights=False))
        if pairs.rank is not None and pairs.rank.reward_model is not None:
            source = model_folder(pairs.rank.reward_model, weights=False)
            seen += self._stand_in("pairs.rank.reward_model", source, labels=1)
        elif pairs.rank is not None and not self.with_servers and "model" in self.models:
            self._judge()

    def _judge(self) -> None:
        """Make a random classifier that ranks in place of a judge that is not asked."""
        from tandem.data.tokenize.chat_template import resolve_template
        from tandem.model.companion_files import write_templates
        from tandem.model.model_folder import load_tokenizer

        key = "pairs.rank.reward_model"
        self._stand_in(key, self.models["model"], labels=1)
        tokenizer = load_tokenizer(self.models[key])
        write_templates(self.models[key], resolve_template(tokenizer, None).saved)

    def _evaluation(self, seen: list[str]) -> None:
        """Sample what models are asked and scored on."""
        evaluate = self.recipe.evaluate
        assert evaluate is not None
        for key in _OF_EVALUATION:
            sources = getattr(evaluate, key)
            if not sources:
                continue
            samples = self.sampler.sample(sources, f"evaluate-{key}")
            few = self.sampler.fewer(samples, f"evaluate-{key}-run", (), PROMPTS)
            self._keep(f"evaluate.{key}", few)
            named = [sample.source for sample in samples]
            if key == "questions":
                count = len(read_questions(named))
            else:
                read = read_pairs if key == "pairs" else read_conversations
                count = sum(1 for _ in read(named, Ledger(None)))
            seen.append(f"{key}: {_listed(samples)}, {count} usable")
        if evaluate.tasks or evaluate.suite:
            from tandem.evaluate.harness_tasks import check_harness, selected_tasks

            tasks = selected_tasks(evaluate)
            check_harness(tasks)
            seen.append(f"{len(tasks.tasks)} tasks")

    def _sources(self, pairs: PairsSettings, key: str) -> Sequence[DataSource]:
        if key == "select.decontaminate":
            return pairs.select.decontaminate
        sources: Sequence[DataSource] = getattr(pairs, key)
        return sources

    def _keep(self, key: str, samples: Sequence[Sample]) -> None:
        self.data[key] = [sample.source.model_dump(mode="json") for sample in samples]


def trained(recipe: Recipe) -> dict[str, TrainingSettings]:
    """The recipe's training stages by name."""
    named = {"sft": recipe.sft, "dpo": recipe.dpo}
    return {name: section for name, section in named.items() if section is not None}


def servers(recipe: Recipe) -> Iterator[tuple[str, ServerSettings]]:
    """The servers that a run asks, by their keys."""
    pairs, evaluate = recipe.pairs, recipe.evaluate
    if pairs is not None and pairs.server is not None:
        yield "pairs.server", pairs.server
    if pairs is not None and pairs.rank is not None and pairs.rank.judge is not None:
        yield "pairs.rank.judge", pairs.rank.judge
    if evaluate is not None and evaluate.judge is not None:
        yield "evaluate.judge", evaluate.judge


def watchers(recipe: Recipe) -> Iterator[tuple[str, Callable[[], object]]]:
    """What looks for each callback and tracker, by its key."""
    for name in recipe.callbacks:
        yield "callbacks", partial(load_function, name, "callbacks")
    for name in recipe.trackers:
        yield "trackers", partial(check_tracker, name)


def _asked(key: str, server: ServerSettings) -> str:
    """Ask a server one question; raises UserError where it gives no answer."""
    once = server.model_copy(update={"retries": 0, "timeout": min(60.0, server.timeout)})
    request = ChatRequest(({"role": "user", "content": _QUESTION},), {server.limit_key: 16})
    try:
        first_answer(once, request, key)
    except UserError as error:
        without = "`tandem rehearse --without-servers` rehearses all but the server."
        raise UserError(f"{error} {without}") from None
    return f"{server.model} at {server.base_url} answers"


def _has_weights(folder: Path) -> bool:
    try:
        weight_files(folder)
    except UserError:
        return False
    return has_tokenizer(folder)


def _in_words(made: StandIn) -> str:
    (few, layers), (narrow, width) = made.layers, made.width
    return (
        f"{made.architecture}, {few} of {layers} layers, {narrow} of {width} wide, "
        f"{made.rows:,} rows, {made.parameters / 1e6:.1f}M random parameters"
    )


def _listed(samples: Sequence[Sample]) -> str:
    return ", ".join(map(str, samples))


def _check_dropped(ledger: Ledger, most: float) -> None:
    """Raise UserError where so much of a sample is dropped that the whole would be refused."""
    counts = ledger.counts
    read = max(1, counts["read"])
    allowed = most + _ERRORS * math.sqrt(max(most * (1 - most), 1 / read) / read)
    if counts["dropped"] > min(1.0, allowed) * read or not counts["trained"]:
        ledger.check_share(most)


def _ends(name: str, dataset: EncodedDataset, chat: ChatTokenizer) -> list[str]:
    """In how many records an answer's end token is trained; UserError where it is in none."""
    token = chat.ending.token_id
    if token < 0 or not len(dataset):  # rows of tokens alone, which say themselves what is trained
        return []
    records = [dataset[number] for number in range(len(dataset))]
    with_end = sum(
        any(int(token) in branch.input_ids[branch.trained] for branch in record.branches)
        or int(token) in record.prefix.input_ids[record.prefix.trained]
        for record in records
    )
    if not with_end:
        raise UserError(
            f"{name}: in none of {len(records)} records is the end token {chat.ending.token} "
            f"trained, so that the model would not learn to stop: {name}.max_length cuts every "
            "answer. Raise it, or choose data with shorter answers."
        )
    return [f"{chat.ending.token} is trained in {with_end} of {len(records)}"]
