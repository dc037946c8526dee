"""Small files in the official structures of the VQA and document benchmarks, for their tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

TEN = [{"answer": "red", "answer_id": i} for i in range(1, 8)] + [{"answer": "pink"}] * 3
VQA = {"question_id": 9000, "image_id": 9, "question": "What color is the bowl?"}
VQA_TRUTH = {
    "question_id": 9000,
    "multiple_choice_answer": "red",
    "answers": TEN,
    "answer_type": "other",
    "question_type": "three",
}
VQA_YES = {"question_id": 9001, "image_id": 9, "question": "Is it full?"}
VQA_YES_TRUTH = VQA_TRUTH | {
    "question_id": 9001,
    "multiple_choice_answer": "yes",
    "answers": [{"answer": "yes"}] * 10,
    "answer_type": "yes/no",
    "question_type": "other",
}
GQA = {
    "imageId": "n1",
    "question": "What is it?",
    "answer": "cat",
    "fullAnswer": "It is a cat.",
    "types": {"structural": "query", "semantic": "obj", "detailed": "x"},
}
BOOK = {
    "imageURL": "http://x/y/1.jpg",
    "questions": ["Who wrote this book?", "Is it a calendar?", "What is the title?"],
    "answers": ["", "Yes", "Mom's Family Wall Calendar 2016"],
    "split": 3,
}
PROBLEM = {
    "question": "Which is bigger?",
    "choices": ["ant", "elephant"],
    "answer": 1,
    "hint": "Animals.",
    "image": "image.png",
    "split": "test",
    "subject": "natural science",
    "grade": "grade2",
    "lecture": "Long.",
}
STATEMENT = {
    "image": "1.jpg",
    "image_link": "http://x/train2017/1.jpg",
    "caption": "The cat is under the bed.",
    "label": 1,
}
PAGE = {
    "questionId": 337,
    "question": "What is the date?",
    "question_types": ["form", "handwritten"],
    "image": "documents/a_1.png",
    "answers": ["1/8/93", "8 January"],
}
INFOGRAPHIC = {
    "questionId": 98313,
    "question": "How many users?",
    "image_local_name": "37313.jpeg",
    "answers": ["4 million"],
    "answer_type": ["single span"],
    "evidence": ["Text", "Figure"],
    "operation/reasoning": [],
}
CHART = {"imgname": "41.png", "query": "How much in 2010?", "label": "50"}

FILES: dict[str, dict[str, dict[str, Any]]] = {
    "vqav2": {
        "val": {
            "v2_OpenEnded_mscoco_val2014_questions.json": {"questions": [VQA, VQA_YES]},
            "v2_mscoco_val2014_annotations.json": {"annotations": [VQA_TRUTH, VQA_YES_TRUTH]},
        },
        "test-dev": {"v2_OpenEnded_mscoco_test-dev2015_questions.json": {"questions": [VQA, VQA_YES]}},
        "test": {"v2_OpenEnded_mscoco_test2015_questions.json": {"questions": [VQA, VQA_YES]}},
    },
    "okvqa": {
        "val": {
            "OpenEnded_mscoco_val2014_questions.json": {"questions": [VQA, VQA_YES]},
            "mscoco_val2014_annotations.json": {
                "annotations": [VQA_TRUTH, VQA_YES_TRUTH],
                "question_types": {"three": "Objects, Material and Clothing", "other": "Other"},
            },
        }
    },
    "gqa": {"testdev": {"testdev_balanced_questions.json": {"7": GQA}}},
    "vizwiz": {
        "val": {
            "val.json": [
                {
                    "image": "VizWiz_val_1.jpg",
                    "question": "What is this?",
                    "answers": [{"answer": "unanswerable"}] * 7 + [{"answer": "basil"}] * 3,
                    "answer_type": "unanswerable",
                    "answerable": 0,
                }
            ]
        },
        "test": {"test.json": [{"image": "VizWiz_test_1.jpg", "question": "What is this?"}]},
    },
    "textvqa": {
        "val": {
            "TextVQA_0.5.1_val.json": {
                "data": [
                    {"question_id": 1, "image_id": "a", "question": "what brand?", "answers": ["nokia"] * 10},
                    {"question_id": 2, "image_id": "a", "question": "what year?", "answers": ["unanswerable"] * 10},
                ]
            }
        }
    },
    "ocrvqa": {"test": {"dataset.json": {"1": BOOK, "2": BOOK | {"split": 1}, "3": BOOK | {"split": 2}}}},
    "scienceqa": {
        "test": {
            "problems.json": {"5": PROBLEM, "6": PROBLEM | {"image": None}},
            "pid_splits.json": {"test": ["5", "6"], "val": []},
        }
    },
    "vsr": {
        "test": {"splits/random/test.jsonl": [STATEMENT, STATEMENT | {"label": 0}]},
        "zeroshot_test": {"splits/zeroshot/test.jsonl": [STATEMENT]},
    },
    "iconqa": {
        "test": {
            "iconqa/test/choose_txt/1/data.json": {
                "question": "How likely?",
                "choices": ["certain", "no"],
                "answer": 0,
            },
            "iconqa/test/choose_img/2/data.json": {"question": "Next?", "choices": ["a.png", "b.png"], "answer": 0},
            "iconqa/test/fill_in_blank/3/data.json": {"question": "How many? _", "answer": "7"},
        }
    },
    "docvqa": {"val": {"val_v1.0_withQT.json": {"data": [PAGE]}}, "test": {"test_v1.0.json": {"data": [PAGE]}}},
    "infographicvqa": {
        "val": {"infographicsVQA_val_v1.0_withQT.json": {"data": [INFOGRAPHIC]}},
        "test": {"infographicsVQA_test_v1.0.json": {"data": [INFOGRAPHIC]}},
    },
    "chartqa": {
        "test": {"test/test_human.json": [CHART], "test/test_augmented.json": [CHART | {"label": "Yes"}]},
    },
}
"""Kind -> split -> path -> content; of test splits with hidden truth too the answers that the official files lack."""
CASES = [(kind, split) for kind, splits in FILES.items() for split in splits]


def write(folder: Path, files: dict[str, Any]) -> None:
    """Writes text as it is, lists as jsonl where the name says so, the rest as JSON."""
    for place, content in files.items():
        path = folder / place
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, str):
            path.write_text(content)
        elif path.suffix == ".jsonl":
            path.write_text("".join(json.dumps(line) + "\n" for line in content))
        else:
            path.write_text(json.dumps(content))
