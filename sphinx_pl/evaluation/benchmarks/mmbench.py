"""MMBench and CCBench: multiple-choice questions that count if they are answered right in all
rotations of the choices (Liu et al. 2023, arXiv 2307.06281).

Files (https://github.com/open-compass/MMBench): tables with tabs between columns, cells in quotes
where they have line breaks: index, question, A, B, C, D (and further letters, if there are more
options), image (base64, or the index of the row that has it), category, and in MMBench hint,
l2-category, source and others; "answer", a letter, where it is public. A question's rotations are
rows with its index plus a multiple of a million; where a file has one row of a question, its
rotations are made here, in the same way.

An option is missing where its cell is blank, and only there: "None", "NA", "nan" and "0" are texts.
The official scripts read the table with pandas, which takes such words for blank cells.

- MMBench: `mmbench_{dev,test}_{en,cn}_20231003.tsv`, also distributed as
  `MMBench_{DEV,TEST}_{EN,CN}.tsv`; the first release was `mmbench_{dev,test}_20230712.tsv`.
- CCBench: `ccbench_20231003.tsv` or `CCBench.tsv`.

The server takes a table (xlsx) of the columns that `COLUMNS` lists.
"""

from __future__ import annotations

import base64
import binascii
import csv
import dataclasses
import hashlib
import string
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from sphinx_pl.data.annotation_files import MALFORMED
from sphinx_pl.data.converters.common import asked
from sphinx_pl.data.files import CacheFile, Hold, cache_folder, identity, in_cache, prune
from sphinx_pl.data.images import MAX_BYTES
from sphinx_pl.data.schema import ImageRef, Record
from sphinx_pl.data.skip import SkipSample
from sphinx_pl.evaluation.benchmarks.multiple_choice import MultipleChoiceBenchmark, letter_record
from sphinx_pl.evaluation.metrics import Additive, Metric, ratio
from sphinx_pl.evaluation.runner import Prediction
from sphinx_pl.evaluation.scorers.choices import circular, mmbench_question
from sphinx_pl.utils.errors import UserError
from sphinx_pl.utils.files import whole_file

ROTATION = 1_000_000
COLUMNS = ("index", "question", "A", "B", "C", "D", "prediction", "category", "l2_category")
INSTALL = "pip install 'sphinx-pl[eval]'"
_LETTERS = string.ascii_uppercase
_NO_HINT = ("nan", "none", "n/a")  # the official scripts and tables write these where a question has no hint
_LONGEST_INDEX = 64  # of a cell that names another row's image


class MMBenchBenchmark(MultipleChoiceBenchmark):
    """A question in n rotations is right if all n answers are. An answer must name a letter or
    repeat a choice; the official script lets a language model read the others. Chinese questions
    have the training's wording after them too. Categories are those of level 2."""

    name = "mmbench"
    title = "MMBench"
    url = "https://github.com/open-compass/MMBench"
    licence = "Apache-2.0; the images' own"
    family = "mllm"
    splits: ClassVar[tuple[str, ...]] = ("dev_en", "dev_cn", "test_en", "test_cn")
    hidden: ClassVar[tuple[str, ...]] = ("test_en", "test_cn")
    part: ClassVar[str] = "l2-category"
    """The column that names a question's category."""

    def check(self) -> None:
        if self.is_hidden:
            _openpyxl()

    @property
    def tables(self) -> tuple[str, ...]:
        """The names that the split's file may have."""
        kind, language = self.split.split("_")
        first = (f"mmbench_{kind}_20230712.tsv",) if language == "en" else ()
        return f"mmbench_{self.split}_20231003.tsv", f"MMBench_{self.split.upper()}.tsv", *first

    def entries(self) -> Iterator[tuple[str, Any]]:
        """(question's index, its rows by index); images are ImageRefs."""
        questions: dict[int, dict[int, Mapping[str, Any]]] = {}
        odd = 0
        for row in self._rows(self.file(*self.tables)):
            try:
                index = int(row["index"])
            except (ValueError, TypeError):
                odd += 1
                yield f"row of no index {odd}", {}
                continue
            rows = questions.setdefault(mmbench_question(index), {})
            rows[index] = row if index not in rows else {}  # of two rows with one index neither is used
        for question, rows in questions.items():
            yield str(question), rows

    def records(self, key: str, entry: Any) -> Iterator[Record]:
        if not entry:
            raise ValueError("no rows")
        if not all(entry.values()):
            raise SkipSample("duplicate_key", f"{key}: two rows of one index")
        rows = dict(sorted(entry.items()))
        if len(rows) == 1:
            ((index, row),) = rows.items()
            choices = _choices(row)
            if len(choices) < 2:
                raise SkipSample("choices_count", f"{key} has {len(choices)}")
            rows = {index + ROTATION * turn: _turned(row, choices, turn) for turn in range(len(choices))}
        for index, row in rows.items():
            choices = _choices(row)
            question = asked(row["question"])
            hint = _cell(row, "hint")
            if hint is not None and hint.lower() not in _NO_HINT:
                question = f"{hint}\n{question}"
            category = _cell(row, "category") or ""
            meta = {
                "category": _cell(row, self.part) or category,
                "question_id": index,
                "rotations": len(rows),
                "row": {"question": row["question"], "category": category},
            }
            name, image = f"{key}-{index}", row["image"]
            if not isinstance(image, ImageRef):
                raise SkipSample("image_unreadable", name)
            if self.is_hidden:
                asked_for = Record(
                    name, "multiple_choice", (image,), question=question, choices=tuple(choices), meta=meta
                )
                yield self.unanswered(asked_for)
            else:
                yield letter_record(name, image, question, choices, row["answer"], meta)

    def annotation(self, key: str, entry: Mapping[str, Any]) -> Record:
        record = super().annotation(key, entry)
        index = _index(entry)
        rotations = self._annotated[mmbench_question(index)]
        return dataclasses.replace(record, meta=dict(record.meta) | {"question_id": index, "rotations": rotations})

    @cached_property
    def _annotated(self) -> Counter[int]:
        """The number of entries of the unified annotation for each question."""
        assert self.unified is not None
        counts: Counter[int] = Counter()
        for entry in self.json_items(self.unified):
            with suppress(*MALFORMED, SkipSample):
                counts[mmbench_question(_index(entry))] += 1
        return counts

    def unit(self, record: Record) -> str:
        return _question(record)

    def _rows(self, file: Path) -> list[dict[str, Any]]:
        """The table's rows. Images are decoded to one file of the cache, of which each is a part.

        An image that is no base64 is None.
        """
        copy = cache_folder("files") / f"{identity(str(file))}-images"
        spans: dict[bytes, tuple[int, int]] = {}  # by what is encoded: rotations repeat their question's image
        end = 0
        rows: list[dict[str, Any]] = []
        fresh = not in_cache(copy)
        with CacheFile(copy) as images:
            for row in _table(file):
                cell = row.get("image")
                row["image"] = cell
                if cell is not None and len(cell) > _LONGEST_INDEX:
                    name = hashlib.sha256(cell.encode("utf-8", "surrogateescape")).digest()
                    if name not in spans:
                        data = _decoded(cell)
                        spans[name] = end, len(data)
                        end += len(data)
                        if fresh:
                            images.write(data)
                    row["image"] = spans[name]
                rows.append(row)
            if fresh:
                images.keep()
                prune(keep=copy)
        self._images = Hold(str(copy))
        of_index = {row.get("index"): row["image"] for row in rows}
        for row in rows:
            span = row["image"] if isinstance(row["image"], tuple) else of_index.get(row["image"])
            row["image"] = ImageRef(str(copy), *span) if isinstance(span, tuple) and span[1] else None
        return rows

    @property
    def metrics(self) -> Sequence[Metric]:
        if self.is_hidden:
            return ()
        rotated = "Share of the questions with right answers in all rotations."
        once = "Share of right answers to the questions without rotation."
        return (
            Additive("circular", rotated, _circular, ratio, _question),
            Additive("accuracy", once, _first, ratio, _question),
        )

    def submit(self, predictions: Sequence[Prediction], folder: Path) -> list[str]:
        """Write the server's table of a hidden split, blank where a question was not asked."""
        if not self.is_hidden:
            return []
        openpyxl = _openpyxl()
        book = openpyxl.Workbook()
        sheet = book.active
        sheet.append(COLUMNS)
        answers = {p.record["meta"]["question_id"]: p.prediction for p in predictions}
        entries = (records for _, records in self.read() if not isinstance(records, SkipSample))
        blank = 0
        for number, record in enumerate((record for records in entries for record in records), 2):
            index = record.meta["question_id"]
            blank += index not in answers
            cells = {"index": index, "prediction": answers.get(index, ""), "l2_category": record.meta["category"]}
            cells |= dict(zip(_LETTERS, record.choices, strict=False)) | record.meta["row"]
            for column, name in enumerate(COLUMNS, 1):
                value = cells.get(name)
                cell = sheet.cell(number, column)
                if isinstance(value, str):
                    cell.value = openpyxl.cell.cell.ILLEGAL_CHARACTERS_RE.sub(" ", value)
                    cell.data_type = "s"  # an answer that begins with "=" is no formula
                else:
                    cell.value = value
        file = folder / f"submission_{self.name}_{self.split}.xlsx"
        with whole_file(file) as temporary, temporary.open("wb") as stream:
            book.save(stream)
        left = f"; {blank} rows have a blank prediction: they were not asked" if blank else ""
        return [f"{file}: the table for the server of {self.title} (https://mmbench.opencompass.org.cn){left}"]


class CCBenchBenchmark(MMBenchBenchmark):
    """Questions on Chinese culture. Categories are the table's."""

    name = "ccbench"
    title = "CCBench"
    splits = ("dev",)
    part = "category"

    @property
    def tables(self) -> tuple[str, ...]:
        return "ccbench_20231003.tsv", "CCBench.tsv"


def _table(file: Path) -> Iterator[dict[str, Any]]:
    """The rows of a table by its columns' names."""
    csv.field_size_limit(2 * MAX_BYTES)  # the default is less than most images
    try:
        with file.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
            for row in csv.DictReader(lines, delimiter="\t"):
                yield row if None not in row else {"index": None}  # more cells than columns: all are in doubt
    except csv.Error as error:
        raise UserError(f"{file} cannot be read as a table ({error}): download it again") from None


def _decoded(cell: str) -> bytes:
    """The bytes of a base64 cell, none where it is not base64."""
    try:
        return base64.b64decode(cell, validate=True)
    except (binascii.Error, ValueError):
        return b""


def _cell(row: Mapping[str, Any], name: str) -> str | None:
    """A cell's text, None where it is empty."""
    value = row.get(name)
    if value is None or not (text := str(value).strip()):
        return None
    text.encode()  # refuses bytes that are no UTF-8
    return text


def _choices(row: Mapping[str, Any]) -> list[str]:
    """The options, in the columns A, B, ... up to the last that is not blank.

    Raises:
        SkipSample: a cell between them is blank, so the letters after it are in doubt.
    """
    cells = [_cell(row, letter) for letter in _LETTERS]
    while cells and cells[-1] is None:
        cells.pop()
    filled = [cell for cell in cells if cell is not None]
    if len(filled) < len(cells):
        raise SkipSample("choice_blank", f"option {_LETTERS[cells.index(None)]}")
    return filled


def _turned(row: Mapping[str, Any], choices: Sequence[str], turn: int) -> dict[str, Any]:
    """The row with its choices moved on by `turn`, like the official rotations."""
    moved = [*choices[turn:], *choices[:turn]]
    turned = {**row, **dict(zip(_LETTERS, moved, strict=False))}
    if (answer := _cell(row, "answer")) is not None:
        place = _LETTERS.find(answer.upper()) if len(answer) == 1 else -1
        if not 0 <= place < len(choices):
            raise SkipSample("choice_missing", f"{answer} of {len(choices)}")
        turned["answer"] = _LETTERS[(place - turn) % len(choices)]
    return turned


def _openpyxl() -> Any:
    try:
        import openpyxl
        import openpyxl.cell.cell
    except ImportError:
        raise UserError(f"the table for MMBench's server needs openpyxl: {INSTALL}") from None
    return openpyxl


def _index(entry: Mapping[str, Any]) -> int:
    """The index of an entry of a unified annotation, which says whose rotation it is.

    Raises:
        SkipSample: the entry has none.
    """
    try:
        return int(entry["question_id"])
    except (KeyError, ValueError, TypeError):
        raise SkipSample("question_id_missing", f"question_id: {entry.get('question_id')!r} is no index") from None


def _question(asked_for: Record | Prediction) -> str:
    meta = asked_for.record["meta"] if isinstance(asked_for, Prediction) else asked_for.meta
    return str(mmbench_question(meta["question_id"]))


def _circular(group: Sequence[Prediction]) -> tuple[float, float]:
    """1 if all rotations of one question are right, and 1."""
    question = _question(group[0])
    asked_for: dict[Hashable, int] = {question: int(group[0].record["meta"].get("rotations", 1))}
    return float(circular(((question, p.score == 1) for p in group), asked_for)[question]), 1.0


def _is_rotated(prediction: Prediction) -> bool:
    index = prediction.record["meta"].get("question_id")
    return isinstance(index, int) and index >= ROTATION


def _first(group: Sequence[Prediction]) -> tuple[float, float]:
    """The score of one question without rotation, and 1 if it was asked."""
    scores = [p.score for p in group if not _is_rotated(p)]
    return sum(scores), float(len(scores))
