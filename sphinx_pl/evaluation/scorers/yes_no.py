"""Questions that are answered by yes or no: POPE and MME."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

from sphinx_pl.data.answer_parsing import leading_value
from sphinx_pl.utils.errors import UserError

PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
)  # fmt: skip
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")


def read_yes_no(text: str) -> bool | None:
    """True of a text that begins with the word yes, false of no; None of any other, which then counts as wrong.

    A text that says both ("yes or no") says neither.
    """
    return leading_value(text, {"yes": True, "no": False})


def read_pope(text: str) -> bool:
    """An answer as POPE's `evaluate.py` reads it (Li et al. 2023): yes, unless its first sentence has a word for no.

    Of what stands before the first full stop, commas are dropped and words are what lies between blanks; "No", "no" or
    "not" among them makes it a no. So everything else is a yes: an empty answer, "NO", "No!", "I cannot tell". That is
    why `read_yes_no` is what we score by; this one is there to compare with published figures.
    """
    words = text.split(".")[0].replace(",", "").split(" ")
    return not {"No", "no", "not"}.intersection(words)


def read_mme(text: str) -> bool | None:
    """An answer as MME's `calculation.py` reads it (Fu et al. 2023): "yes" or "no" within its first four letters.

    So "none" is a no and "I know" nothing; `read_yes_no` is stricter. None: neither.
    """
    start = text.lower().strip()[:4]
    return True if "yes" in start else False if "no" in start else None


@dataclass(frozen=True)
class YesNoScores:
    """All in 0..1, "yes" being the positive class; a ratio of nothing is 0. `unparsed`: share that said neither."""

    accuracy: float
    precision: float
    recall: float
    f1: float
    yes_ratio: float
    unparsed: float


def pope_scores(predictions: Sequence[bool | None], labels: Sequence[bool]) -> YesNoScores:
    """POPE's five figures (`evaluate.py`, Li et al. 2023), of answers that were read by one of the functions above.

    An answer that says neither (None, which POPE's own reading never gives) is wrong: it lowers accuracy, recall if yes
    was right, and the share of yes, and does not touch precision.

    Raises:
        ValueError: no answers, or not as many as labels.
    """
    pairs = list(zip(predictions, labels, strict=True))
    if not pairs:
        raise ValueError("no answers to score")
    said_yes = sum(said is True for said, _ in pairs)
    true_yes = sum(truth for _, truth in pairs)
    hits = sum(said is True and truth for said, truth in pairs)
    return YesNoScores(
        accuracy=fmean(said is truth for said, truth in ((said, bool(truth)) for said, truth in pairs)),
        precision=hits / said_yes if said_yes else 0.0,
        recall=hits / true_yes if true_yes else 0.0,
        f1=2 * hits / (said_yes + true_yes) if hits else 0.0,
        yes_ratio=said_yes / len(pairs),
        unparsed=fmean(said is None for said, _ in pairs),
    )


@dataclass(frozen=True)
class MmeScores:
    """`accuracy` and `accuracy_plus` of each subtask in 0..1; the sums are MME's, of up to 2000 and 800 points."""

    accuracy: dict[str, float]
    accuracy_plus: dict[str, float]
    perception: float
    cognition: float

    def points(self, subtask: str) -> float:
        """0 to 200: 100 times the sum of the subtask's accuracy and accuracy+."""
        return 100 * (self.accuracy[subtask] + self.accuracy_plus[subtask])


def mme_scores(results: Iterable[tuple[str, str, bool]]) -> MmeScores:
    """MME's scores (Fu et al. 2023, `calculation.py`): two questions on each image, one of each answer.

    Accuracy is over questions, accuracy+ over images, both of whose questions must be right. The sums are of the
    subtasks that are there; MME has ten of perception and four of cognition.

    Args:
        results: (subtask, image, whether the question was answered right).

    Raises:
        UserError: a subtask that MME does not have, or an image without exactly two questions.
    """
    images: dict[str, dict[str, list[bool]]] = {}
    for subtask, image, right in results:
        if subtask not in PERCEPTION + COGNITION:
            raise UserError(f"MME has no subtask '{subtask}'; it has {', '.join(PERCEPTION + COGNITION)}")
        images.setdefault(subtask, {}).setdefault(image, []).append(bool(right))
    for subtask, answers in images.items():
        for image, rights in answers.items():
            if len(rights) != 2:
                raise UserError(f"MME asks two questions on each image; {subtask}/{image} has {len(rights)}")
    accuracy = {
        task: fmean(right for rights in answers.values() for right in rights) for task, answers in images.items()
    }
    plus = {task: fmean(all(rights) for rights in answers.values()) for task, answers in images.items()}

    def total(subtasks: Sequence[str]) -> float:
        return 100 * sum(accuracy[task] + plus[task] for task in subtasks if task in accuracy)

    return MmeScores(accuracy, plus, total(PERCEPTION), total(COGNITION))
