"""Answers to a batch of questions: generated, or chosen by likelihood where the possible answers are known."""

from __future__ import annotations

import string
from collections.abc import Sequence

from sphinx_pl.data.processor import Processor
from sphinx_pl.data.record import Record
from sphinx_pl.models.generation import GenerationConfig, Prompt, generate
from sphinx_pl.models.ranking import rank
from sphinx_pl.models.sphinx import Sphinx


def possible_answers(record: Record) -> tuple[str, ...]:
    """Every answer that the record's question asks for: letters of its choices, yes and no; () where it is open."""
    if record.task == "multiple_choice":
        return tuple(string.ascii_uppercase[: len(record.choices)])
    return ("yes", "no") if record.task == "yes_no" else ()


def answer(
    model: Sphinx,
    processor: Processor,
    records: Sequence[Record],
    prompts: Sequence[Prompt],
    config: GenerationConfig,
    ranking: bool = False,
) -> list[str]:
    """The text of each answer.

    Args:
        prompts: the records' questions.
        ranking: where the possible answers are known, the one whose tokens are together the most probable, instead of
            what is generated.
    """
    known: list[tuple[str, ...]] = []
    tokens: list[list[list[int]]] = []
    for record, prompt in zip(records, prompts, strict=True):
        choices = possible_answers(record) if ranking else ()
        ids = [processor.tokenizer.encode(choice) for choice in choices]  # as in training, they begin a word
        fit = max(map(len, ids), default=0) <= (prompt.max_new_tokens or config.max_new_tokens)
        known.append(choices if fit else ())
        tokens.append(ids)
    closed = [number for number, choices in enumerate(known) if choices]
    texts: dict[int, str] = {}
    scores = rank(model, [prompts[number] for number in closed], [tokens[number] for number in closed])
    for number, each in zip(closed, scores, strict=True):
        texts[number] = known[number][each.index(max(each))]
    generated = [number for number in range(len(records)) if number not in texts]
    answers = generate(model, [prompts[number] for number in generated], config)
    texts |= {number: processor.decode(ids) for number, ids in zip(generated, answers, strict=True)}
    return [texts[number] for number in range(len(records))]
