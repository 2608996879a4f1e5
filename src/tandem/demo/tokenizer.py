"""The demo's own tokenizer: byte-level BPE learnt from its corpus."""

from __future__ import annotations

import string
from itertools import islice
from typing import TYPE_CHECKING

from tandem.demo.corpus import documents

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

VOCABULARY = 2048
CONTEXT = 512
BOS, EOS, PAD, UNK = "<s>", "</s>", "<pad>", "<unk>"
# Of the corpus, those that it is learnt from.
_DOCUMENTS = 6000


def train_tokenizer(*, seed: int = 0) -> PreTrainedTokenizerFast:
    """Learn the tokenizer from the first documents of the corpus.

    Byte-level, so every text can be written, the chat format's headers included.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            # Single digits: a number is then a sequence the model can spell.
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
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
    # As Mistral's: plain text gets a BOS in front. Chat templates write their own.
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
