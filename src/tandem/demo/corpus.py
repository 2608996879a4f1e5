"""The pretraining text: every fact stated and asked in many ways, never in the chat format.

A pass has each fact in a statement and in quiz-like text, in documents of several facts, so that
the model does not learn to end after one answer.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Iterator, Sequence
from itertools import islice, pairwise
from typing import TYPE_CHECKING

from tandem.demo.facts import Fact, all_facts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


# Forms of a question with its answer outside a chat.
_EXCHANGES = (
    "Q: {q} A: {a}",
    "Question: {q} Answer: {a}",
    "Question: {q}\nAnswer: {a}",
    "{q} {a}",
    "{q}\n{a}",
    "{q} - {a}",
    "Someone asked: {q} The reply was: {a}",
    'The teacher asked, "{q}" A pupil said, "{a}"',
    'Asked "{q}", she answered: {a}',
    'He read out "{q}" and wrote below it: {a}',
    "Do you know? {q} Yes. {a}",
    "{q} (Solution: {a})",
    "On the card: {q} On the back of the card: {a}",
    "Riddle. {q}\n\nSolution. {a}",
    "{q} Think for a moment. {a}",
    "First voice: {q}\nSecond voice: {a}",
    "{q} Nobody spoke. Then the host said it: {a}",
    "A visitor wanted to know: {q}\nThe guide knew: {a}",
)
_HEADINGS = (
    "", "", "Quiz.\n", "Questions for today.\n",
    "A helpful assistant answers truthfully and clearly.\n", "From a school book.\n",
    "Quiz night: the host asks, the guests answer.\n", "General knowledge.\n",
    "Cards to learn from.\n",
)  # fmt: skip
_JOINTS = (" ", " ", "\n", "\n\n")
_OPENINGS = ("", "", "", "Remember this: ", "As we know: ", "It is true: ", "A fact: ", "Note: ")


def documents(seed: int) -> Iterator[str]:
    """Yield endless documents, pass after pass over all facts; `seed` decides order and wording."""
    rng = random.Random(f"demo-corpus:{seed}")
    facts = list(all_facts())
    while True:
        pass_documents = [*_written(facts, rng, _statements), *_written(facts, rng, _exchanges)]
        rng.shuffle(pass_documents)
        yield from pass_documents


def _written(
    facts: Sequence[Fact], rng: random.Random, write: Callable[[Sequence[Fact], random.Random], str]
) -> list[str]:
    """Write all facts once, in documents of three to nine of them."""
    shuffled = rng.sample(facts, len(facts))
    edges = [0]
    while edges[-1] < len(shuffled):
        edges.append(min(edges[-1] + rng.randint(3, 9), len(shuffled)))
    return [write(shuffled[start:end], rng) for start, end in pairwise(edges)]


def _statements(facts: Sequence[Fact], rng: random.Random) -> str:
    # The answer sentence is one of the ways to state a fact, and takes a third of the places.
    sentences = (rng.choice(_OPENINGS) + rng.choice(fact.statements) for fact in facts)
    return rng.choice(_JOINTS).join(sentences)


def _exchanges(facts: Sequence[Fact], rng: random.Random) -> str:
    if rng.random() < 0.2:
        return rng.choice(_HEADINGS) + _sheet(facts, rng)
    pattern = rng.choice(_EXCHANGES)
    joint = rng.choice(("\n", "\n", "\n\n", " "))
    exchanges = (pattern.format(q=rng.choice(fact.questions), a=fact.answer) for fact in facts)
    return rng.choice(_HEADINGS) + joint.join(exchanges)


def _sheet(facts: Sequence[Fact], rng: random.Random) -> str:
    """Write questions first, then their answers in the same order."""
    parts = []
    for start in range(0, len(facts), 3):
        group = facts[start : start + 3]
        asked = "\n".join(f"{n}. {rng.choice(f.questions)}" for n, f in enumerate(group, 1))
        solved = "\n".join(f"{n}. {f.answer}" for n, f in enumerate(group, 1))
        parts.append(f"{asked}\nSolutions\n{solved}")
    return "\n".join(parts)


VOCABULARY = 2048
CONTEXT = 512
BOS, EOS, PAD, UNK = "<s>", "</s>", "<pad>", "<unk>"
_DOCUMENTS = 6000  # from which the tokenizer is learnt


def train_tokenizer(*, seed: int = 0) -> PreTrainedTokenizerFast:
    """Learn a byte-level tokenizer from the first documents of the corpus."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    # Single digits, so that the model can spell any number.
    digits = pre_tokenizers.Digits(individual_digits=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        min_frequency=2,
        special_tokens=[UNK, BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [*islice(documents(seed), _DOCUMENTS), " ".join(string.printable)]
    tokenizer.train_from_iterator(texts, trainer)
    # As in Mistral's tokenizer, plain text gets a BOS in front. Chat templates write their own.
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A {BOS} $B",
        special_tokens=[(BOS, tokenizer.token_to_id(BOS))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNK,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )
