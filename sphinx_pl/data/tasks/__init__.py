"""The tasks: wordings, how each writes a question and an answer from a record, and reads an answer.

| task               | asks for                        | a record's fields                        | scored by        |
|--------------------|---------------------------------|------------------------------------------|------------------|
| short_vqa          | a word or phrase                | question, answer                         | vqa_exact        |
| relation           | where a thing is, in a word     | question, answer                         | vqa_exact        |
| yes_no             | yes or no                       | question, answer                         | yes_no           |
| multiple_choice    | the letter of a choice          | question, choices, answer                | choice           |
| detailed_answer    | a long answer                   | question, answer                         | caption_f1       |
| description        | a long description              | answer                                   | caption_f1       |
| caption            | one sentence                    | answer                                   | caption_f1       |
| rec                | the box of a phrase             | question (the phrase), regions[0]        | box_iou50        |
| reg                | the phrase of a box             | regions[0] with its label                | text_exact       |
| grounded_caption   | a caption with boxes            | answer with {0}, {1,2}; regions          | grounded_f1      |
| grounded_vqa       | an answer with boxes            | question, answer with {0}; regions       | grounded_answer  |
| detection          | all boxes of one class          | question (the class), regions            | detection_f1     |
| detection_all      | all boxes of all classes        | regions                                  | grounded_f1      |
| ocr                | all texts with boxes            | regions (label: the text)                | ocr_exact        |
| ocr_text           | all texts, one a line           | regions (label: the text)                | edit_similarity  |
| pose               | a person's key points           | regions[0] with keypoints; question: who | keypoint_pck     |
| layout             | a page's parts with boxes       | regions                                  | grounded_f1      |
| relation_detection | how one region relates to other | regions[0], regions[1], answer           | vqa_exact        |
| question_generation| questions about the image       | question (those to write); answer        | caption_f1       |
| chat               | an answer, image or not         | question, answer, or turns               | vqa_exact        |
| text               | nothing: a document is read     | answer                                   | none             |

A record with finished `turns` needs no other field, whatever its task. In an answer with boxes, `{0}`
stands for region 0 (its label and its box), and `{1,2}` for region 1's label with the boxes of both.

To add a task, call `add_task` in `wordings.py` with a name, a writer, a reader, a scorer and wordings.
`writers.py` and `readers.py` have the functions that write and read each form of answer.
"""

from sphinx_pl.data.tasks import wordings  # noqa: F401 - it registers all tasks
from sphinx_pl.data.tasks.fields import choice_letter, reading_order, repeated_choice
from sphinx_pl.data.tasks.readers import (
    read_boxes,
    read_choice,
    read_detection,
    read_grounded,
    read_grounded_answer,
    read_keypoints,
    read_lines,
    read_ocr,
    read_text,
    read_yes_no,
)
from sphinx_pl.data.tasks.task import LINES, PARTS, TASKS, WHOLE, AnswerReader, Parsed, Task, TurnWriter, add_task

__all__ = [
    "LINES",
    "PARTS",
    "TASKS",
    "WHOLE",
    "AnswerReader",
    "Parsed",
    "Task",
    "TurnWriter",
    "add_task",
    "choice_letter",
    "read_boxes",
    "read_choice",
    "read_detection",
    "read_grounded",
    "read_grounded_answer",
    "read_keypoints",
    "read_lines",
    "read_ocr",
    "read_text",
    "read_yes_no",
    "reading_order",
    "repeated_choice",
]
