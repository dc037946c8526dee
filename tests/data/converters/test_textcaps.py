"""Structure: https://textvqa.org/textcaps/dataset (its json files; folders of images as Big Vision reads them)."""

from __future__ import annotations

from .conftest import Run


def test_each_caption_is_a_record(run: Run) -> None:
    captions = ["A phone with the brand Nokia.", "Nokia is written on a phone."]
    entry = {
        "image_id": "0054c91397f2fe05",
        "image_classes": ["Mobile phone"],
        "image_width": 1024,
        "image_height": 730,
        "set_name": "train",
        "image_name": "0054c91397f2fe05",
        "image_path": "train/0054c91397f2fe05.jpg",
        "caption_id": 7,
        "caption_str": captions[0],
        "reference_strs": captions,
        "unknown_field": 1,
    }
    records, report = run(
        "textcaps",
        {
            "TextCaps_0.1_train.json": {
                "dataset_name": "textcaps",
                "data": [
                    entry,
                    entry | {"caption_id": 8, "caption_str": captions[1]},
                    entry | {"caption_id": 9, "caption_str": " "},
                    {"image_id": "a", "caption_id": 10},
                    {"caption_str": "Broken: no image."},
                ],
            }
        },
    )
    assert [(record.task, record.answer) for record in records] == [("caption", captions[0]), ("caption", captions[1])]
    assert {record.images[0].path for record in records} == {"train_images/0054c91397f2fe05.jpg"}
    assert records[1].meta == {"references": captions}
    assert report.dropped == {"answer_empty": 1, "entry_malformed": 1}
    assert report.skipped == {"captions_not_public": 1}
