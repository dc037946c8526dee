"""MME: two yes/no questions on each image, in ten subtasks of perception and four of cognition (Fu
et al. 2023, arXiv 2306.13394).

Files (https://github.com/BradyFU/Awesome-Multimodal-Large-Language-Models/tree/Evaluation, sent on
request): a folder for each subtask, with an image and a text file of the same name for each
question pair, lines of "question\\tYes" or "question\\tNo"; some subtasks have them in `images` and
`questions_answers_YN`. The archive has these folders in `MME_Benchmark_release_version`, one
release in a further `MME_Benchmark`. Or, without the questions' files, the official eval_tool's
`Your_Results/{subtask}.txt`, lines of "image\\tquestion\\tYes or No", and the images in such
folders.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from sphinx_pl.data.converters.common import text
from sphinx_pl.data.coordinates import Coordinates
from sphinx_pl.data.schema import ImageRef, Record
from sphinx_pl.data.skip import SkipSample
from sphinx_pl.evaluation.benchmarks.base import Benchmark, command
from sphinx_pl.evaluation.bootstrap import Floats
from sphinx_pl.evaluation.metrics import Additive, Metric, mean, ratio
from sphinx_pl.evaluation.runner import Prediction
from sphinx_pl.evaluation.scorers.base import Score
from sphinx_pl.evaluation.scorers.yes_no import score_yes_no
from sphinx_pl.utils.errors import UserError
from sphinx_pl.utils.files import write_whole

PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
)  # fmt: skip
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
SUBTASKS = PERCEPTION + COGNITION
HINT = "Please answer yes or no."
"""The end of every question in the files; the training wording replaces it."""
_IMAGES = (".jpg", ".png", ".jpeg")
_RELEASES = ("", "MME_Benchmark_release_version", "MME_Benchmark_release_version/MME_Benchmark", "MME_Benchmark")
_TABLES = ("", "eval_tool/Your_Results", "Your_Results")


class MMEBenchmark(Benchmark):
    """Answers are read as by the official script, which looks for yes or no in the first four
    letters. An answer that says neither is wrong, as there. An image counts for accuracy+ if both
    of its answers are right."""

    name = "mme"
    title = "MME"
    url = "https://github.com/BradyFU/Awesome-Multimodal-Large-Language-Models/tree/Evaluation"
    licence = "see the page; the images' own"
    family = "mllm"
    splits = ("test",)
    closed = ("yes", "no")

    def _read(self) -> Iterator[tuple[str, list[Record] | SkipSample]]:
        """As `Benchmark._read`; an entry is always an image, not a question."""
        return self.guarded(self.entries(), self.records)

    def entries(self) -> Iterator[tuple[str, Any]]:
        """(subtask/image, (subtask, image's path, its lines)); a missing image's path is None."""
        if self.unified is not None:
            yield from self._annotated()
            return
        any_entry = False
        for subtask in SUBTASKS:
            entries = list(self._folder(subtask)) or list(self._table(subtask))
            yield from entries
            any_entry |= bool(entries)
        if not any_entry:
            raise UserError(f"{self.name}: '{self.src}' has no folder of questions, such as existence: see {self.url}")

    def _folder(self, subtask: str) -> Iterator[tuple[str, Any]]:
        places = (self.src / release / subtask for release in _RELEASES)
        if (folder := next(filter(Path.is_dir, places), None)) is None:
            return
        questions = folder / "questions_answers_YN"
        for file in sorted((questions if questions.is_dir() else folder).glob("*.txt")):
            images = (self._image(subtask, f"{file.stem}{suffix}") for suffix in _IMAGES)
            yield f"{subtask}/{file.stem}", (subtask, next(filter(None, images), None), _lines(file))

    def _table(self, subtask: str) -> Iterator[tuple[str, Any]]:
        places = (self.src / place / f"{subtask}.txt" for place in _TABLES)
        table = next(filter(Path.is_file, places), None)
        groups: dict[bytes, list[bytes]] = {}
        for line in _lines(table) if table else ():
            image, _, rest = line.partition(b"\t")
            groups.setdefault(image, []).append(rest)
        for image, lines in groups.items():
            name = image.decode(errors="replace")
            yield f"{subtask}/{PurePosixPath(name).stem}", (subtask, self._image(subtask, name), lines)

    def _annotated(self) -> Iterator[tuple[str, Any]]:
        """As `entries`, from the unified annotation, where a path has the subtask's name in it."""
        assert self.unified is not None
        groups: dict[str, list[bytes]] = {}
        for item in self.json_items(self.unified):
            lines = groups.setdefault(text(item["image_path"]), [])
            lines.append(f"{item['question']}\t{item['gt_answers']}".encode("utf-8", "surrogateescape"))
        for path, lines in groups.items():
            subtask = next((part for part in reversed(PurePosixPath(path).parts) if part in SUBTASKS), "")
            yield path, (subtask, path, lines)

    def _image(self, subtask: str, name: str) -> str | None:
        """The path of an image below the images' folder."""
        folders = (PurePosixPath(release, subtask) for release in _RELEASES)
        paths = (str(path) for folder in folders for path in (folder / "images" / name, folder / name))
        return next((path for path in paths if (self.images / path).is_file()), None)

    def records(self, key: str, entry: Any) -> Iterator[Record]:
        subtask, image, lines = entry
        if subtask not in SUBTASKS:
            raise SkipSample("subtask_unknown", key)
        if len(lines) != 2:
            raise SkipSample("questions_count", f"{key} has {len(lines)}, not 2")
        if image is None:
            raise SkipSample("image_missing", key)
        for number, line in enumerate(lines):
            question, answer = line.decode().rsplit("\t", 1)
            answer = answer.strip().lower()
            if answer not in ("yes", "no"):
                raise SkipSample("answer_not_yes_no", f"{key}: {answer}")
            meta = {"category": subtask, "image": PurePosixPath(image).name, "asked": question}
            bare_question = question.strip().removesuffix(HINT).strip()
            yield Record(
                f"{key}-{number}", "yes_no", (ImageRef(image),), question=bare_question, answer=answer, meta=meta
            )

    def unit(self, record: Record) -> str:
        return _image_of(record)

    def score(self, record: Record, answer: str, coordinates: Coordinates) -> Score:
        return score_yes_no(answer, record.answer == "yes", official="mme")

    @property
    def metrics(self) -> Sequence[Metric]:
        return (
            Additive(
                "perception",
                "Sum over the ten subtasks of perception of 100 times accuracy and accuracy+: of 2000 points; "
                "undefined unless all are asked.",
                _by_subtask,
                lambda sums: _points(sums)[..., : len(PERCEPTION)].sum(-1),
                _image_of,
                percent=False,
            ),
            Additive(
                "cognition",
                "Sum over the four subtasks of cognition, likewise: of 800 points.",
                _by_subtask,
                lambda sums: _points(sums)[..., len(PERCEPTION) :].sum(-1),
                _image_of,
                percent=False,
            ),
            *self._accuracies,
        )

    @property
    def category_metrics(self) -> Sequence[Metric]:
        points = "100 times accuracy and accuracy+ of a subtask: of 200 points."
        return (Additive("points", points, _sums, _of_both, _image_of, percent=False), *self._accuracies)

    @property
    def _accuracies(self) -> Sequence[Metric]:
        plus = "Share of the images both of whose questions are answered right."
        return (
            mean("accuracy", "Share of right answers."),
            Additive("accuracy+", plus, lambda group: _sums(group)[2:], ratio, _image_of),
        )

    def submit(self, predictions: Sequence[Prediction], folder: Path) -> list[str]:
        """The files that the official `calculation.py` reads: image, question, answer, prediction."""
        out = folder / "mme"
        out.mkdir(parents=True, exist_ok=True)
        lines: dict[str, list[str]] = {}
        for prediction in predictions:
            meta = prediction.record["meta"]
            columns = meta["image"], meta["asked"], prediction.answer.capitalize(), prediction.prediction
            lines.setdefault(prediction.topic, []).append("\t".join(" ".join(column.split()) for column in columns))
        for subtask, rows in lines.items():
            write_whole(out / f"{subtask}.txt", "\n".join(rows) + "\n")
        script = command("python", "calculation.py", "--results_dir", out)
        return [f"MME: the answers for the official script ({script}): {out}"]


def _lines(file: Path) -> list[bytes]:
    return [line for line in file.read_bytes().splitlines() if line.strip()]


def _image_of(asked: Record | Prediction) -> str:
    return asked.key.rpartition("-")[0]


def _sums(group: Sequence[Prediction]) -> tuple[float, ...]:
    """Right answers, questions, images with two right answers, and images, among the questions of
    one image."""
    right = sum(prediction.score for prediction in group)
    return right, float(len(group)), float(right == 2), 1.0


def _by_subtask(group: Sequence[Prediction]) -> Sequence[float]:
    """`_sums` at the subtask's place, flat."""
    sums = np.zeros((len(SUBTASKS), 4))
    sums[SUBTASKS.index(group[0].topic)] = _sums(group)
    return [float(value) for value in sums.flat]


def _points(sums: Floats) -> Floats:
    """[..., subtasks * 4] -> [..., subtasks]."""
    return _of_both(sums.reshape(*sums.shape[:-1], len(SUBTASKS), 4))


def _of_both(sums: Floats) -> Floats:
    return np.asarray(100 * (sums[..., 0] / sums[..., 1] + sums[..., 2] / sums[..., 3]))
