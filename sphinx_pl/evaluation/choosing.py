"""Answers to a batch of questions: generated, or chosen by likelihood where the possible answers are known."""

from __future__ import annotations

from collections.abc import Sequence

from sphinx_pl.data.processor import Processor
from sphinx_pl.evaluation.question import Question
from sphinx_pl.generation.generate import GenerationConfig, Prompt, generate
from sphinx_pl.generation.ranking import rank
from sphinx_pl.models.sphinx import Sphinx


def answer(
    model: Sphinx,
    processor: Processor,
    questions: Sequence[Question],
    prompts: Sequence[Prompt],
    config: GenerationConfig,
    ranking: bool = False,
) -> list[str]:
    """The text of each answer.

    Args:
        prompts: the questions' ids and pixels.
        ranking: of a question with candidates, choose the one whose tokens are together the most probable, instead of
            what is generated.
    """
    known: list[tuple[str, ...]] = []
    tokens: list[list[list[int]]] = []
    for question, prompt in zip(questions, prompts, strict=True):
        choices = question.candidates if ranking else ()
        ids = [processor.tokenizer.encode(choice) for choice in choices]  # as in training, they begin a word
        fit = max(map(len, ids), default=0) <= (prompt.max_new_tokens or config.max_new_tokens)
        known.append(choices if fit else ())
        tokens.append(ids)
    closed = [number for number, choices in enumerate(known) if choices]
    texts: dict[int, str] = {}
    scores = rank(model, [prompts[number] for number in closed], [tokens[number] for number in closed])
    for number, each in zip(closed, scores, strict=True):
        texts[number] = known[number][each.index(max(each))]
    generated = [number for number in range(len(questions)) if number not in texts]
    answers = generate(model, [prompts[number] for number in generated], config)
    texts |= {number: processor.decode(ids) for number, ids in zip(generated, answers, strict=True)}
    return [texts[number] for number in range(len(questions))]
