"""CLEVR has questions about rendered scenes, with the program that answers each.

The files (https://cs.stanford.edu/people/jcjohns/clevr/, CLEVR_v1.0.zip; its README.txt describes
them) are `questions/CLEVR_{train,val}_questions.json` with {"questions": [{"image_filename",
"question", "answer", "program": [{"function", "inputs", "value_inputs"}]}]}. A program has a step
`relate` if the question is about an object left of, right of, in front of or behind another. The
test split has no answers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sphinx_pl.data.converters import Converter
from sphinx_pl.data.schema import ImageRef, Record


class ClevrConverter(Converter):
    """A question that needs a spatial relation has the task `relation`, any other `short_vqa`.

    The images lie as CLEVR_v1.0.zip unpacks them.
    """

    name = "clevr"
    title = "CLEVR"
    url = "https://cs.stanford.edu/people/jcjohns/clevr/"
    licence = "CC BY 4.0"
    tasks = ("relation", "short_vqa")

    def entries(self) -> Iterator[tuple[str, Any]]:
        name = f"CLEVR_{self.split}_questions.json"
        for number, question in enumerate(self.json_items(f"questions/{name}", name, of="questions")):
            yield str(number), question

    def records(self, key: str, entry: Any) -> Iterator[Record]:
        relates = any(step["function"] == "relate" for step in entry["program"])
        yield Record(
            key=key,
            task="relation" if relates else "short_vqa",
            images=(ImageRef("/".join(("images", self.split, entry["image_filename"]))),),
            question=entry["question"],
            answer=entry["answer"],
        )
