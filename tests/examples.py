"""One record of every task, on an image of 100 x 50 pixels: in a square of 100, moved down by
25.
"""

from __future__ import annotations

from typing import Any

from sphinx_pl.data.schema import ImageRef, Record, Region

LEFT = Region((10, 5, 20, 15), "red square")  # [0.100,0.300,0.200,0.400]
RIGHT = Region((60, 5, 80, 25), "blue circle")  # [0.600,0.300,0.800,0.500]
LOW = Region((0, 30, 50, 50), "red square")  # [0.000,0.550,0.500,0.750]
PERSON = Region((0, 0, 100, 50), "person", ((50, 25, 2), *[(0, 0, 0)] * 4, (10, 5, 2), *[(0, 0, 0)] * 11))

_FIELDS: dict[str, dict[str, Any]] = {
    "short_vqa": {"question": "What colour is it?", "answer": "red"},
    "relation": {"question": "Where is it?", "answer": "left"},
    "multiple_choice": {"question": "Which {digit}?", "answer": "7", "choices": ("3", "7", "9")},
    "description": {"answer": "Two shapes."},
    "caption": {"answer": "shapes"},
    "rec": {"question": "the red square", "regions": (LEFT,)},
    "reg": {"regions": (LEFT,)},
    "grounded_caption": {"answer": "A {0} left of a {1}.", "regions": (LEFT, RIGHT)},
    "detection": {"question": "red square", "regions": (LOW, RIGHT, LEFT)},
    "ocr": {"regions": (RIGHT, LOW, LEFT)},
    "pose": {"regions": (PERSON,)},
    "layout": {"regions": (RIGHT, LOW, LEFT)},
    "chat": {"question": "Hello?", "answer": "Hello."},
    "text": {"answer": "A document.\n"},
    "yes_no": {"question": "Is it red?", "answer": "yes"},
    "detailed_answer": {"question": "Why is it red?", "answer": "It was painted. Nobody knows by whom."},
    "grounded_vqa": {"question": "What is red?", "answer": "The {0,1}, not the {2}.", "regions": (LEFT, LOW, RIGHT)},
    "detection_all": {"regions": (LOW, RIGHT, LEFT)},
    "ocr_text": {"regions": (RIGHT, LOW, LEFT)},
    "relation_detection": {"answer": "beside", "regions": (LEFT, RIGHT)},
    "question_generation": {"question": "What colour is it?\nHow many are there?"},
}

EXAMPLES = {
    task: Record("k", task, images=(ImageRef("a.jpg"),), sizes=((100, 50),), **fields)
    for task, fields in _FIELDS.items()
}

NOT_IN_SAMPLE = frozenset(
    {
        "yes_no",
        "detailed_answer",
        "grounded_vqa",
        "detection_all",
        "ocr_text",
        "relation_detection",
        "question_generation",
    }
)
"""Tasks that the sample data has no records of."""
