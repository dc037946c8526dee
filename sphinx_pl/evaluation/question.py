"""The question of a record, without its answer.

A record becomes a `Question` before anything is asked. Prompts, batches, candidates and answers
depend on questions alone, so the part that asks cannot see the truth. The record returns when the
answer is final, to score it.
"""

from __future__ import annotations

import dataclasses
import re
import string
from collections.abc import Sequence
from dataclasses import dataclass

from sphinx_pl.data.coordinates import Coordinates
from sphinx_pl.data.images import annotated_images
from sphinx_pl.data.processor import Processor, PromptSample
from sphinx_pl.data.schema import ImageRef, Record, Turn
from sphinx_pl.data.tasks import TASKS

_BLANK = "?"  # stands for the answer in a conversation, which ends before it
_POLAR = re.compile(
    r"\s*(?:is|are|was|were|am|do|does|did|has|have|had|can|could|will|would|shall|should|may|might|must)(?:n't)?\b",
    re.IGNORECASE,
)
_ALTERNATIVE = re.compile(r"\bor\b", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Question:
    """All that the part that asks gets.

    Attributes:
        earlier: the turns of a conversation before this one, with their answers.
        text: the question in the evaluation wording.
        limit: the longest answer in tokens.
        candidates: every answer that the question allows, () where it is open.
    """

    key: str
    images: tuple[ImageRef, ...]
    earlier: tuple[Turn, ...]
    text: str
    limit: int
    candidates: tuple[str, ...] = ()

    def prompt(self, processor: Processor) -> PromptSample:
        """The question's ids, with a slot for each visual token of its images.

        Raises:
            SkipSample: an image whose size is needed cannot be read, or `<image>` marks do not fit
                the images.
        """
        turns = (*self.earlier, Turn(self.text, _BLANK))
        return processor.prompt(Record(self.key, "chat", self.images, turns=turns))


def question_of(
    record: Record,
    coordinates: Coordinates,
    limit: int | None = None,
    closed: Sequence[str] | None = None,
) -> Question:
    """The question of a record's last turn.

    Args:
        limit: the longest answer in tokens, instead of the task's own.
        closed: the answers that a benchmark's questions allow, () for open ones. None: the
            question's words decide.

    Raises:
        SkipSample: the record lacks what its task needs, so its answer could not be scored either.
    """
    *earlier, last = TASKS[record.task].turns(record, coordinates, None)
    if record.task == "multiple_choice":
        candidates = tuple(string.ascii_uppercase[: len(record.choices)])
    elif closed is not None:
        candidates = tuple(closed)
    else:
        candidates = ("yes", "no") if _short(record.task) and asks_yes_no(last.question) else ()
    limit = limit or TASKS[record.task].max_new_tokens
    # Whether an image has coordinates follows from the task and the question, not from the answer.
    without_answer = dataclasses.replace(record, turns=(*earlier, Turn(last.question, "")))
    return Question(record.key, annotated_images(without_answer), tuple(earlier), last.question, limit, candidates)


def asked_task(record: Record) -> str:
    """The record's task as its question tells it: for yes_no and short_vqa, the one that the words
    ask for.

    Questions are drawn, shown and grouped by this name. It does not depend on the true answer.
    """
    if record.task not in ("yes_no", "short_vqa"):
        return record.task
    return "yes_no" if asks_yes_no(record.turns[-1].question if record.turns else record.question) else "short_vqa"


def asks_yes_no(question: str) -> bool:
    """Whether a question begins with a verb that asks for yes or no ("Is", "Does") and offers no
    alternative ("or").

    The task does not decide: converters call a question yes_no where its answer is yes or no.
    """
    line = question.strip().partition("\n")[0]
    return _POLAR.match(line) is not None and not _ALTERNATIVE.search(line)


def _short(task: str) -> bool:
    """Whether the task asks in the wording of yes_no, as short_vqa does."""
    return TASKS[task].templates[0] == TASKS["yes_no"].templates[0]
