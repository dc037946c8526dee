"""The questions, images and scores of the tasks in this folder."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image

from sphinx_pl.data.answer_parsing import TRUE_FALSE
from sphinx_pl.data.converters.vsr import STATEMENT
from sphinx_pl.data.tasks import TASKS
from sphinx_pl.evaluation.scorers.exact import exact_match
from sphinx_pl.evaluation.scorers.yes_no import score_yes_no
from sphinx_pl.utils.errors import UserError

Document = Mapping[str, Any]

_SHORT = TASKS["short_vqa"].templates[0]
_VSR_WORDINGS = {
    "yes_no": TASKS["yes_no"].templates[0].format(question=STATEMENT),
    # annotations/vsr_val.json in accessory/eval_mm of the original
    "true_false": 'Is the following statement "{caption}" true or false?',
}


def vsr_question(doc: Document, lmms_eval_specific_kwargs: Mapping[str, str]) -> str:
    return _VSR_WORDINGS[lmms_eval_specific_kwargs["wording"]].format(caption=doc["caption"].strip())


def vsr_truth(doc: Document) -> str:
    return "yes" if int(doc["label"]) else "no"


def vsr_images(doc: Document) -> list[Image.Image | str]:
    """The document's image, or the path of the one that it names.

    Raises:
        UserError: the file does not exist.
    """
    if not isinstance(doc["image"], str):
        return [doc["image"].convert("RGB")]
    root = Path(os.environ.get("LMMS_EVAL_MEDIA_ROOT", "."))
    folder = PurePosixPath(doc.get("image_link") or "").parent.name  # train2017 or val2017
    for path in (root / folder / doc["image"], root / doc["image"]):
        if path.is_file():
            return [str(path)]
    raise UserError(
        f"vsr: no image {doc['image']} in {root}: set LMMS_EVAL_MEDIA_ROOT to the folder with COCO's train2017 and "
        "val2017"
    )


def vsr_score(doc: Document, results: Sequence[str]) -> dict[str, float]:
    """1 if the answer begins with the right one of yes (true) and no (false)."""
    return {"accuracy": score_yes_no(results[0], vsr_truth(doc) == "yes", words=TRUE_FALSE).value}


def ocrvqa_documents(rows: Any) -> Any:
    """A `datasets.Dataset` of covers -> one of questions, with `image`, `question` and `answer`."""

    def apart(batch: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
        columns: dict[str, list[Any]] = {"image": [], "question": [], "answer": []}
        for image, questions, answers in zip(batch["image"], batch["questions"], batch["answers"], strict=True):
            for question, answer in zip(questions, answers, strict=True):
                columns["image"].append(image)
                columns["question"].append(question)
                columns["answer"].append(answer)
        return columns

    return rows.map(apart, batched=True, batch_size=64, remove_columns=rows.column_names)


def ocrvqa_images(doc: Document) -> list[Image.Image]:
    return [doc["image"].convert("RGB")]


def ocrvqa_question(doc: Document) -> str:
    return _SHORT.format(question=doc["question"].strip())


def ocrvqa_score(doc: Document, results: Sequence[str]) -> dict[str, float]:
    """1 if the answer is the true one, but for case, white space and a full stop at the end."""
    return {"exact_match": float(exact_match(results[0], [doc["answer"]]))}
