"""Structure: README.txt of CLEVR_v1.0.zip ("QUESTION FILE FORMAT"), https://cs.stanford.edu/people/jcjohns/clevr/."""

from __future__ import annotations

from typing import Any

from sphinx_pl.data.schema import ImageRef, Record

from .conftest import Run


def test_questions_that_need_a_relation_are_told_apart(run: Run) -> None:
    def question(text: str, answer: str, *functions: str, **more: Any) -> dict[str, Any]:
        steps = [{"function": name, "inputs": [0], "value_inputs": []} for name in functions]
        return {
            "split": "train",
            "image_index": 0,
            "image_filename": "CLEVR_train_000000.png",
            "question": text,
            "answer": answer,
            "program": steps,
            "question_index": 0,
            "question_family_index": 7,
        } | more

    document = {
        "info": {"split": "train", "license": "Creative Commons Attribution (CC BY 4.0)", "version": "1.0"},
        "questions": [
            question(
                "What is left of the cube?", "sphere", "scene", "unique", "relate", "query_shape", unknown_field=1
            ),
            question("How many cubes are there?", "2", "scene", "filter_shape", "count"),
            question("No text to answer with?", 2, "scene", "count"),  # type: ignore[arg-type]
            question("Where?", "here", "scene") | {"image_filename": "../../secret.png"},
            {"question": "No program?", "answer": "no", "image_filename": "CLEVR_train_000000.png"},
        ],
    }
    records, report = run("clevr", {"questions/CLEVR_train_questions.json": document})
    image = (ImageRef("images/train/CLEVR_train_000000.png"),)
    assert records == [
        Record("0", "relation", image, question="What is left of the cube?", answer="sphere"),
        Record("1", "short_vqa", image, question="How many cubes are there?", answer="2"),
    ]
    assert report.dropped == {"entry_malformed": 2, "image_path": 1}
