"""Structure: https://github.com/cambridgeltl/visual-spatial-reasoning (data/README.md, "Format of the data")."""

from __future__ import annotations

import pytest

from sphinx_pl.utils.errors import UserError

from .conftest import Run

TRUE = {
    "image": "000000050403.jpg",
    "image_link": "http://images.cocodataset.org/train2017/000000050403.jpg",
    "caption": "The teddy bear is in front of the person.",
    "label": 1,
    "relation": "in front of",
    "annotator_id": 31,
    "vote_true_validator_id": [2, 6],
    "vote_false_validator_id": [],
    "unknown_field": 1,
}
FALSE = TRUE | {
    "image": "000000401552.jpg",
    "image_link": "http://images.cocodataset.org/val2017/000000401552.jpg",
    "caption": "The umbrella is far away from the motorcycle.",
    "label": 0,
    "relation": "far away from",
}


@pytest.mark.parametrize(
    ("split", "place"),
    [("train", "splits/random"), ("zeroshot_train", "splits/zeroshot"), ("train", "data/splits/random")],
)
def test_a_label_is_yes_or_no(run: Run, split: str, place: str) -> None:
    records, report = run(
        "vsr",
        {
            f"{place}/train.jsonl": [
                TRUE,
                FALSE,
                '{"broken',
                TRUE | {"label": "maybe"},
                TRUE | {"image_link": "http://example.com/1.jpg"},
                TRUE | {"caption": ""},
            ]
        },
        split,
    )
    assert [(record.task, record.question, record.answer, record.images[0].path) for record in records] == [
        (
            "yes_no",
            "Is this statement about the image true? The teddy bear is in front of the person.",
            "yes",
            "train2017/000000050403.jpg",
        ),
        (
            "yes_no",
            "Is this statement about the image true? The umbrella is far away from the motorcycle.",
            "no",
            "val2017/000000401552.jpg",
        ),
    ]
    assert records[1].meta == {"relation": "far away from"}
    assert report.dropped == {"entry_malformed": 1, "label_unknown": 1, "image_link": 1, "question_empty": 1}


def test_the_folder_of_the_split_decides(run: Run) -> None:
    with pytest.raises(UserError, match=r"splits/zeroshot/dev\.jsonl"):
        run("vsr", {"splits/random/dev.jsonl": [TRUE]}, split="zeroshot_dev")
