"""Structure: https://huggingface.co/datasets/liuhaotian/LLaVA-Instruct-150K and https://github.com/SALT-NLP/LLaVAR
(README.md, "Training Data"), in the format of docs/Finetune_Custom_Data.md of haotian-liu/LLaVA."""

from __future__ import annotations

import pytest

from .conftest import Run


def entry(image: str, *messages: str) -> dict[str, object]:
    speakers = ("human", "gpt") * len(messages)
    return {
        "id": image.removesuffix(".jpg"),
        "image": image,
        "conversations": [
            {"from": speaker, "value": value} for speaker, value in zip(speakers, messages, strict=False)
        ],
        "unknown_field": 1,
    }


COCO = "000000033471.jpg"
BUS = entry(COCO, "<image>\nWhat color is the bus?", "It is red.", "And the sky?", "It is blue.")
DETAIL = entry(COCO, "Describe the photo.\n<image>", "A red bus stands in a street.")


@pytest.mark.parametrize(
    ("split", "file"),
    [
        ("train", "llava_instruct_150k.json"),
        ("conversation", "conversation_58k.json"),
        ("detail", "detail_23k.json"),
        ("complex_reasoning", "complex_reasoning_77k.json"),
    ],
)
def test_conversations_and_long_answers(run: Run, split: str, file: str) -> None:
    broken = [
        entry(COCO, "A question without an answer"),
        entry(COCO),
        {"id": "no image", "conversations": []},
        entry("../" + COCO, "Where?", "There."),
        7,
    ]
    records, report = run("llava_instruct", {file: [BUS, DETAIL, *broken]}, split)
    assert [(record.task, [(turn.question, turn.answer) for turn in record.turns]) for record in records] == [
        ("chat", [("<image>\nWhat color is the bus?", "It is red."), ("And the sky?", "It is blue.")]),
        ("detailed_answer", [("Describe the photo.\n<image>", "A red bus stands in a street.")]),
    ]
    assert {record.images[0].path for record in records} == {f"train2017/{COCO}"}
    assert len({record.key for record in records}) == 2
    assert report.dropped == {
        "conversation_malformed": 1,
        "conversation_empty": 1,
        "entry_malformed": 2,
        "image_path": 1,
    }


def test_llavar_leaves_out_what_is_llavas(run: Run) -> None:
    cover = entry("100006091214.jpg", "<image>\nWhat is the title?", "Fire Study.")
    files = {"llava_instruct_150k_llavar_20k.json": [BUS, cover, entry("100006091214.jpg", "Broken?", " ")]}
    records, report = run("llavar", files)
    assert [(record.task, record.images[0].path) for record in records] == [("detailed_answer", "100006091214.jpg")]
    assert [turn.answer for turn in records[0].turns] == ["Fire Study."]
    assert report.skipped == {"of_llava_instruct": 1}
    assert report.dropped == {"answer_empty": 1}


def test_llavar_pretraining(run: Run) -> None:
    caption = entry("GCC_train_002582585.jpg", "Describe this picture.\n<image>", "A red rose.")
    records, report = run("llavar", {"chat_llavar.json": [caption, []]}, split="pretrain")
    assert [(record.task, record.images[0].path) for record in records] == [
        ("detailed_answer", "GCC_train_002582585.jpg")
    ]
    assert report.dropped == {"entry_malformed": 1}
