"""The official figures of POPE, MME, GQA and ScienceQA, computed in one pass as their scripts do.

They are the reference for the metrics of the benchmarks, and are themselves compared with other packages.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

from sphinx_pl.evaluation.benchmarks.mme import COGNITION, PERCEPTION


def mean_by(scores: Iterable[tuple[str, float]]) -> dict[str, float]:
    """The mean score of each group, groups in the order in which they first came; {} of nothing.

    The per-type accuracies of SEED-Bench, GQA and MMBench are such means. Their overall accuracy is that of all
    questions together, not the mean of these.
    """
    groups: dict[str, list[float]] = {}
    for group, score in scores:
        groups.setdefault(group, []).append(float(score))
    return {group: fmean(values) for group, values in groups.items()}


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
    """POPE's five figures (`evaluate.py`, Li et al. 2023), of answers that are already read.

    An answer that says neither (None, which POPE's own reading never gives) is wrong: it lowers accuracy, recall if yes
    was right, and the share of yes, and does not touch precision.

    Raises:
        ValueError: no answers, or not as many as labels.
    """
    pairs = list(zip(predictions, labels, strict=True))
    if not pairs:
        raise ValueError("no answers to score")
    said_yes = sum(answer is True for answer, _ in pairs)
    true_yes = sum(truth for _, truth in pairs)
    hits = sum(answer is True and truth for answer, truth in pairs)
    return YesNoScores(
        accuracy=fmean(answer is truth for answer, truth in ((answer, bool(truth)) for answer, truth in pairs)),
        precision=hits / said_yes if said_yes else 0.0,
        recall=hits / true_yes if true_yes else 0.0,
        f1=2 * hits / (said_yes + true_yes) if hits else 0.0,
        yes_ratio=said_yes / len(pairs),
        unparsed=fmean(answer is None for answer, _ in pairs),
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
        ValueError: a subtask that MME does not have, or an image without exactly two questions.
    """
    images: dict[str, dict[str, list[bool]]] = {}
    for subtask, image, right in results:
        if subtask not in PERCEPTION + COGNITION:
            raise ValueError(f"MME has no subtask '{subtask}'; it has {', '.join(PERCEPTION + COGNITION)}")
        images.setdefault(subtask, {}).setdefault(image, []).append(bool(right))
    for subtask, answers in images.items():
        for image, rights in answers.items():
            if len(rights) != 2:
                raise ValueError(f"MME asks two questions on each image; {subtask}/{image} has {len(rights)}")
    accuracy = {
        task: fmean(right for rights in answers.values() for right in rights) for task, answers in images.items()
    }
    plus = {task: fmean(all(rights) for rights in answers.values()) for task, answers in images.items()}

    def total(subtasks: Sequence[str]) -> float:
        return 100 * sum(accuracy[task] + plus[task] for task in subtasks if task in accuracy)

    return MmeScores(accuracy, plus, total(PERCEPTION), total(COGNITION))


def gqa_summary(results: Iterable[tuple[bool, str, str]]) -> dict[str, float]:
    """Accuracies in 0..1 as the official `eval.py` prints them.

    Args:
        results: for each question: whether it was answered right, its structural and its semantic type as in the
            question file ("verify", "query", ...; "rel", "attr", ...).

    Returns:
        `accuracy`, `binary` and `open` (structural type "query"), `structural/...` and `semantic/...`; {} of nothing.
    """
    scores: list[tuple[str, float]] = []
    for right, structural, semantic in results:
        kind = "open" if structural == "query" else "binary"
        names = ("accuracy", kind, f"structural/{structural}", f"semantic/{semantic}")
        scores += [(name, float(right)) for name in names]
    return mean_by(scores)


def scienceqa_summary(results: Iterable[tuple[bool, str, bool, bool, int]]) -> dict[str, float]:
    """Accuracies in 0..1 of ScienceQA's table (Lu et al. 2022, table 3): the columns of its `evaluate_acc.py`.

    Args:
        results: for each question: whether it was answered right, its subject ("natural science", "social science",
            "language science"), whether it has a hint (context as text), whether it has an image, its grade 1 to 12.

    Returns:
        `average`; by subject `NAT`, `SOC`, `LAN`; by context `TXT`, `IMG` (a question can be in both), `NO`; by grade
        `G1-6`, `G7-12`. `IMG` is what is reported of models that are asked only the questions with images.
    """
    subjects = {"natural science": "NAT", "social science": "SOC", "language science": "LAN"}
    scores: list[tuple[str, float]] = []
    for right, subject, hint, image, grade in results:
        names = ["average", subjects[subject], "G1-6" if grade <= 6 else "G7-12"]
        names += ["TXT"] * hint + ["IMG"] * image + ["NO"] * (not hint and not image)
        scores += [(name, float(right)) for name in names]
    return mean_by(scores)
