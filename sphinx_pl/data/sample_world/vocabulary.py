"""The sample's tokenizer has 512 sentencepiece pieces with LLaMA's settings.

It is trained on the sample's own words.
"""

from __future__ import annotations

import io
import random
import re
from collections import Counter
from collections.abc import Iterator

import sentencepiece as spm

from sphinx_pl.data.coordinates import Coordinates
from sphinx_pl.data.readers import Reader
from sphinx_pl.data.sample_world.drawing import COLORS
from sphinx_pl.data.sample_world.language import RELATIONS
from sphinx_pl.data.tasks import TASKS

VOCAB_SIZE = 512
DECIMALS = 2
"""The decimals of a coordinate. Two suffice for 64 pixels and keep answers short."""
RECORDS = 600
"""The number of instructions of each task that are read."""

# The conversation's marks and the punctuation of boxes are whole pieces. So turns and boxes are
# short. sentencepiece writes a space as "\u2581". A newline inside a piece stays as it is.
MARKS = ("###", "\n###", "\u2581Human:", "\u2581Assistant:")
GEOMETRY_MARKS = ("<p>", "\u2581<p>", "</p>", "</p>[0.", "\u2581[0.", "[0.", ",0.", ";0.", "]<p>")

# Half of the vocabulary consists of byte pieces. Merging pairs spends several pieces on the way to
# a long word. So the most useful words are pieces from the start, and merges get the rest. Colours
# are such words also right after "<p>". So are the words of relations, whose answers are one word.
WORDS = 124
PLACES = tuple(f"\u2581{word}" for word in (*RELATIONS, "middle"))


def train_tokenizer(texts: list[str], instructions: Reader) -> bytes:
    """Return a sentencepiece model as bytes.

    It uses BPE with byte fallback and single digits. Its ids are unk 0, bos 1 and eos 2, without
    pad.

    Args:
        texts: captions and documents of the training splits.
        instructions: training instructions. The tasks write their questions and answers.
    """
    sentences = [*texts, *_dialogs(instructions)]
    model = io.BytesIO()
    spm.SentencePieceTrainer.Train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        vocab_size=VOCAB_SIZE,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=1.0,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=True,
        user_defined_symbols=list(
            dict.fromkeys([*MARKS, *GEOMETRY_MARKS, *COLORS, *PLACES, *_useful_words(sentences)])
        ),
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,  # with more, the result depends on which thread finishes first
        minloglevel=2,
    )
    return model.getvalue()


def _dialogs(instructions: Reader) -> Iterator[str]:
    """Yield questions and answers as training reads them."""
    rng, coordinates = random.Random(0), Coordinates(DECIMALS)
    read: Counter[str] = Counter()
    for index in range(len(instructions)):
        record = instructions.record(index)
        read[record.task] += 1
        if read[record.task] > RECORDS:
            continue
        for turn in TASKS[record.task].turns(record, coordinates, rng):
            yield from (turn.question, turn.answer)


def _useful_words(sentences: list[str]) -> list[str]:
    """Return the words that save most pieces if each is one piece.

    A word includes the space before it if there is one.
    """
    words: Counter[str] = Counter()
    for sentence in sentences:
        words.update(re.findall("\u2581?[A-Za-z]{2,}", "\u2581" + sentence.replace(" ", "\u2581")))
    return sorted(words, key=lambda word: (-words[word] * (len(word) - 1), word))[:WORDS]
