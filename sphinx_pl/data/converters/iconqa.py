"""IconQA has questions about abstract diagrams.

A question has texts or images to choose from, or a blank to fill in.

The files (https://github.com/lupantech/IconQA, iconqa_data.zip) are
iconqa/{split}/{kind}/{id}/data.json with {"question", "answer", "choices", "ques_type", "grade",
"label"}, and image.png beside each. In `choose_txt` the choices are texts, in `choose_img` names of
images in the same folder. In both, the answer is an index. In `fill_in_blank` it is a text.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from sphinx_pl.data.converters import Converter
from sphinx_pl.data.converters.common import asked, choice_record, choice_turn, chosen, question_record, text
from sphinx_pl.data.schema import ImageRef, Record
from sphinx_pl.utils.errors import UserError

KINDS = ("choose_txt", "choose_img", "fill_in_blank")


class IconQAConverter(Converter):
    """If the choices are images, the record has all of them, each behind its letter."""

    name = "iconqa"
    title = "IconQA"
    url = "https://github.com/lupantech/IconQA"
    licence = "CC BY-NC-SA 4.0"
    tasks = ("multiple_choice", "short_vqa", "yes_no")
    splits: ClassVar[tuple[str, ...]] = ("train", "val", "test")

    def entries(self) -> Iterator[tuple[str, Any]]:
        folders = [self.src / "iconqa" / self.split / kind for kind in KINDS]
        if not any(folder.is_dir() for folder in folders):
            raise UserError(f"iconqa: there is none of {', '.join(map(str, folders))}: they are part of {self.url}")
        for folder in folders:
            for path in sorted(folder.glob("*/data.json")):
                yield f"{folder.name}-{path.parent.name}", path

    def records(self, key: str, entry: Path) -> Iterator[Record]:
        problem = json.loads(entry.read_bytes())
        folder = entry.parent.relative_to(self.src).as_posix()
        kind, image = entry.parents[1].name, f"{folder}/image.png"
        question, answer, choices = asked(problem["question"]), problem["answer"], problem.get("choices")
        meta = {name: problem[name] for name in ("grade", "label") if name in problem} | {"kind": kind}
        if kind == "choose_txt":
            yield choice_record(key, image, question, choices, answer, meta)
        elif kind == "choose_img":
            chosen(choices, answer)
            yield Record(
                key=key,
                task="multiple_choice",
                images=tuple(ImageRef(path) for path in (image, *(f"{folder}/{text(choice)}" for choice in choices))),
                turns=(choice_turn(f"<image>\n{question}", ["<image>"] * len(choices), answer),),
                meta=meta,
            )
        else:
            yield question_record(key, image, question, str(answer) if isinstance(answer, int) else answer, meta)
