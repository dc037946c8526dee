"""Functions of several converters: keys, frequent answers, the usual kinds of records."""

from __future__ import annotations

import dataclasses
import string
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sphinx_pl.data.readers.instruction_json import to_record
from sphinx_pl.data.schema import ImageRef, Record, Turn
from sphinx_pl.data.skip import SkipSample
from sphinx_pl.data.tasks import TASKS, repeated_choice


def keyed(entries: Iterable[Any], name: str, unique: bool = True) -> Iterator[tuple[str, Any]]:
    """Yield (key, entry), where the key is what the entry has at `name`.

    A name that is not unique gets the entry's number in front. An entry without a key is yielded
    with its number. `records` then refuses the entry, so that it is counted.

    Args:
        unique: whether no two entries have the same name.
    """
    for number, entry in enumerate(entries):
        value = entry.get(name) if isinstance(entry, Mapping) else None
        is_id = isinstance(value, str | int)
        yield (str(value) if unique and is_id else f"{number}-{value}" if is_id else f"#{number}"), entry


def text(value: Any) -> str:
    """Return a value that must be text.

    A path or a question that it is written into would hide that it is something else.
    """
    if not isinstance(value, str):
        raise TypeError(f"{value!r} should be text")
    return value


def asked(value: Any) -> str:
    """Return a question without the spaces around it.

    Converters that write more around a question call this. The text around it would hide that it is
    empty.

    Raises:
        SkipSample: the question is blank.
    """
    if not (question := text(value).strip()):
        raise SkipSample("question_empty")
    return question


def most_frequent(answers: list[str]) -> str:
    """Return the most frequent answer in lower case. Of several, it is the one that was given
    first.

    Raises:
        SkipSample: there is no answer.
    """
    if not isinstance(answers, list):  # a text would be counted by its letters
        raise TypeError(f"{answers!r} should be a list")
    counts = Counter(clean for answer in answers if (clean := answer.strip().lower()))
    if not counts:
        raise SkipSample("answers_empty")
    return counts.most_common(1)[0][0]


def question_record(key: str, image: str, question: str, answer: str, meta: dict[str, Any]) -> Record:
    """Return a question with a short answer.

    The task is yes_no if the answer is yes or no, else short_vqa.
    """
    short = answer.strip().rstrip(".").lower()
    task = "short_vqa"
    if short in ("yes", "no"):
        task, answer = "yes_no", short
    return Record(key=key, task=task, images=(ImageRef(image),), question=question, answer=answer, meta=meta)


def choice_record(key: str, image: str, question: str, choices: Any, index: Any, meta: dict[str, Any]) -> Record:
    """Return a question with choices, of which the one at `index` is right.

    Raises:
        SkipSample: there is no such choice, or any two choices read the same.
    """
    answer = chosen(choices, index)
    if repeated := repeated_choice(choices):
        raise SkipSample("choices_repeated", f"{key}: {repeated}")
    return Record(
        key=key,
        task="multiple_choice",
        images=(ImageRef(image),),
        question=question,
        choices=tuple(choices),
        answer=answer,
        meta=meta,
    )


def chosen(choices: Any, index: Any) -> str:
    """Return the choice at `index`.

    Raises:
        SkipSample: there is no such choice, or the number of choices is not 2 to 26.
    """
    if not isinstance(choices, list) or not 2 <= len(choices) <= len(string.ascii_uppercase):
        raise SkipSample("choices_count")
    if not isinstance(index, int) or not 0 <= index < len(choices):
        raise SkipSample("choice_missing", f"{index!r} of {len(choices)} choices")
    return text(choices[index])


def choice_turn(question: str, choices: Sequence[str], index: int) -> Turn:
    """Return a turn in the words of the task multiple_choice.

    It is for questions that the task cannot write: those without an image or with images as
    choices.
    """
    lines = (f"{letter}. {choice}" for letter, choice in zip(string.ascii_uppercase, choices, strict=False))
    template = TASKS["multiple_choice"].templates[0]
    return Turn(template.format(question=question, choices="\n".join(lines)), string.ascii_uppercase[index])


def conversation_record(key: str, entry: Mapping[str, Any], folder: str = "") -> Record:
    """Return the record of an entry of LLaVA's about an image.

    The task is detailed_answer if there is a single question, else chat.

    Raises:
        SkipSample: the speakers do not take turns.
    """
    about = {"conversations": entry["conversations"], "image": text(entry["image"])}
    record = to_record(about, key, Path(folder), "chat")
    if not record.turns:
        raise SkipSample("conversation_empty", key)
    return record if len(record.turns) > 1 else dataclasses.replace(record, task="detailed_answer")
