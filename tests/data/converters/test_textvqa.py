"""Structure: https://textvqa.org/dataset (its json files, and the same fields in the hub's facebook/textvqa)."""

from __future__ import annotations

from .conftest import Run


def test_the_most_frequent_answer_is_trained_on_unless_it_is_a_remark(run: Run) -> None:
    entry = {
        "question": "what is the brand of phone?",
        "image_id": "0054c91397f2fe05",
        "image_classes": ["Belt", "Mobile phone"],
        "flickr_original_url": "https://farm6.staticflickr.com/1.jpg",
        "flickr_300k_url": "https://c4.staticflickr.com/1_z.jpg",
        "image_width": 1024,
        "image_height": 730,
        "answers": ["nokia", "Nokia", "nokia", "toshiba", "nokia", "nokia", "nokia", "nokia", "nokia", "nokia"],
        "question_tokens": ["what", "is", "the", "brand", "of", "phone"],
        "question_id": 0,
        "set_name": "train",
        "unknown_field": 1,
    }
    remark = "answering does not require reading text in the image"
    records, report = run(
        "textvqa",
        {
            "TextVQA_0.5.1_train.json": {
                "dataset_type": "train",
                "dataset_name": "textvqa",
                "dataset_version": "0.5.1",
                "data": [
                    entry,
                    entry | {"question_id": 1, "answers": [remark] * 6 + ["dog"] * 4},
                    {key: value for key, value in entry.items() if key != "answers"} | {"question_id": 2},
                    entry | {"question_id": 3, "image_id": None},
                    entry | {"question_id": 4, "answers": "nokia"},
                    entry | {"question_id": 0},
                ],
            }
        },
    )
    assert [(record.task, record.question, record.answer) for record in records] == [
        ("short_vqa", "what is the brand of phone?", "nokia")
    ]
    assert records[0].images[0].path == "train_images/0054c91397f2fe05.jpg"
    assert records[0].meta == {"answers": entry["answers"]}
    assert report.dropped == {"entry_malformed": 2, "duplicate_key": 1}
    assert report.skipped == {"answer_is_a_remark": 1, "answers_not_public": 1}
